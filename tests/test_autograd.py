"""What autograd does with a call: tensors that come back as others, odd gradients, partial backward passes."""

import contextlib
import dataclasses
import functools
import itertools

import cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from groupconv import prepared, triton_conv

pytestmark = pytest.mark.usefixtures("ieee", "few_programs")
KWARGS = {"padding": 1, "groups": 4}


def random(*shape, seed=0, device="cpu", view="nchw"):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return cases.lay_out(values, view) if len(shape) == 4 else values


def operands(device, x_view="nchw", w_view="nchw"):
    x = random(2, 8, 7, 6, device=device, view=x_view)
    return x, random(8, 2, 3, 3, seed=1, device=device, view=w_view), random(8, seed=2, device=device)


def reference(x, w, bias, dy):
    """dx, dw and db in float64."""
    leaves = [t.detach().double().clone().requires_grad_() for t in (x, w, bias)]
    return torch.autograd.grad(F.conv2d(*leaves, **KWARGS), leaves, dy.double())


def close(out, expected):
    return cases.error(out, expected.to(out.device)) <= 1e-6


def check_gradients(y, leaves, as_dy=lambda dy: dy):
    """The gradients of y by x, w and bias against float64, of a random dy changed by `as_dy`."""
    dy = as_dy(random(*y.shape, seed=3, device=y.device))
    grads = torch.autograd.grad(y, leaves, dy)
    for grad, expected in zip(grads, reference(*leaves, dy.resolve_neg()), strict=True):
        assert close(grad, expected)


class Sub(torch.Tensor):
    """A subclass that changes nothing."""


def misaligned(t):
    """The tensor at an address that is a multiple of 4 bytes and no more."""
    buffer = t.new_full((t.numel() + 1,), float("nan"))[1:].view(t.shape)
    return buffer.copy_(t)


def negated(t):
    """The tensor, negated twice: once in memory, and lazily."""
    return torch._neg_view(-t)


# What a hook may give back in place of a tensor that it was given: other memory, equal values.
COMES_BACK = {
    "itself": lambda t: t,
    "a copy": torch.clone,
    "contiguous": lambda t: t.contiguous().clone(),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "a slice": lambda t: cases.lay_out(t, "slice"),
    "every second image": lambda t: cases.lay_out(t, "batches"),
    "misaligned": misaligned,
    "negated lazily": negated,
    "a subclass": lambda t: t.as_subclass(Sub),
    "a parameter": lambda t: torch.nn.Parameter(t),
    "double": torch.Tensor.double,
    "half": torch.Tensor.half,
    "cropped": lambda t: t[:, :, :-1],
    "flat": torch.flatten,
}
DY = {
    "dense": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "a slice": lambda t: cases.lay_out(t, "slice"),
    "misaligned": misaligned,
    "negated lazily": negated,
    "of a complex conjugate": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "expanded": lambda t: t[:1, :1, :1, :1].expand(t.shape),
    "a subclass": lambda t: t.as_subclass(Sub),
}


# --- Tensors that come back as others --------------------------------------------------------------------------------


@pytest.mark.parametrize(("x_view", "w_view"), [("slice", "nchw"), ("batches", "nhwc")])
def test_offloaded_activations(x_view, w_view, device):
    """save_on_cpu gives back contiguous tensors, whatever was saved."""
    leaves = [t.requires_grad_() for t in operands(device, x_view, w_view)]
    with save_on_cpu():
        y = triton_conv(*leaves, **KWARGS, backend="triton")
    check_gradients(y, leaves)


def test_memory_of_a_weight_exchanged_between_forward_and_backward(device):
    """Sharded training exchanges a parameter's memory under autograd's eyes: no version counts it."""
    leaves = [t.requires_grad_() for t in operands(device)]
    y = triton_conv(*leaves, **KWARGS, backend="triton")
    leaves[1].data = misaligned(leaves[1].detach().contiguous(memory_format=torch.channels_last))
    check_gradients(y, leaves)


