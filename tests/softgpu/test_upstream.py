"""A fault of Triton's own: docs/triton_overwrite.md. When a test here fails, Triton has mended it."""

import importlib.util
import pathlib

import pytest

import softgpu
from softgpu.kernels import UNFENCED

_FILE = pathlib.Path(__file__).parents[2] / "docs" / "triton_overwrite.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("triton_overwrite", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stages", [2, 3])
def test_a_buffer_is_refilled_under_a_wgmma(example, stages):
    with softgpu.active("sm_90", soft=UNFENCED), pytest.raises(softgpu.Fault, match="overwrite in flight"):
        example.run("cpu", stages)


@pytest.mark.parametrize("late", [False, True])
def test_the_product_depends_on_when_the_wgmma_reads(example, late):
    with softgpu.active("sm_90", soft=softgpu.SOFT, late=late):
        (c, s), (_, expected) = example.run("cpu", 3)
    assert bool(c.isnan().any()) is late
    assert (s - expected).abs().max() < 1e-5
