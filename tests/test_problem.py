"""ConvProblem: sizes, counts, names."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from groupconv import ConvProblem, configs
from groupconv.problem import PASSES, output_size

STRIDED = ConvProblem(4, 24, 15, 13, 36, 3, 2, (2, 3), (1, 1, 0, 0), (1, 2), groups=12, dtype="fp16")


def test_output_size():
    geometries = [(1, 0, 1), (2, 1, 1), (3, 2, 2), (4, 3, 3), (2, 4, 1)]
    for size, kernel, (stride, pad, dilation) in itertools.product((1, 4, 7, 12), (1, 2, 3, 5), geometries):
        pixels = output_size(size, kernel, stride, 2 * pad, dilation)
        x, w = torch.empty(1, 1, size, 40), torch.empty(1, 1, kernel, 1)
        try:
            expected = F.conv2d(x, w, None, (stride, 1), (pad, 0), (dilation, 1)).shape[2]
        except RuntimeError:
            assert pixels < 1
        else:
            assert pixels == expected


def test_shapes():
    y = F.conv2d(torch.empty(STRIDED.x_shape), torch.empty(STRIDED.w_shape), None, (2, 3), (1, 0), (1, 2), 12)
    assert STRIDED.y_shape == tuple(y.shape)
    assert (STRIDED.h_out, STRIDED.w_out, STRIDED.out_pixels) == (8, 4, 4 * 8 * 4)
    assert (STRIDED.cin_g, STRIDED.cout_g) == (2, 3)


def test_asymmetric_padding():
    problem = ConvProblem(1, 2, 6, 6, 2, 4, 4, pad=(1, 2, 0, 3))
    padded = F.pad(torch.empty(problem.x_shape), (0, 3, 1, 2))
    assert problem.y_shape == tuple(F.conv2d(padded, torch.empty(problem.w_shape)).shape)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_flops_are_those_of_torchs_counter(groups):
    problem = ConvProblem(4, 24, 15, 13, 36, 3, 2, (2, 3), (1, 1, 0, 0), (1, 2), groups)
    counter = FlopCounterMode(display=False)
    with counter:
        x, w = torch.empty(problem.x_shape), torch.empty(problem.w_shape)
        F.conv2d(x, w, None, problem.stride, (1, 0), problem.dilation, groups)
    assert {problem.flops(pass_) for pass_ in PASSES} == {counter.get_total_flops()}


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("tf32", 4), ("bf16x3", 4), ("fp16", 2), ("bf16", 2)])
def test_min_bytes(dtype, size):
    problem = ConvProblem(2, 8, 5, 5, 12, 3, 3, groups=4, dtype=dtype)
    elements = 2 * 8 * 5 * 5 + 12 * 2 * 3 * 3 + 2 * 12 * 3 * 3
    for pass_ in PASSES:
        assert problem.min_bytes(pass_) == elements * size
        assert problem.intensity(pass_) == problem.flops(pass_) / (elements * size)
    assert problem.params == 12 * 2 * 3 * 3


def test_gemm_has_the_flops():
    """Groups times 2 M N K, exactly; for dgrad where every pixel of x meets every tap."""
    for pass_ in ("fprop", "wgrad"):
        assert 2 * STRIDED.groups * math.prod(STRIDED.gemm(pass_)) == STRIDED.flops(pass_)
    same = ConvProblem(2, 8, 7, 6, 12, 3, 5, pad=(1, 1, 2, 2), groups=4)
    for pass_ in PASSES:
        assert 2 * same.groups * math.prod(same.gemm(pass_)) == same.flops(pass_)
    assert STRIDED.gemm("dgrad")[:2] == (4 * 15 * 13, 2)


def test_empty_batch():
    problem = ConvProblem(0, 4, 5, 5, 4, 3, 3)
    assert problem.y_shape == (0, 4, 3, 3)
    assert [problem.flops(pass_) for pass_ in PASSES] == [0, 0, 0]
    assert problem.config_key("wgrad")["m_bucket"] == 1


def test_config_key():
    assert STRIDED.config_key("dgrad") == {
        "pass": "dgrad",
        "dtype": "fp16",
        "layout": "nhwc",
        "cin_g": 2,
        "cout_g": 3,
        "k": [3, 2],
        "stride": [2, 3],
        "dilation": [1, 2],
        "groups_bucket": 16,
        "m_bucket": 128,
        "map_bucket": 32,
    }
    assert tuple(STRIDED.config_key("fprop")) == configs.KEY_FIELDS


def test_str():
    assert str(STRIDED) == "n4-g12-c2x3-h15x13-k3x2-s2x3-p1x0-d1x2-fp16-nhwc"
    asymmetric = ConvProblem(1, 2, 6, 6, 2, 4, 4, pad=(1, 2, 0, 3), dtype="tf32", layout="nchw")
    assert str(asymmetric) == "n1-g1-c2x2-h6x6-k4x4-s1x1-p1:2x0:3-d1x1-tf32-nchw"
