"""Random attacks on the whole space of arguments; `make fuzz MINUTES=n` goes on with them for as long as it is told.

Each has a few examples here, the same every time.
"""

import contextlib
import dataclasses
import itertools
import math

import cases
import fuzz
import pytest
import torch
import torch.nn.functional as F
from fuzz import FITTING, fuzzed
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

import groupconv
from groupconv import eager, epilogue, prepared, triton_conv
from groupconv.activations import ACTIVATIONS
from groupconv.algorithms import NAMES, REGISTRY, candidates, divided, lack
from groupconv.problem import PASSES, ConvProblem

pytestmark = [
    pytest.mark.skipif(not cases.INTERPRETED, reason="operands are on the CPU, where kernels are interpreted"),
    pytest.mark.usefixtures("ieee", "few_programs"),
    pytest.mark.filterwarnings("ignore"),  # of what PyTorch thinks of the arguments
]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = ((1, 1), (1, 2), (2, 1), (3, 5), (4, 4), (7, 2), (8, 8), (8, 24), (16, 16), (13, 29), (24, 40))


# --- What is drawn ---------------------------------------------------------------------------------------------------

SMALL = st.sampled_from([1, 1, 2, 2, 3, 3, 4, 5])
KERNELS = (*[(3, 3)] * 8, (1, 1), (5, 5), (7, 7), (9, 2), (1, 11), *itertools.product(range(1, 6), repeat=2))
DILATIONS = st.just((1, 1)) | st.just((1, 1)) | st.tuples(st.integers(1, 3), st.integers(1, 4))
STRIDES = st.just((1, 1)) | st.just((2, 2)) | st.tuples(st.integers(1, 4), st.integers(1, 5))
VIEWS = st.sampled_from((*cases.VIEWS, "nhwc", "nchw"))
ANY_VIEW = VIEWS | st.just("expanded")


