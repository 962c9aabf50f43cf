"""Triton kernels on the software GPU against PyTorch, and what a session knows of them."""

import pytest
import torch
import triton

import softgpu
from softgpu import kernels
from softgpu.kernels import UNFENCED, nan

TARGETS = ("sm_80", "sm_90")
BOUNDS = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-3}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [1, 255, 1000])
def test_add(target, n):
    x, y, z = torch.randn(n), torch.randn(n), nan(n)
    with softgpu.active(target):
        kernels.add_kernel[(triton.cdiv(n, 256),)](x, y, z, n, B=256)
    assert torch.equal(z, x + y)


@pytest.mark.parametrize("target", TARGETS)
def test_softmax(target):
    x, z = torch.randn(5, 300), nan(5, 300)
    with softgpu.active(target):
        kernels.softmax_kernel[(5,)](x, z, 300, 300, B=512)
    torch.testing.assert_close(z, x.softmax(1))


@pytest.mark.parametrize("axis", [0, 1])
def test_sum(axis):
    x, z = torch.randn(64, 128), nan(64 if axis else 128)
    with softgpu.active("sm_90"):
        kernels.sum_kernel[(1,)](x, z, M=64, N=128, AXIS=axis)
    torch.testing.assert_close(z, x.sum(axis))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("ta", "tb"), [(False, False), (True, True), (False, True)])
def test_matmul(target, dtype, ta, tb):
    with softgpu.active(target, soft=UNFENCED) as session:
        assert kernels.matmul(dtype, ta=ta, tb=tb) <= BOUNDS[dtype]
    (result,) = session.results
    assert softgpu.totals(result)["wgmma_flops" if target == "sm_90" else "mma_flops"] == 2 * 2 * 2 * 64 * 64 * 96


@pytest.mark.parametrize(
    ("bm", "bn", "bk", "warps", "stages"),
    [(128, 64, 64, 8, 2), (128, 128, 32, 4, 4), (64, 16, 16, 4, 2), (64, 8, 64, 4, 3), (64, 256, 64, 8, 3)],
)
def test_matmul_shapes(bm, bn, bk, warps, stages):
    with softgpu.active("sm_90"):
        assert kernels.matmul(torch.bfloat16, 130, 260, 160, bm, bn, bk, warps, stages) <= 4e-3


@pytest.mark.parametrize(("dtype", "programs", "tile"), [(torch.float16, 6, 64), (torch.bfloat16, 2, 32)], ids=str)
def test_descriptors(dtype, programs, tile):
    with softgpu.active("sm_90") as session:
        assert kernels.descriptor_matmul(dtype, 136, 96, 152, 64, tile, tile, programs) <= BOUNDS[dtype]
    (result,) = session.results
    assert softgpu.totals(result)["issues TMA"] > 0
    profile = softgpu.profile(session.results)
    assert "descriptor_kernel: grid" in profile
    assert "kernels.py:" in profile


@pytest.mark.parametrize("checks", ["all", "some", "none"])
def test_results_do_not_depend_on_checks(checks):
    with softgpu.active("sm_90", checks=checks):
        assert kernels.matmul(torch.bfloat16) <= 4e-3


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_late_products_are_the_same(dtype):
    with softgpu.active("sm_90", late=True, soft=UNFENCED):
        assert kernels.matmul(dtype) <= BOUNDS[dtype]


def test_a_sample_of_programs():
    x, z = torch.randn(1024), nan(1024)
    with softgpu.active("sm_90", programs=lambda total: [0, total - 1]) as session:
        kernels.copy_kernel[(4,)](x, z, B=256)
    assert session.results[0].programs == 2
    assert z.isnan().tolist() == [False] * 256 + [True] * 512 + [False] * 256


def test_offsets_of_64_bits(unpoisoned_memory):
    """The second row is 2^33 bytes behind the first, in memory of which two pages are touched."""
    memory = torch.empty((1 << 31) + 256)
    x, z = memory.as_strided((2, 256), (1 << 31, 1)), nan(2, 256)
    x.copy_(torch.randn(2, 256))
    with softgpu.active("sm_90"):
        kernels.rows_kernel[(2,)](x, z, 1 << 31, 256, 2, B=256, WIDE=True)
    assert torch.equal(z, x)
