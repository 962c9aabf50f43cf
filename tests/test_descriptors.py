"""Tensor descriptors: who gets them, what they are made of, and when an operand has to be copied first."""

import cases
import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from groupconv import devices, explain, launcher, triton_conv
from groupconv.algorithms import row_block_tma
from groupconv.problem import ConvProblem, dense_strides


def explained(target, layout=torch.channels_last, width=128, **arguments):
    """The plan of a 3x3 layer of 4 groups, of CUDA tensors that are not there."""
    with FakeTensorMode():
        x = torch.empty(128, 4 * width, 14, 14, dtype=torch.bfloat16, device="cuda").to(memory_format=layout)
        w = torch.empty(4 * width, width, 3, 3, dtype=torch.bfloat16, device="cuda")
        return explain(x, w, padding=1, groups=4, target=target, **arguments)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_wide_groups_are_planned_with_descriptors(target):
    found = explained(target, backend="triton:row_block_tma")
    assert {plan.algorithm for plan in found.passes} == {"row_block_tma"}
    assert found.backward is None
    assert "dgrad: row_block_tma [modelled] BLOCK_R=" in str(found)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "gfx942"])
def test_others_have_pointers(target):
    assert "row_block_tma" not in {plan.algorithm for plan in explained(target, backend="triton").passes}
    with pytest.raises(NotImplementedError, match=f"{target} has no tensor descriptors"):
        explained(target, backend="triton:row_block_tma")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layout": torch.contiguous_format}, "descriptors need channels_last"),
        ({"width": 12}, "groups of 12 and 12 channels do not begin at multiples of 16 bytes"),
    ],
)
def test_refusals_say_why(changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        explained("sm_90", backend="triton:row_block_tma", **changes)


def test_fp32_has_none():
    problem = ConvProblem(8, 64, 8, 8, 64, 3, 3, pad=(1, 1, 1, 1), groups=2, dtype="tf32")
    assert "tf32: descriptors are for fp16 and bf16" in str(
        row_block_tma.supports(problem, "fprop", devices.named("sm_90"))
    )


def test_a_view_is_what_triton_takes(monkeypatch):
    """Triton's launcher encodes a view as it does a descriptor of its own class."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    taken = []

    class Utils:
        @staticmethod
        def fill_tma_descriptor_tiled(*arguments):
            taken.append(arguments)
            return "map"

    class Driver:
        utils = Utils

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver)
    tensor = torch.empty(64, dtype=torch.bfloat16)
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 16], "fp4_padded": False}
    view = launcher.View((4, 16), (16, 1), (1, 16), 2)
    made = driver.make_tensordesc_arg(view.of(tensor), meta)
    assert made == ["map", 4, 16, 16, 1]
    again = triton.tools.tensor_descriptor.TensorDescriptor(tensor, [4, 16], [16, 1], [1, 16])
    assert driver.make_tensordesc_arg(again, meta) == made
    assert taken[0] == taken[1]
    assert isinstance(view.of(tensor), type(again))


@pytest.fixture
def copies(monkeypatch):
    """What is allocated, which for an operand means that it is copied."""
    made, allocate = [], launcher.allocate
    monkeypatch.setattr(launcher, "allocate", lambda *a, **k: made.append(a) or allocate(*a, **k))
    return made


PROBLEM = ConvProblem(2, 32, 6, 6, 32, 3, 3, pad=(1, 1, 1, 1), groups=2)


@pytest.mark.parametrize(
    ("strides", "view_w", "copied"),
    [
        ((1152, 1, 192, 32), 1, False),  # dense
        ((2304, 1, 384, 64), 1, False),  # channels of a wider tensor
        ((2304, 1, 384, 64), 2, True),  # which phases of a stride cannot count on
        ((1152, 1, 192, 32), 2, False),
        ((1188, 1, 198, 33), 1, True),  # pixels that begin at no multiple of 16 bytes
        ((1152, 36, 6, 1), 1, True),  # contiguous
        ((0, 0, 0, 0), 1, True),  # expanded
    ],
)
def test_operands_are_copied_where_a_descriptor_cannot_see_them(strides, view_w, copied, copies):
    operand = row_block_tma._pixels(PROBLEM, PROBLEM.x_shape, strides, 16, 4, 16, view_w)
    found = operand.of(torch.zeros(4608, dtype=torch.bfloat16).as_strided(PROBLEM.x_shape, strides))
    assert bool(copies) is copied
    assert found.strides[0] == PROBLEM.cin_g
    assert found.shape == [2 * view_w, 6, 6 // view_w, 2, 16]


def test_operands_at_odd_addresses_are_copied(copies):
    strides = dense_strides(PROBLEM.x_shape, True)
    operand = row_block_tma._pixels(PROBLEM, PROBLEM.x_shape, strides, 16, 4, 16)
    memory = torch.arange(2400, dtype=torch.bfloat16)
    assert operand.of(memory[8:].as_strided(PROBLEM.x_shape, strides)).base.data_ptr() == memory[8:].data_ptr()
    assert not copies
    moved = operand.of(memory[1:].as_strided(PROBLEM.x_shape, strides)).base
    assert len(copies) == 1
    assert torch.equal(moved, memory[1:].as_strided(PROBLEM.x_shape, strides))


@pytest.mark.parametrize("view", ["nhwc", "nchw"])
def test_through_autograd(view, device):
    """From the public call, with a weight and a gradient in either format."""
    given = cases.operands(cases.Case(PROBLEM, w=view, dy=view), device)
    x, w, dy = (t.detach().requires_grad_() for t in (given.x, given.w, given.dy))
    with cases.guarded():
        y = triton_conv(x, w, padding=1, groups=2, backend="triton:row_block_tma")
        dx, dw = torch.autograd.grad(y, (x, w), dy)
    expected = cases.references(PROBLEM, given)
    for pass_, out in (("fprop", y), ("dgrad", dx), ("wgrad", dw)):
        assert cases.error(out, expected[pass_]) <= cases.bound("bf16", cases.terms(PROBLEM, pass_))
    assert dw.stride() == w.stride()