@st.composite
def problems(draw, widths=WIDTHS, dtypes=tuple(cases.MODES), kernels=KERNELS):
    """Small convolutions of every kind: the interpreter's time goes by the programs and their steps."""
    kernel, dilation, stride = draw(st.sampled_from(kernels)), draw(DILATIONS), draw(STRIDES)
    spans = [apart * (taps - 1) + 1 for taps, apart in zip(kernel, dilation, strict=True)]
    same = (spans[0] // 2, spans[0] // 2, spans[1] // 2, spans[1] // 2)
    sides = st.tuples(*(st.integers(0, min(4, span + 1)) for span in spans for _ in range(2)))
    pad = draw(st.just((0, 0, 0, 0)) | st.just(same) | sides)
    least = [max(1, spans[axis] - sum(pad[2 * axis : 2 * axis + 2])) for axis in range(2)]
    hw = [size + draw(st.integers(0, 4)) for size in least]
    (cin_g, cout_g), groups, batch = draw(st.sampled_from(widths)), draw(SMALL), draw(SMALL)
    if max(cin_g, cout_g) > 4 or max(*kernel) > 5:
        groups, batch = min(groups, 2), min(batch, 2)
    return ConvProblem(
        batch, groups * cin_g, *hw, groups * cout_g, *kernel, stride=stride, pad=pad, dilation=dilation, groups=groups,
        dtype=draw(st.sampled_from(dtypes)), bias=draw(st.booleans()),
    )  # fmt: skip


def values(shape, view, dtype, generator):
    """Random numbers that lie as `view` says; one number everywhere if "expanded"."""
    made = torch.randn(shape, generator=generator).to(dtype)
    if view == "expanded" and made.numel():
        return made.flatten()[0].expand(shape)
    return cases.lay_out(made, view) if len(shape) == 4 and view != "expanded" else made


@contextlib.contextmanager
def as_on_a_gpu():
    """`auto` takes kernels of ours for CPU tensors too."""
    modules, refusal = (eager, prepared, epilogue), prepared.refusal
    for module in modules:
        module.refusal = lambda x, backend: refusal(x, "triton" if backend == "auto" else backend)
    prepared.reset()
    try:
        yield
    finally:
        for module in modules:
            module.refusal = refusal
        prepared.reset()


# --- What is right ---------------------------------------------------------------------------------------------------


def exact(x, w, bias, pad, keywords):
    """The convolution by PyTorch, of any dtype."""
    top, bottom, left, right = pad
    return F.conv2d(F.pad(x, (left, right, top, bottom)), w, bias, **keywords | {"padding": 0})


def sizes(x, w, bias, pad, keywords, dy):
    """Norms of y, dx, dw and db if their terms had random signs: results of few elements may vanish by chance."""
    squared = [None if t is None else t.detach().double().square().requires_grad_() for t in (x, w, bias)]
    y = exact(*squared, pad, keywords)
    given = [t for t in squared if t is not None]
    grads = torch.autograd.grad(y, given, dy.detach().double().square().reshape(y.shape))
    return [t.detach().sum().sqrt().item() for t in (y, *grads)] + [0.0] * (bias is None)


def lengths(x, w, y, groups):
    """Of the reductions of y, dx, dw and the bias's gradient."""
    taps, pixels = math.prod(w.shape[2:]), y.numel() // w.shape[0]
    return w.shape[1] * taps, w.shape[0] // groups * taps, pixels, pixels


def bound(dtype, length, backend):
    """That of cases.py, for our kernels; on CPUs F.conv2d, which `auto` may take, rounds 16-bit sums more than once."""
    return cases.bound(dtype, length) * (2 if backend == "auto" and dtype != "fp32" else 1)


def distance(out, ref, size):
    """||out - ref|| over ||ref||, or over the size that it has but for chance."""
    assert out.shape == ref.shape
    return (out.double() - ref).norm().item() / (max(ref.norm().item(), size) or 1.0)


# --- Every algorithm that serves a problem, by any of its configurations ---------------------------------------------


@fuzzed(20)
def test_passes(data):
    """Right, inside its memory, and of no operand changed; whoever does not serve a problem says why."""
    draw = data.draw
    name = draw(st.sampled_from(NAMES))
    fitting = dict(FITTING.get(name, {}))
    x_views = st.just("nhwc") if fitting.pop("layouts", None) else VIEWS
    problem = draw(problems(**fitting))
    case = cases.Case(problem, draw(x_views), draw(VIEWS), draw(ANY_VIEW))
    problem = cases.actual(case)
    pass_ = draw(st.sampled_from((*PASSES, *cases.PRODUCES)))
    target = cases.machine("cpu", draw(st.sampled_from(["few", "many"])))
    why_not = {each: lack(each, problem, pass_, target) for each in NAMES}
    assert all(why is None or (isinstance(why, str) and why) for why in why_not.values())
    assert any(why is None for why in why_not.values()) or pass_ in cases.PRODUCES
    assume(why_not[name] is None)
    tiles = candidates(name, problem, pass_, target)
    ways = divided(name, problem, pass_, tiles[draw(st.integers(0, len(tiles) - 1))], target)
    config = ways[draw(st.integers(0, len(ways) - 1))]
    given = cases.operands(case, seed=draw(st.integers(0, 99)))
    operands = given.of(pass_)
    before = [None if t is None else t.clone() for t in operands]
    strides = given.strides(problem)
    with cases.guarded():
        out = REGISTRY[name].prepare(problem, pass_, config, target, strides)(*operands)
    expected = cases.references(problem, given)
    keywords = {"stride": problem.stride, "dilation": problem.dilation, "groups": problem.groups}
    norms = dict(zip(PASSES, sizes(given.x, given.w, given.bias, problem.pad, keywords, given.dy), strict=False))
    produced = cases.PRODUCES.get(pass_, (pass_,))
    for each, result in zip(produced, out if isinstance(out, tuple) else (out,), strict=True):
        assert result.stride() == strides[cases.RESULTS[each]]
        most = cases.bound(problem.dtype, cases.terms(problem, each))
        assert distance(result, expected[each], norms[each]) <= most
    for operand, kept in zip(operands, before, strict=True):
        assert operand is None or torch.equal(operand, kept)


# --- Calls, with every form of argument ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """A good call of triton_conv, and the padding of each side that it says; tensors lie as the views say."""

    problem: ConvProblem
    keywords: dict
    pad: tuple
    views: tuple
    unbatched: bool
    seed: int

    def tensors(self):
        """x, w and the bias or None."""
        p, generator = self.problem, torch.Generator().manual_seed(self.seed)
        shapes = p.x_shape, p.w_shape, (p.c_out,)
        x, w, bias = (values(*each, DTYPES[p.dtype], generator) for each in zip(shapes, self.views, strict=True))
        return [x[0] if self.unbatched else x, w, bias if p.bias else None]


@st.composite
def calls(draw):
    """Calls with every form of argument."""

    def form(pair):
        """As users write it."""
        return draw(st.sampled_from([tuple(pair), list(pair), *([pair[0]] if pair[0] == pair[1] else [])]))

    problem = draw(problems(dtypes=tuple(DTYPES)))
    if draw(st.integers(0, 19)) == 0:
        problem = dataclasses.replace(problem, batch=0)
    top, bottom, left, right = pad = problem.pad
    padding = list(pad)
    if draw(st.booleans()) and top >= bottom and left >= right:
        pad = (top, top, left, left)
        padding = "valid" if top == left == 0 and draw(st.booleans()) else form((top, left))
    elif problem.stride == (1, 1) and draw(st.booleans()):
        high, wide = (d * (k - 1) for d, k in zip(problem.dilation, (problem.kh, problem.kw), strict=True))
        pad, padding = (high // 2, high - high // 2, wide // 2, wide - wide // 2), "same"
    keywords = {"stride": form(problem.stride), "padding": padding, "dilation": form(problem.dilation)}
    keywords["groups"] = problem.groups
    views = draw(ANY_VIEW), draw(ANY_VIEW), draw(st.sampled_from(["nchw", "expanded"]))
    return Call(problem, keywords, pad, views, problem.batch == 1 and draw(st.booleans()), draw(st.integers(0, 99)))


def as_leaves(tensors, wanted, dtype=None):
    """The tensors where they lie, or, of another dtype, copied; those that are wanted to be derived by."""
    found = []
    for tensor, needed in zip(tensors, wanted, strict=True):
        leaf = None if tensor is None else tensor.detach().to(dtype or tensor.dtype)
        found.append(leaf if leaf is None else leaf.requires_grad_(needed))
    return found


@fuzzed(12)
def test_calls(data):
    """Values and the gradients that are asked for, beside float64; strides as F.conv2d's."""
    draw = data.draw
    call = draw(calls())
    dtype, tensors, keywords, pad = call.problem.dtype, call.tensors(), call.keywords, call.pad
    backend = draw(st.sampled_from(["auto", "triton", "triton:implicit_gemm"]))
    wanted = [t is not None and draw(st.booleans()) for t in tensors]
    leaves, doubles = as_leaves(tensors, wanted), as_leaves(tensors, wanted, torch.float64)
    x, w, _ = leaves
    dy_view = draw(ANY_VIEW)
    with as_on_a_gpu(), cases.guarded():
        y = triton_conv(*leaves, **keywords, backend=backend)
        dy = values(y.shape, dy_view, y.dtype, torch.Generator().manual_seed(1))
        grads = (
            torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], dy) if any(wanted) else ()
        )
    ref = exact(*doubles, pad, keywords)
    refs = [ref]
    if any(wanted):
        refs += torch.autograd.grad(ref, [t for t in doubles if t is not None and t.requires_grad], dy.double())
    assert y.requires_grad == any(wanted)
    if x.dim() == 4:
        assert y.stride() == cases.format_strides(y.shape, x, w)
    made = [True, *wanted]
    for norm, length, out, right in zip(
        (each for each, there in zip(sizes(*leaves, pad, keywords, dy), made, strict=True) if there),
        (each for each, there in zip(lengths(x, w, y, keywords["groups"]), made, strict=True) if there),
        (y, *grads), refs, strict=True,
    ):  # fmt: skip
        assert out.dtype == DTYPES[dtype]
        assert distance(out, right, norm) <= bound(dtype, length, backend)


