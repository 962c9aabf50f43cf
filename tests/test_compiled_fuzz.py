"""A random attack on compiled kernels: any algorithm's, by any of its configurations, on the software GPU.

Runs with TRITON_INTERPRET=0 (`make test-compiled`); `make fuzz MINUTES=n` goes on with it.
"""

import dataclasses
import math

import compiled_code
import pytest
import softgpu
from fuzz import FITTING, fuzzed
from hypothesis import assume
from hypothesis import strategies as st

from groupconv import devices
from groupconv.activations import ACTIVATIONS
from groupconv.algorithms import NAMES, candidates, divided, lack
from groupconv.problem import FINISHED, LAYOUTS, PLANNED, ConvProblem

needs_a_compiler = pytest.mark.skipif(
    softgpu.compiler() is None, reason="no C compiler: neither $CC nor cc nor gcc; the software GPU is in C"
)
DTYPES = ("bf16", "fp16", "tf32", "fp32", "bf16x3")
WIDTHS = ((1, 1), (1, 2), (2, 4), (3, 5), (4, 4), (8, 8), (8, 24), (16, 16), (24, 40), (40, 16), (64, 64))

KERNELS = ((3, 3), (3, 3), (1, 1), (5, 5), (7, 7), (2, 3), (1, 5), (9, 4))
FEWEST = 32  # elements of each tensor


@st.composite
def problems(draw, widths=WIDTHS, dtypes=DTYPES, kernels=KERNELS, layouts=LAYOUTS):
    """Small convolutions with a few images and groups, most of them of even and friendly sizes."""
    kernel = draw(st.sampled_from(kernels))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 2), (1, 3)]))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1), (3, 2)]))
    spans = [apart * (taps - 1) + 1 for taps, apart in zip(kernel, dilation, strict=True)]
    same = (spans[0] // 2, spans[0] // 2, spans[1] // 2, spans[1] // 2)
    pad = draw(st.just(same) | st.just((0, 0, 0, 0)) | st.tuples(*[st.integers(0, 3)] * 4))
    hw = [max(1, span - sum(pad[2 * i : 2 * i + 2])) + draw(st.integers(0, 9)) for i, span in enumerate(spans)]
    cin_g, cout_g = draw(st.sampled_from(widths))
    groups = draw(st.integers(1, 20) if max(cin_g, cout_g) <= 4 else st.integers(1, 3))
    layout = draw(st.sampled_from(layouts))
    return ConvProblem(
        draw(st.integers(1, 3)), groups * cin_g, *hw, groups * cout_g, *kernel, stride=stride, pad=pad,
        dilation=dilation, groups=groups, dtype=draw(st.sampled_from(dtypes)), layout=layout, out_layout=layout,
        bias=draw(st.booleans()),
    )  # fmt: skip


@needs_a_compiler
@fuzzed(20)
def test_compiled(data):
    """No fault, and the numbers of float64."""
    draw = data.draw
    algorithm, target = draw(st.sampled_from(NAMES)), draw(st.sampled_from(compiled_code.TARGETS))
    problem, pass_ = draw(problems(**FITTING.get(algorithm, {}))), draw(st.sampled_from((*PLANNED, FINISHED)))
    if pass_ == FINISHED:
        activation, keeps = draw(st.sampled_from(sorted(ACTIVATIONS))), draw(st.booleans())
        problem, pass_ = dataclasses.replace(problem, activation=activation, residual=True, keeps=keeps), "fprop"
    on = devices.named(target)
    assume(lack(algorithm, problem, pass_, on) is None)
    # Of few elements the norm may be nearly zero by chance.
    assume(min(map(math.prod, (problem.x_shape, problem.w_shape, problem.y_shape))) >= FEWEST)
    tiles = candidates(algorithm, problem, pass_, on)
    ways = divided(algorithm, problem, pass_, tiles[draw(st.integers(0, len(tiles) - 1))], on)
    config = ways[draw(st.integers(0, len(ways) - 1))]
    errors, _ = compiled_code.run_pass(problem, pass_, algorithm, config, target, varied=draw(st.booleans()))
    assert max(errors.values()) <= 1
