"""Several processes, by gloo: DTensors sharded by batch and by groups, FSDP2 and DDP, against one process."""

import pathlib
import subprocess
import sys

import pytest
from torch import distributed

WORKER = pathlib.Path(__file__).with_name("distributed_worker.py")


@pytest.mark.skipif(not distributed.is_available(), reason="a PyTorch without torch.distributed")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_processes(world, tmp_path):
    """Each checks what it has; see distributed_worker.py."""
    command = [sys.executable, "-W", "ignore", str(WORKER), str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
    assert all(f"done {rank}" in out for rank, out in enumerate(said))