@fuzzed(8)
def test_calls_that_are_finished(data):
    """Residual, activation and shuffle, and every gradient: hardly further from float64 than PyTorch's own are."""
    draw = data.draw
    call = draw(calls())
    dtype, tensors, keywords, pad = call.problem.dtype, call.tensors(), call.keywords, call.pad
    x, w, _ = tensors
    activation = draw(st.none() | st.sampled_from(sorted(ACTIVATIONS)))
    shuffle = draw(st.sampled_from([g for g in range(1, w.shape[0] + 1) if w.shape[0] % g == 0]))
    y_shape = exact(x.float(), w.float(), None, pad, keywords).shape
    generator = torch.Generator().manual_seed(2)
    tensors.append(values(y_shape, draw(ANY_VIEW), x.dtype, generator) if draw(st.booleans()) else None)
    dy = values(y_shape, draw(ANY_VIEW), x.dtype, generator)
    backend = draw(st.sampled_from(["auto", "triton"]))
    there = [t is not None for t in tensors]

    def chain(x, w, bias, residual):
        """What the activation is of, and the result."""
        v = exact(x, w, bias, pad, keywords)
        v = v if residual is None else v + residual
        y = v if activation is None else ACTIVATIONS[activation].of(v)
        return v, y if shuffle == 1 else F.channel_shuffle(y if y.dim() == 4 else y[None], shuffle).reshape(y.shape)

    def gradients(y, leaves, *more):
        given = [t for t in leaves if t is not None]
        return torch.autograd.grad(y, [*given, *more], dy.to(y.dtype))

    ours, theirs, right = as_leaves(tensors, there), as_leaves(tensors, there), as_leaves(tensors, there, torch.float64)
    extras = {"activation": activation, "residual": ours[3], "shuffle_groups": shuffle}
    with as_on_a_gpu(), cases.guarded():
        y = triton_conv(*ours[:3], **keywords, **extras, backend=backend)
        found = (y, *gradients(y, ours))
    _, y = chain(*theirs)
    native = (y, *gradients(y, theirs))
    v, y = chain(*right)
    *refs, dv = (y, *gradients(y, right, v))
    norms = [
        norm for norm, given in zip(sizes(*tensors[:3], pad, keywords, dv), (True, *there[:3]), strict=True) if given
    ]
    length = max(lengths(x, w, y, keywords["groups"]))
    for out, other, ref, norm in zip(found, native, refs, [*norms, 0.0][: len(refs)], strict=True):
        most = max(distance(other, ref, norm), 2 * cases.bound(dtype, length))
        assert distance(out, ref, norm) <= 1.5 * most