def test_memory_of_a_weight_freed_between_forward_and_backward(device):
    """As sharded training does: gradients are right once it is back; before, PyTorch's exception says so."""
    leaves = x, w, bias = [t.requires_grad_() for t in operands(device)]
    values, storage = w.detach().clone(), w.untyped_storage()
    size = storage.nbytes()
    y = triton_conv(x, w, bias, **KWARGS, backend="triton")
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="not allocated"):
        torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    for backend in ("auto", "triton"):
        with pytest.raises(RuntimeError, match="not allocated"):
            triton_conv(x, w, bias, **KWARGS, backend=backend)
    storage.resize_(size)
    w.data.copy_(values)
    check_gradients(y, leaves)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A forward and a backward pass, with what happens in between."""

    x_view: str
    w_view: str
    bias: str
    need: tuple[str, ...]
    asked: tuple[str, ...]
    x_back: str
    w_back: str
    dy: str
    between: str
    create_graph: bool

    def play(self, conv):
        """(gradients that were asked for or None where F.conv2d has none, or the exception's type)."""
        x, w, bias = operands("cpu", self.x_view, self.w_view)
        bias = {"none": None, "dense": bias, "strided": torch.stack((bias, bias), 1)[:, 0]}[self.bias]
        tensors = {"x": x, "w": w, "bias": bias}
        leaves = {name: tensors[name].requires_grad_() for name in self.need}

        def unpack(t):
            if t.dim() != 4:
                return t
            return COMES_BACK[self.x_back if t.shape == x.shape else self.w_back](t)

        try:
            # Where hooks are, nothing counts the versions of what is saved.
            odd = (self.x_back, self.w_back) != ("itself", "itself")
            with saved_tensors_hooks(lambda t: t, unpack) if odd else contextlib.nullcontext():
                y = conv(x, w, bias, **KWARGS)
            if self.between == "x written":
                with torch.no_grad():
                    x.add_(1.0)
            elif self.between == "w written":
                with torch.no_grad():
                    w.mul_(2.0)
            elif self.between == "w exchanged":
                w.data = w.detach().clone(memory_format=torch.channels_last)
            elif self.between == "x no longer needed":
                x.requires_grad_(False)
            dy = DY[self.dy](random(*y.shape, seed=3))
            if self.asked == ():
                y.backward(dy, create_graph=self.create_graph)
                return [leaves[name].grad for name in self.need]
            return list(
                torch.autograd.grad(
                    y, [leaves[name] for name in self.asked], dy, create_graph=self.create_graph, allow_unused=True
                )
            )
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return type(error)


SUBSETS = [subset for n in (1, 2, 3) for subset in itertools.combinations(("x", "w", "bias"), n)]


@st.composite
def scenes(draw):
    """Mostly ordinary scenes, each odd in a few ways."""

    def some(choices, usual):
        return draw(st.one_of(st.just(usual), st.sampled_from(list(choices))))

    bias = some(("none", "dense", "strided"), "dense")
    need = draw(st.sampled_from([s for s in SUBSETS if bias != "none" or "bias" not in s]))
    asked = draw(st.sampled_from([(), *(s for s in SUBSETS if set(s) <= set(need))]))
    return Scene(
        some(("nchw", "nhwc", "slice", "batches", "permuted"), "nchw"), some(("nchw", "nhwc", "slice"), "nchw"), bias,
        need, asked, some(COMES_BACK, "itself"), some(COMES_BACK, "itself"), some(DY, "dense"),
        some(("x written", "w written", "w exchanged", "x no longer needed"), ""), draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), phases=set(Phase) - {Phase.shrink})
