"""The list of faults that `make planted` plants does not go stale."""

import planted_faults
import pytest


@pytest.mark.parametrize("fault", planted_faults.FAULTS, ids=lambda fault: fault.name)
def test_fault_can_be_planted(fault):
    text = (planted_faults.ROOT / fault.file).read_text(encoding="utf-8")
    assert fault.planted(text) != text
    with pytest.raises(ValueError, match="has 0 times"):
        fault.planted(text.replace(fault.old, ""))