# --- Calls that are wrong --------------------------------------------------------------------------------------------

PAIRS = st.sampled_from(
    [1, 2, 0, -1, (1,), (1, 1), [2, 1], (1, 2, 1), (0, 1), (1, -1), (), 1.0, 1.5, "1", None, True, (1.0, 1), 2**40]
)
PADDINGS = PAIRS | st.sampled_from(["same", "valid", "full", "", (1, 0, 1), b"same"])
# Two numbers are the paddings of the two sides, which F.conv1d does not know.
LINE_PADDINGS = PADDINGS.filter(lambda padding: not isinstance(padding, (tuple, list)) or len(padding) != 2)
GROUPS = st.sampled_from([1, 2, 4, 3, 0, -2, 8, 2.0, "2", None, True, (2,), 2**40])
SHAPES = st.sampled_from([
    (2, 8, 5, 6), (8, 5, 6), (8, 5), (1, 2, 8, 5, 6), (0, 8, 5, 6), (2, 0, 5, 6), (2, 8, 0, 6), (2, 8, 1, 1),
    (2, 7, 5, 6), (),
])  # fmt: skip
FILTERS = st.sampled_from([
    (8, 4, 3, 3), (8, 4, 3), (4, 8, 3, 3), (0, 4, 3, 3), (8, 0, 3, 3), (8, 4, 0, 3), (8, 4, 9, 3), (6, 4, 1, 1),
    (7, 4, 3, 3), (8, 4, 3, 3, 1),
])  # fmt: skip
BIASES = st.sampled_from([(8,), (4,), (1,), (), (8, 1), (6,), (0,), (7,)])
OTHER_DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
ANY_DTYPE = st.sampled_from([torch.float32] * 6 + list(OTHER_DTYPES))
KINDS = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.float().to_sparse(),
    "list": lambda t: t.float().tolist(),
    "none": lambda t: None,
    "array": lambda t: t.float().numpy(),
    "derived": lambda t: t.requires_grad_(t.is_floating_point()),
    "conjugate": lambda t: t.conj(),
    "negated": torch._neg_view,
    "nested": lambda t: torch.nested.nested_tensor(list(t.float()) if t.dim() and len(t) else [t.float()]),
    "parameter": lambda t: nn.Parameter(t, requires_grad=t.is_floating_point()),
}
ANY_KIND = st.sampled_from([None] * 12 + list(KINDS))