@given(scenes())
@example(Scene("nchw", "nchw", "dense", ("x", "bias"), ("bias",), "itself", "flat", "dense", "", False))
def test_any_tensors_between_forward_and_backward(scene):
    """Ours equals F.conv2d, or raises what it raises; where only F.conv2d raises, ours is right all the same."""
    expected = scene.play(F.conv2d)
    outcome = scene.play(functools.partial(triton_conv, backend="triton"))
    if isinstance(expected, type) and not isinstance(outcome, type):
        # F.conv2d minds operands that the gradients asked for do not read: x where dw is not, w where dx is not.
        asked = scene.asked or scene.need
        unread = {back: "a copy" for back, grad in (("x_back", "w"), ("w_back", "x")) if grad not in asked}
        hooked = scene.x_back != "itself" or scene.w_back != "itself"
        expected = dataclasses.replace(scene, **(unread if hooked else {"between": ""})).play(F.conv2d)
    if isinstance(expected, type) or isinstance(outcome, type):
        assert outcome is expected
        return
    for ours, theirs in zip(outcome, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            assert cases.error(ours.detach(), theirs.detach().double()) <= 1e-5


# --- Gradients of every kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dy_is", DY)
def test_incoming_gradients(dy_is, device):
    leaves = [t.requires_grad_() for t in operands(device)]
    check_gradients(triton_conv(*leaves, **KWARGS, backend="triton"), leaves, DY[dy_is])


@pytest.mark.parametrize("operand", ["x", "w", "bias"])
def test_operands_negated_lazily(operand, device):
    tensors = dict(zip(("x", "w", "bias"), operands(device), strict=True))
    expected = F.conv2d(*(t.double() for t in tensors.values()), **KWARGS)
    tensors[operand] = negated(tensors[operand])
    assert tensors[operand].is_neg()
    with torch.no_grad():
        assert close(triton_conv(*tensors.values(), **KWARGS, backend="triton"), expected)
    tensors[operand].requires_grad_()
    assert close(triton_conv(*tensors.values(), **KWARGS, backend="triton"), expected)


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_batched_gradients(how, device):
    x, w, bias = (t.requires_grad_() for t in operands(device))
    y = triton_conv(x, w, bias, **KWARGS, backend="triton")
    dys = random(3, *y.shape, seed=3, device=device)
    if how == "vmap":
        found = torch.func.vmap(lambda dy: torch.autograd.grad(y, (x, w, bias), dy, retain_graph=True))(dys)
    else:
        found = torch.autograd.grad(y, (x, w, bias), dys, is_grads_batched=True)
    for i, dy in enumerate(dys):
        for ours, expected in zip(found, reference(x, w, bias, dy), strict=True):
            assert close(ours[i], expected)


@pytest.mark.parametrize("derivative", ["jacobian", "hessian"])
def test_vectorized_derivatives(derivative, device):
    x, w, _ = operands(device)
    x = x[:1, :, :2, :2].contiguous()

    def matrix(conv, x, w):
        def value(x):
            y = conv(x, w, **KWARGS)
            return y if derivative == "jacobian" else y.pow(2).sum()

        return getattr(torch.autograd.functional, derivative)(value, x, vectorize=True)

    ours = matrix(functools.partial(triton_conv, backend="triton"), x, w)
    assert close(ours, matrix(F.conv2d, x.double(), w.double()))


# --- What is asked for -----------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """The passes that are launched, in their order."""
    seen = []
    prepare = prepared.Call._prepare

    def spied(self, pass_, *plan):
        run = prepare(self, pass_, *plan)
        return lambda *tensors: (seen.append(pass_), run(*tensors))[1]

    monkeypatch.setattr(prepared.Call, "_prepare", spied)
    prepared.reset()
    yield seen
    prepared.reset()


def pinned(x, w, bias=None):
    return triton_conv(x, w, bias, **KWARGS, backend="triton:implicit_gemm")


@pytest.mark.parametrize(
    ("asked", "passes"), [("x", ["dgrad"]), ("w", ["wgrad"]), ("xw", ["dgrad", "wgrad"]), ("b", [])]
)
@pytest.mark.parametrize("leaves", [True, False])
def test_only_what_is_asked_for_is_computed(asked, passes, leaves, launched, device):
    tensors = dict(zip("xwb", (t.requires_grad_() for t in operands(device)), strict=True))
    if not leaves:
        tensors = {name: t * 1 for name, t in tensors.items()}
    y = pinned(*tensors.values())
    launched.clear()
    dy = random(*y.shape, seed=3, device=device)
    found = torch.autograd.grad(y, [tensors[name] for name in asked], dy, retain_graph=True)
    assert launched == passes
    expected = dict(zip("xwb", reference(*tensors.values(), dy), strict=True))
    for name, grad in zip(asked, found, strict=True):
        assert close(grad, expected[name])
    launched.clear()
    y.backward(dy, inputs=[tensors[name] for name in asked])
    assert launched == passes


def test_all_is_computed_for_backward_without_inputs(launched, device):
    """With hooks on tensors and on gradients' accumulation, twice on one graph, into two outputs."""
    x, w, bias = (t.requires_grad_() for t in operands(device))
    seen = []
    for t in (x, w, bias):
        t.register_hook(lambda grad: seen.append(grad.shape))
        t.register_post_accumulate_grad_hook(lambda t: seen.append(None))
    y = pinned(x, w, bias)
    other = pinned(x, w)
    dy = random(*y.shape, seed=3, device=device)
    launched.clear()
    torch.autograd.backward((y, other), (dy, dy), retain_graph=True)
    assert sorted(launched) == ["dgrad"] * 2 + ["wgrad"] * 2
    assert len(seen) == 6
    y.backward(dy)
    for t, expected, times in zip((x, w, bias), reference(x, w, bias, dy), (3, 3, 2), strict=True):
        assert close(t.grad, times * expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, device):
    leaves = [t.requires_grad_() for t in operands(device, "nhwc")]
    y = checkpoint(pinned, *leaves, use_reentrant=use_reentrant)
    dy = random(*y.shape, seed=3, device=device)
    y.backward(dy)  # re-entrant, it refuses autograd.grad
    for leaf, expected in zip(leaves, reference(*leaves, dy), strict=True):
        assert close(leaf.grad, expected)


def test_distributed_data_parallel(tmp_path):
    """The reducer's hooks get every gradient, with parameters that a step leaves unused too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        block = cases.Bottleneck(8, 8, 4, "triton")
        parallel = torch.nn.parallel.DistributedDataParallel(block, find_unused_parameters=True)
        x = random(2, 8, 7, 6)
        expected = torch.autograd.grad(block(x).sum(), list(block.parameters()))
        parallel(x).sum().backward()
        for parameter, grad in zip(block.parameters(), expected, strict=True):
            assert close(parameter.grad, grad.double())
    finally:
        torch.distributed.destroy_process_group()


def test_a_mode_round_the_backward_pass_sees_it(device):
    """As it sees F.conv2d's: a mode that counts, logs or changes what operators do."""
    x, w, bias = (t.requires_grad_() for t in operands(device))
    y = pinned(x, w, bias)
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Log():
        y.sum().backward()
    assert "groupconv.conv2d_backward.default" in seen


# --- The operators, called with anything -----------------------------------------------------------------------------


MISFITS = {
    "x of half precision": {"x": torch.Tensor.half},
    "w of too few channels": {"w": lambda w: w[:, :1]},
    "w of three axes": {"w": lambda w: w[0]},
    "dy of double precision": {"dy": torch.Tensor.double},
    "dy of too few rows": {"dy": lambda dy: dy[:, :, 1:]},
    "dy of too few channels": {"dy": lambda dy: dy[:, :4]},
    "groups that divide nothing": {"groups": lambda groups: 3},
    "no stride": {"stride": lambda stride: (0, 1)},
    "negative padding": {"padding": lambda padding: (-1, -1, 0, 0)},
}


@pytest.mark.parametrize("change", MISFITS)
def test_operators_check_what_they_are_given(change, device):
    """No kernel runs on operands that do not fit together; PyTorch's own words say so."""
    x, w, _ = operands(device)
    given = {
        "dy": random(2, 8, 7, 6, seed=3, device=device), "x": x, "w": w, "stride": (1, 1), "padding": (1,) * 4,
        "dilation": (1, 1), "groups": 4,
    }  # fmt: skip
    given |= {name: make(given[name]) for name, make in MISFITS[change].items()}
    dy, x, w, *args = given.values()
    with pytest.raises(RuntimeError):
        torch.ops.groupconv.conv2d_backward(dy, x, w, *args, [True, True, True], "triton")
    if "dy" not in MISFITS[change]:
        with pytest.raises(RuntimeError):
            torch.ops.groupconv.conv2d(x, w, None, *args, "triton")