def odd(shape, dtype, kind):
    """A tensor of small integers, or what somebody might pass for one."""
    made = (1.0 + torch.arange(math.prod(shape)).reshape(shape) % 3).to(dtype)
    return made if kind is None else KINDS[kind](made)


def outcome(call, *arguments, **keywords):
    """What a call returns or raises."""
    try:
        return call(*arguments, **keywords)
    except Exception as error:
        return error


def one_axis_less(shape):
    """Without the columns."""
    return shape[:2] + shape[3:]


# Arguments after the bias, by function: each's default, and what else is drawn.
ARGUMENTS = ((1, PAIRS), (0, PADDINGS), (1, PAIRS), (1, GROUPS))
LINE_ARGUMENTS = ((1, PAIRS), (0, LINE_PADDINGS), (1, PAIRS), (1, GROUPS))
TRANSPOSED_ARGUMENTS = ((1, PAIRS), (0, PADDINGS), (0, PAIRS), (1, GROUPS), (1, PAIRS))
FUNCTIONS = {
    F.conv2d: (triton_conv, ARGUMENTS), F.conv1d: (groupconv.conv1d, LINE_ARGUMENTS),
    F.conv_transpose2d: (groupconv.conv_transpose2d, TRANSPOSED_ARGUMENTS),
    F.conv_transpose1d: (groupconv.conv_transpose1d, TRANSPOSED_ARGUMENTS),
}  # fmt: skip


@fuzzed(300)
def test_bad_calls(data):
    """The exception of PyTorch's function, by type and message, and its result where it has one."""
    draw = data.draw
    of_torch = draw(st.sampled_from([F.conv2d, *FUNCTIONS]))
    ours, choices = FUNCTIONS[of_torch]
    dtype = draw(ANY_DTYPE)
    mostly = st.sampled_from([dtype] * 8) | ANY_DTYPE
    shapes = [draw(SHAPES), draw(FILTERS)]
    if "1d" in of_torch.__name__:
        shapes = [one_axis_less(shape) for shape in shapes]
    tensors = [odd(shape, draw(mostly), draw(ANY_KIND)) for shape in shapes]
    tensors.append(draw(st.none() | st.builds(odd, BIASES, mostly, ANY_KIND)))
    # By position: where a type is wrong, PyTorch's message says how each argument was passed.
    arguments = [draw(st.just(default) | of) for default, of in choices]
    backend = draw(st.sampled_from(["auto", "triton"]))
    expected = outcome(of_torch, *tensors, *arguments)
    with as_on_a_gpu():
        found = outcome(ours, *tensors, *arguments, backend=backend)
    if isinstance(found, NotImplementedError) and str(found).startswith(f"{ours.__name__}: backend={backend!r} cannot"):
        assert backend == "triton"
    elif isinstance(expected, Exception):
        assert isinstance(found, Exception), f"PyTorch raises {expected!r}"
        assert (type(found), str(found)) == (type(expected), str(expected))
    else:
        assert not isinstance(found, Exception), found
        assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
        if not any(isinstance(t, torch.Tensor) and t.is_meta for t in tensors):  # of a meta bias PyTorch has no values
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-5)


# --- Between forward and backward ------------------------------------------------------------------------------------


def turned(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


PACKED = {
    "a copy": torch.clone,
    "channels_last": channels_last,
    "contiguous": torch.Tensor.contiguous,
    "negated": lambda t: torch._neg_view(-t),
    "turned": turned,
    "inside another": lambda t: F.pad(t, (3, 2), value=math.nan)[..., 3:-2],
    "in float64": torch.Tensor.double,
}
GRADIENTS = {
    "negated": lambda dy: torch._neg_view(-dy),
    "channels_last": channels_last,
    "turned": turned,
    "of zeros": torch.zeros_like,
    "lazy zeros": lambda dy: torch._efficientzerotensor(dy.shape, dtype=dy.dtype),
    "expanded": lambda dy: dy[..., :1, :1].expand(dy.shape),
    "a parameter": nn.Parameter,
}
CHANGES = ("x in place", "w in place", "freed and filled again", "twice", "deleted")


@fuzzed(12)
def test_between_forward_and_backward(data):
    """What hooks hand back is read as it is, and no gradient is of what was changed in place."""
    draw = data.draw
    call = draw(calls())
    dtype, tensors, keywords, pad = call.problem.dtype, call.tensors(), call.keywords, call.pad
    packed, change = draw(st.none() | st.sampled_from(list(PACKED))), draw(st.none() | st.sampled_from(CHANGES))
    activation = draw(st.sampled_from([None, None, "silu", "relu"])) if dtype == "fp32" else None
    backend, view = draw(st.sampled_from(["auto", "triton"])), draw(st.none() | st.sampled_from(list(GRADIENTS)))
    wanted = [t is not None and draw(st.booleans()) for t in tensors]
    assume(any(wanted))
    if change in CHANGES[:3]:
        tensors = [None if t is None else t.clone() for t in tensors]
    ours, right = as_leaves(tensors, wanted), as_leaves(tensors, wanted, torch.float64)
    v = exact(*right, pad, keywords)
    y = v if activation is None else ACTIVATIONS[activation].of(v)
    dy = values(y.shape, "nchw", tensors[0].dtype, torch.Generator().manual_seed(4))
    dy = dy if view is None else GRADIENTS[view](dy)
    *refs, dv = torch.autograd.grad(y, [*(t for t in right if t is not None and t.requires_grad), v], dy.double())
    norms = sizes(*right, pad, keywords, dv)[1:]
    many = lengths(*tensors[:2], y, keywords["groups"])[1:]

    def step():
        """The gradients, each as often as it is asked for."""
        leaves = [t for t in ours if t is not None and t.requires_grad]
        hooks = contextlib.nullcontext()
        if packed is not None:
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t: (t.dtype, PACKED[packed](t.clone() if change in CHANGES[:2] else t)),
                lambda kept: kept[1].to(kept[0]),
            )
        with hooks:
            y = triton_conv(*ours, **keywords, activation=activation, backend=backend)
        if change == "freed and filled again":
            for tensor in ours[:2]:
                storage = tensor.untyped_storage()
                copy, nbytes = storage.clone(), storage.nbytes()
                storage.resize_(0)
                storage.resize_(nbytes)
                storage.copy_(copy)
        if change in ("x in place", "w in place"):
            with torch.no_grad():
                ours[change.startswith("w")].mul_(2)
        if change == "deleted":
            ours.clear()
        with cases.guarded():
            found = list(torch.autograd.grad(y, leaves, dy, retain_graph=change == "twice"))
            return found + list(torch.autograd.grad(y, leaves, dy)) if change == "twice" else found

    with as_on_a_gpu():
        found = outcome(step)
    if isinstance(found, Exception):
        assert change is not None
        assert "in place" in change
        assert "modified by an inplace operation" in str(found)
        return
    limits = [(norm, bound(dtype, length, backend)) for norm, length in zip(norms, many, strict=True)]
    limits = [each for each, needed in zip(limits, wanted, strict=True) if needed]
    times = len(found) // len(refs)
    for out, ref, (norm, most) in zip(found, refs * times, limits * times, strict=True):
        assert distance(out, ref, norm) <= (1 if activation is None else 4) * most


# --- Other derivatives, and torch.func -------------------------------------------------------------------------------


def second_by_autograd(f, x, w, dx, dw, dy):
    x, w = (t.detach().requires_grad_() for t in (x, w))
    (found,) = torch.autograd.grad(f(x, w), x, dy, create_graph=True)
    return torch.autograd.grad(found, w, dx)[0]


def checkpointed(f, x, w, dx, dw, dy):
    x, w = (t.detach().requires_grad_() for t in (x, w))
    y = torch.utils.checkpoint.checkpoint(f, x, w, use_reentrant=False)
    return torch.cat([t.flatten() for t in torch.autograd.grad(y, (x, w), dy)])


def paired(*tensors):
    return torch.stack(tensors)


# Of f(x, w), and more tensors like x, w and the result: linear in each, so that all is positive of what is.
TRANSFORMS = {
    "forward mode": lambda f, x, w, dx, dw, dy: torch.func.jvp(f, (x, w), (dx, dw))[1],
    "vmap over x": lambda f, x, w, dx, dw, dy: torch.vmap(f, (0, None))(paired(x, dx), w),
    "vmap over w": lambda f, x, w, dx, dw, dy: torch.vmap(f, (None, 0))(x, paired(w, dw)),
    "vmap over both": lambda f, x, w, dx, dw, dy: torch.vmap(f, (1, 0), 1)(
        paired(x, dx).transpose(0, 1), paired(w, dw)
    ),
    "vmap of a gradient": lambda f, x, w, dx, dw, dy: torch.vmap(
        torch.func.grad(lambda w, x: (f(x, w) * dy).sum()), (None, 0)
    )(w, paired(x, dx)),
    "forward mode of a gradient": lambda f, x, w, dx, dw, dy: torch.func.jvp(
        lambda x: torch.func.grad(lambda w: (f(x, w) * dy).sum())(w), (x,), (dx,)
    )[1],
    "second derivative": lambda f, x, w, dx, dw, dy: torch.func.grad(
        lambda w: (torch.func.grad(lambda x: (f(x, w) * dy).sum())(x) * dx).sum()
    )(w),
    "second by autograd": second_by_autograd,
    "checkpointed": checkpointed,
}


@fuzzed(6)
def test_transforms(data):
    """What torch.func, forward mode and second derivatives make of calls is what they make of F.conv2d in float64."""
    draw = data.draw
    call, name = draw(calls()), draw(st.sampled_from(list(TRANSFORMS)))
    backend = draw(st.sampled_from(["auto", "triton"]))
    # PyTorch has no forward mode of tensors whose elements share memory.
    x, w, bias = (None if t is None else t.float().clone() for t in call.tensors())
    y = exact(x, w, bias, call.pad, call.keywords)
    generator = torch.Generator().manual_seed(5)
    given = [x, w, *(values(t.shape, draw(VIEWS), torch.float32, generator) for t in (x, w, y))]
    with as_on_a_gpu():
        ours = lambda x, w: triton_conv(x, w, bias, **call.keywords, backend=backend)  # noqa: E731
        found = TRANSFORMS[name](ours, *given)

    def right(bias, *tensors):
        return TRANSFORMS[name](lambda x, w: exact(x, w, bias, call.pad, call.keywords), *tensors)

    doubles = [None if t is None else t.double() for t in (bias, *given)]
    ref, largest = right(*doubles), right(*(None if t is None else t.abs() for t in doubles))
    length = sum(lengths(x, w, y, call.keywords["groups"]))
    assert found.dtype == torch.float32
    assert distance(found, ref, largest.norm().item()) <= cases.bound("fp32", length)


# --- Layers ----------------------------------------------------------------------------------------------------------


@st.composite
def layers(draw):
    """(name, arguments, keywords) of a layer, most of which there can be."""
    name = draw(st.sampled_from(["Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"]))
    axes, groups = int(name[-2]), draw(st.sampled_from([2, 3, 4]))

    def sizes(least, most):
        return draw(st.integers(least, most) | st.tuples(*[st.integers(least, most)] * axes))

    keywords = {
        "kernel_size": sizes(1, 4), "stride": sizes(1, 3), "dilation": sizes(1, 2), "groups": groups,
        "bias": draw(st.booleans()), "padding": sizes(0, 2),
    }  # fmt: skip
    if "Transpose" in name:
        keywords["output_padding"] = sizes(0, 1)
    else:
        keywords["padding_mode"] = draw(st.sampled_from(["zeros"] * 3 + ["reflect", "replicate", "circular"]))
        if keywords["stride"] in (1, (1,) * axes):
            keywords["padding"] = draw(st.just(keywords["padding"]) | st.sampled_from(["same", "valid"]))
    return name, (groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))), keywords


@fuzzed(10)
def test_layers(data):
    """Ours, and torch.nn's that are converted, beside torch.nn's in float64; their state dicts are each other's."""
    draw = data.draw
    name, channels, keywords = draw(layers())
    axes = int(name[-2])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(2, channels[0], *(draw(st.integers(6, 9)) for _ in range(axes)), generator=generator)
    x = {
        "dense": lambda: x, "one": lambda: x[0], "last": lambda: x.movedim(1, -1).contiguous().movedim(-1, 1),
        "sliced": lambda: F.pad(x, (1, 2), value=math.nan)[..., 1:-2],
    }[draw(st.sampled_from(["dense", "one", "last", "sliced"]))]()  # fmt: skip
    torch.manual_seed(0)
    native = getattr(nn, name)(*channels, **keywords)
    ours = getattr(groupconv, name)(*channels, **keywords)
    ours.load_state_dict(native.state_dict())
    converted = groupconv.convert(getattr(nn, name)(*channels, **keywords))
    converted.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(native) == repr(converted)
    there = outcome(native, x)
    native.double()
    for layer in (ours, converted):
        given, right = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        with as_on_a_gpu():
            y = outcome(layer, given)
        if isinstance(there, Exception):
            assert (type(y), str(y)) == (type(there), str(there))
            continue
        expected = native(right)
        dy = torch.randn(expected.shape, generator=generator)
        with as_on_a_gpu():
            found = torch.autograd.grad(y, [given, *layer.parameters()], dy)
        refs = torch.autograd.grad(expected, [right, *native.parameters()], dy.double())
        for out, ref in zip((y, *found), (expected, *refs), strict=True):
            assert cases.error(out, ref) <= 4 * cases.bound("fp32", 400)


# --- The driver ------------------------------------------------------------------------------------------------------


def test_the_driver_says_how_to_run_a_failure_again(monkeypatch, tmp_path, capfd):
    planted = tmp_path / "test_planted.py"
    planted.write_text(
        "from fuzz import FITTING, fuzzed\nfrom hypothesis import strategies as st\n\n\n"
        "@fuzzed(50)\ndef test_planted(data):\n    assert data.draw(st.integers(0, 99)) < 7\n\n\n"
        "@fuzzed(5)\ndef test_harmless(data):\n    data.draw(st.integers())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(fuzz.TESTS))
    monkeypatch.setattr(fuzz, "FILES", {str(planted): "1"})
    command = ["--rounds", "1", "--times", "2", "--state", str(tmp_path / "state.json")]
    assert fuzz.main(command) == 1
    told = capfd.readouterr().out
    assert "planted, seed 0: 100 examples FAILED" in told
    assert "Draw 1: 7" in told
    assert "--attacks planted --seed 0 --times 2 --rounds 1" in told
    assert "harmless: 10 examples passed" in told
    assert fuzz.main([*command, "--attacks", "harmless"]) == 0
    told = capfd.readouterr().out
    assert "harmless, seed 1: 10 examples passed" in told
    assert "planted: 0 examples passed in all, rounds of seeds [0] failed" in told
