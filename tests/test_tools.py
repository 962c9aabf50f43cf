"""PyTorch's tools around a model that calls us: FLOP counters, function overrides, tracers, exporters, quantization."""

import contextlib
import copy
import functools
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._decomp import decomposition_table
from torch._subclasses import FakeTensorMode
from torch.ao import quantization
from torch.fx.experimental import optimization
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import groupconv
from groupconv import call, convert, explain, revert, triton_conv

pytestmark = [pytest.mark.usefixtures("few_programs"), pytest.mark.filterwarnings("ignore:Using padding='same'")]
by_kernels = functools.partial(triton_conv, backend="triton")


def operands(device="cpu", groups=4):
    """x, w and bias of a convolution with an even kernel."""
    torch.manual_seed(0)
    return [torch.randn(shape, device=device) for shape in ((2, 8, 7, 6), (12, 8 // groups, 4, 2), (12,))]


# --- FLOP counters ---------------------------------------------------------------------------------------------------

FORMS = [
    ((False, False, False), {}),
    ((True, True, True), {"padding": "same"}),
    ((False, True, True), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    ((True, False, False), {"padding": "valid"}),
]


def first_order(conv, tensors, mask, **keywords):
    """FLOPs of a call and of the gradients that the mask names."""
    tensors = [t.requires_grad_(needed) for t, needed in zip(tensors, mask, strict=True)]
    with FlopCounterMode(display=False) as forward:
        y = conv(*tensors, **keywords)
    with FlopCounterMode(display=False) as both:
        y = conv(*tensors, **keywords)
        if y.requires_grad:
            torch.autograd.grad(y, [t for t in tensors if t.requires_grad], torch.ones_like(y))
    return forward.get_total_flops(), both.get_total_flops()


@pytest.mark.parametrize(("mask", "keywords"), FORMS, ids=str)
def test_flops(keywords, mask, device):
    forward, both = first_order(by_kernels, operands(device), mask, groups=4, **keywords)
    assert (forward, both) == first_order(F.conv2d, operands(device), mask, groups=4, **keywords)
    assert forward > 0
    assert (both > forward) == any(mask[:2])


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_flops_of_compiled_code(compiler, device):
    """Under a dispatch mode PyTorch runs compiled functions as they were written, unless they must be one graph."""

    def compiled(conv):
        torch._dynamo.reset()
        return torch.compile(lambda *t: conv(*t, groups=4, padding="same"), backend=compiler)

    mask = (True, True, True)
    counted = first_order(compiled(by_kernels), operands(device), mask)
    assert counted == first_order(compiled(F.conv2d), operands(device), mask)
    assert counted == first_order(F.conv2d, operands(device), mask, groups=4, padding="same")


def second_order(conv, groups, device):
    """FLOPs of the gradients of a function of both gradients, by x, w and dy."""
    x, w, _ = (t.requires_grad_() for t in operands(device, groups))
    with FlopCounterMode(display=False) as counter:
        y = conv(x, w, groups=groups)
        dy = torch.ones_like(y, requires_grad=True)
        dx, dw = torch.autograd.grad(y, (x, w), dy, create_graph=True)
        before = counter.get_total_flops()
        torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, w, dy))
    return counter.get_total_flops() - before


def test_flops_of_second_derivatives(device):
    """Four convolutions. PyTorch's formula counts a gradient by w as if it had one group; its own second derivative
    has another convolution in its place, so that the figures are the same for one group alone.
    """
    assert second_order(by_kernels, 1, device) == second_order(F.conv2d, 1, device) > 0
    one = first_order(F.conv2d, operands(device), (False,) * 3, groups=4)[0]
    assert second_order(F.conv2d, 4, device) == 4 * one
    assert second_order(by_kernels, 4, device) == (3 + 4) * one


# --- Overrides of functions ------------------------------------------------------------------------------------------


class Default(torch.Tensor):
    """A subclass that overrides nothing."""


class Named(torch.Tensor):
    """A subclass that keeps the functions it is asked for, and knows one of them."""

    asked: list = []  # noqa: RUF012 shared on purpose

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (triton_conv, explain, F.conv2d):
            cls.asked.append(func)
        if func is triton_conv and args[0].dim() == 3:
            return "known"
        return super().__torch_function__(func, types, args, kwargs)


class Duck:
    """No tensor at all."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func, types, args, kwargs


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize(
    ("which", "backend"), [((0,), "triton"), ((1,), "auto"), ((2,), "triton"), ((0, 1, 2), "torch")]
)
def test_subclass_that_overrides_nothing(which, backend, device):
    """The result is of the type that F.conv2d's is, also where overrides are off, and its gradient too."""
    plain = operands(device)
    tensors = [t.as_subclass(Default) if i in which else t for i, t in enumerate(plain)]
    expected = F.conv2d(*tensors, groups=4)
    y = triton_conv(*tensors, groups=4, backend=backend)
    assert type(y) is type(expected) is Default
    torch.testing.assert_close(y.as_subclass(torch.Tensor), F.conv2d(*plain, groups=4))
    with torch._C.DisableTorchFunctionSubclass():
        assert type(triton_conv(*tensors, groups=4, backend=backend)) is type(F.conv2d(*tensors, groups=4))
    for t in tensors:
        t.requires_grad_()
    ours, native = (conv(*tensors, groups=4).square().sum() for conv in (triton_conv, F.conv2d))
    for out, ref in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(native, tensors), strict=True):
        assert type(out) is type(ref)
        torch.testing.assert_close(out, ref)


def test_subclass_hears_of_the_public_functions(device):
    x, w, bias = operands(device)
    Named.asked.clear()
    assert type(triton_conv(x, w.as_subclass(Named), bias, groups=4)) is Named
    assert triton_conv(x[0].as_subclass(Named), w, bias, groups=4) == "known"
    assert explain(x.as_subclass(Named), w, bias, groups=4).problem == explain(x, w, bias, groups=4).problem
    assert Named.asked == [triton_conv, triton_conv, explain]


def test_what_an_override_is_given(device):
    _, w, bias = operands(device)
    x = Duck()
    func, types, args, kwargs = triton_conv(x, w, bias, padding="same", groups=4, backend="triton")
    assert (func, types) == (triton_conv, (Duck, torch.Tensor))
    assert args[0] is x
    assert args[1] is w
    assert args[3:] == (1, "same", 1, 4)
    assert kwargs["backend"] == "triton"
    extras = {"activation": None, "residual": None, "shuffle_groups": 1}
    assert explain(x, w, target="sm_90")[3] == extras | {"backend": "auto", "target": "sm_90"}


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_function_mode(backend, device):
    tensors = operands(device)
    with Functions() as outer, Functions() as inner:
        y = triton_conv(*tensors, groups=4, backend=backend)
        explain(*tensors, groups=4)
    for mode in (outer, inner):
        assert mode.seen.count(triton_conv) == mode.seen.count(explain) == 1
    with torch.device("meta"):  # torch.set_default_device is a function mode of PyTorch's own
        same = triton_conv(*tensors, groups=4, backend=backend)
    for result in (y, same):
        torch.testing.assert_close(result, F.conv2d(*tensors, groups=4))


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize(
    ("kind", "backend"),
    [("plain", "auto"), *((kind, "triton") for kind in ("plain", "fake", "subclass", "in a mode", "mode inside"))],
)
def test_compiled_in_one_graph(kind, backend, device):
    torch._dynamo.reset()

    def conv(*tensors):
        if kind == "mode inside":
            with Functions():
                return triton_conv(*tensors, groups=4, backend=backend)
        return triton_conv(*tensors, groups=4, backend=backend)

    # PyTorch's aot_eager fails for such a subclass with F.conv2d too.
    compiled = torch.compile(conv, fullgraph=True, backend="eager" if kind == "subclass" else "aot_eager")
    tensors = operands(device)
    expected = F.conv2d(*tensors, groups=4)
    if kind == "fake":
        with FakeTensorMode() as mode:
            y = compiled(*(mode.from_tensor(t) for t in tensors))
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        return
    if kind == "subclass":
        tensors[0] = tensors[0].as_subclass(Default)
    with Functions() if kind == "in a mode" else contextlib.nullcontext():
        y = compiled(*tensors)
    assert type(y) is (Default if kind == "subclass" else torch.Tensor)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)


# --- Tracers ---------------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """A network in small: layers of ours and of PyTorch's, and a call with no layer around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 8, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, (2, 3), groups=8, padding="same", padding_mode="reflect")
        self.filters = nn.Parameter(torch.randn(8, 2, 2, 2))
        self.convolve = triton_conv

    def forward(self, x):
        x = self.depthwise(self.block(self.stem(x)))
        return self.convolve(x, self.filters, padding="same", groups=4)


class Layers(Features):
    """What torch.jit.script takes: layers alone."""

    def forward(self, x):
        return self.depthwise(self.block(self.stem(x)))


def pixels(batch=2):
    return torch.randn(batch, 4, 7, 6, generator=torch.Generator().manual_seed(1))


def features(kind=Features, **submodules):
    model = convert(kind().eval())
    for name, module in submodules.items():
        setattr(model, name, module)
    return model


def test_jit_trace():
    """Of a model that trains, and of one that does not: the operators are those of a model of nn.Conv2d."""
    for model in (features(), features().requires_grad_(False)):
        traced, native = (torch.jit.trace(m, pixels()) for m in (model, features(convolve=F.conv2d)))
        operators, theirs = ({node.kind() for node in trace.inlined_graph.nodes()} for trace in (traced, native))
        assert operators <= theirs
        assert "aten::_convolution" in operators
        assert torch.equal(traced(pixels(3)), model(pixels(3)))


def test_jit_trace_of_forced_kernels():
    with pytest.raises(NotImplementedError, match=r"'triton' cannot run this .*: torch\.jit traces F\.conv2d"):
        torch.jit.trace(features(convolve=by_kernels), pixels())


def test_jit_script():
    model = features(Layers)
    scripted = torch.jit.script(model)
    assert type(model.depthwise) is groupconv.Conv2d
    assert torch.equal(scripted(pixels()), model(pixels()))
    assert torch.equal(scripted(pixels()[0].unsqueeze(0)), model(pixels()[:1]))
    for options in ({"padding": "same"}, {"padding": (1, 0)}, {"padding_mode": "circular", "padding": 1}):
        layer = groupconv.Conv2d(4, 4, 3, groups=2, **options)
        assert torch.equal(torch.jit.script(layer)(pixels()), layer(pixels()))


def test_what_jit_saves_runs_without_us(tmp_path):
    """In a process that has never heard of this package."""
    model, script = features(), features(Layers)
    torch.jit.trace(model, pixels()).save(tmp_path / "traced.pt")
    torch.jit.script(script).save(tmp_path / "scripted.pt")
    torch.save(pixels(), tmp_path / "x.pt")
    code = """
import sys, torch
x = torch.load("x.pt")
torch.save([torch.jit.load(name)(x).detach() for name in ("traced.pt", "scripted.pt")], "y.pt")
assert "groupconv" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    for y, module in zip(torch.load(tmp_path / "y.pt"), (model, script), strict=True):
        torch.testing.assert_close(y, module(pixels()).detach())


def onnx_convolutions(model, dynamo, tmp_path):
    """The attribute `group` of each convolution of a model as it is exported."""
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    if dynamo:
        pytest.importorskip("onnxscript")
        torch.onnx.export(model, (pixels(),), path, dynamo=True, verbose=False)
    else:
        torch.onnx.export(model, (pixels(),), path, dynamo=False)
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    return [next((a.i for a in node.attribute if a.name == "group"), 1) for node in convolutions]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(dynamo, tmp_path):
    assert onnx_convolutions(features(), dynamo, tmp_path) == [1, 4, 8, 4]


def test_onnx_of_our_operator(tmp_path):
    """What is exported by PyTorch with our operator in it, as for a GPU, is a convolution for ONNX."""
    model = features(convolve=by_kernels)
    program = torch.export.export(model, (pixels(),))
    assert torch.ops.groupconv.conv2d.default in {node.target for node in program.graph.nodes}
    assert onnx_convolutions(model, True, tmp_path) == [1, 4, 8, 4]
    table = torch.export.default_decompositions()
    table[torch.ops.groupconv.conv2d.default] = decomposition_table[torch.ops.groupconv.conv2d.default]
    decomposed = program.run_decompositions(table)
    assert torch.ops.groupconv.conv2d.default not in {node.target for node in decomposed.graph.nodes}
    torch.testing.assert_close(decomposed.module()(pixels()), features()(pixels()))


def calls(graph):
    return [(node.op, node.target) for node in graph.nodes if node.op.startswith("call")]


EXPECTED = [
    *(("call_module", name) for name in ("stem", "block.0", "block.1", "block.2", "depthwise")),
    ("call_function", triton_conv),
]


def test_fx_holds_our_layers_and_calls():
    model = features()
    traced = fx.symbolic_trace(model)
    assert calls(traced.graph) == EXPECTED
    assert type(traced.get_submodule("depthwise")) is groupconv.Conv2d
    assert not [node for node in traced.graph.nodes if node.op == "get_attr" and node.target != "filters"]
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(graph(pixels()), model(pixels()))


class Extractor(fx.Tracer):
    """A tracer as feature extractors make them: it keeps the layer that each node comes from, and chooses leaves."""

    def __init__(self, leaves):
        super().__init__()
        self.leaves, self.layer, self.names = leaves, "", {}

    def is_leaf_module(self, m, qualname):
        return isinstance(m, self.leaves)

    def call_module(self, m, forward, args, kwargs):
        before, self.layer = self.layer, self.path_of_module(m)
        try:
            if self.is_leaf_module(m, self.layer):
                return self.create_proxy("call_module", self.layer, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self.layer = before

    def create_proxy(self, *args, **kwargs):
        proxy = super().create_proxy(*args, **kwargs)
        self.names[self.layer] = proxy.node.op
        return proxy


@pytest.mark.parametrize("leaves", [(nn.Conv2d, nn.BatchNorm2d, nn.ReLU), (nn.Sequential,), (nn.BatchNorm2d,)], ids=str)
def test_fx_with_leaves_chosen(leaves):
    """The nodes and names are those of a model of nn.Conv2d, but for the functions that are called."""
    model = features()
    ours, theirs = Extractor(leaves), Extractor(leaves)
    graph = ours.trace(model)
    native = theirs.trace(revert(features(convolve=F.conv2d)))
    assert [node.op for node in graph.nodes] == [node.op for node in native.nodes]
    assert ours.names == theirs.names
    assert torch.equal(fx.GraphModule(model, graph)(pixels()), model(pixels()))


class Twice(groupconv.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("model", "operations"),
    [
        (nn.Sequential(Twice(4, 4, 3, groups=2), nn.ReLU()), ["call_function", "call_function", "call_module"]),
        (groupconv.Conv2d(4, 4, 3, groups=2), ["call_function"]),
    ],
    ids=["a forward of its own", "a lone layer"],
)
def test_fx_looks_into_what_is_no_leaf(model, operations):
    traced = fx.symbolic_trace(model)
    assert [op for op, _ in calls(traced.graph)] == operations
    assert torch.equal(traced(pixels()), model(pixels()))


@pytest.mark.parametrize(
    ("conv", "strict"),
    [(triton_conv, False), (by_kernels, True)],
    ids=["auto", "strict"],
)
def test_export_with_a_batch_of_any_size(conv, strict):
    model = features(convolve=conv)
    program = torch.export.export(model, (pixels(),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    for batch in (2, 5):
        torch.testing.assert_close(program.module()(pixels(batch)), model(pixels(batch)))


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize(
    ("conv", "view"), [(triton_conv, torch.contiguous_format), (by_kernels, torch.channels_last)], ids=["auto", "nhwc"]
)
def test_compiled_with_a_batch_that_data_tells(conv, view, device):
    torch._dynamo.reset()

    def chosen(conv, x, w, bias, mask):
        return conv(x[mask], w, bias, groups=4, padding="same")

    compiled = torch.compile(functools.partial(chosen, conv), fullgraph=True, backend="aot_eager")
    for mask in ([True, False, True], [False, True, False]):
        mask = torch.tensor(mask, device=device)
        x, w, bias = operands(device)
        leaves = [t.detach().requires_grad_() for t in (x.repeat(2, 1, 1, 1)[:3].to(memory_format=view), w, bias)]
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            y = compiled(*leaves, mask)
        expected = chosen(F.conv2d, *leaves, mask)
        torch.testing.assert_close(y, expected)
        for out, ref in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, expected)), strict=True):
            torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [convert, revert, groupconv.summarize])
@pytest.mark.parametrize("model", [None, nn.Conv2d, [nn.Conv2d(2, 2, 1)]], ids=["None", "class", "list"])
def test_what_is_no_module_is_refused(function, model):
    with pytest.raises(TypeError, match=rf"^{function.__name__}: model is .*, but must be a torch\.nn\.Module$"):
        function(model)


# --- Fusion and quantization -----------------------------------------------------------------------------------------


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.first, self.norm, self.relu = nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.third, self.relu3 = nn.Conv2d(8, 4, 1, groups=2), nn.ReLU()
        self.alone = nn.Conv2d(4, 4, 1, groups=2)

    def forward(self, x):
        x = self.relu(self.norm(self.first(self.quant(x))))
        x = self.relu3(self.third(self.norm2(self.second(x))))
        return self.dequant(self.alone(x))


LISTS = [["first", "norm", "relu"], ["second", "norm2"], ["third", "relu3"]]


def quantized(model, qat):
    model = model.train(qat)
    engine = torch.backends.quantized.engine
    if qat:
        model = quantization.fuse_modules_qat(model, LISTS)
        model.qconfig = quantization.get_default_qat_qconfig(engine)
        model = quantization.prepare_qat(model)
    else:
        model = quantization.fuse_modules(model, LISTS)
        model.qconfig = quantization.get_default_qconfig(engine)
        model = quantization.prepare(model)
    model(pixels())
    return model, quantization.convert(model.eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("qat", [False, True])
def test_eager_quantization(qat):
    """Fused, prepared and converted as a model of nn.Conv2d; the model itself stays as it was."""
    model = convert(Quantizable())
    pairs = list(zip(quantized(model, qat), quantized(Quantizable(), qat), strict=True))
    for ours, native in pairs:  # as prepared, and as converted
        assert [type(m) for m in ours.modules()] == [type(m) for m in native.modules()]
    converted, expected = pairs[1]
    assert torch.equal(converted(pixels()), expected(pixels()))
    assert len(groupconv.summarize(model).converted) == 4
    assert set(groupconv.summarize(converted).left.values()) == {"quantised"}


def test_layer_without_a_qconfig_stays_ours():
    model = convert(Quantizable().eval())
    model.alone.qconfig = None
    assert type(model.alone) is groupconv.Conv2d
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    prepared = quantization.prepare(model)
    assert groupconv.summarize(prepared).converted == ("alone",)
    layer = Twice(4, 4, 3, groups=2)
    layer.qconfig = model.qconfig
    assert type(layer) is Twice


def test_folding_a_normalization_into_a_layer():
    """By nn.utils for our layers too; torch.fx's own pass goes by exact type, and wants `revert` first."""
    model = features(Layers)
    nn.init.uniform_(model.block[1].running_mean)
    folded = nn.utils.fuse_conv_bn_eval(model.block[0], model.block[1])
    assert type(folded) is groupconv.Conv2d
    x = pixels().repeat(1, 2, 1, 1)
    torch.testing.assert_close(folded(x), model.block[:2](x))
    for unfused, norms in ((model, 1), (revert(copy.deepcopy(model)), 0)):
        fused = optimization.fuse(unfused)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == norms
        torch.testing.assert_close(fused(pixels()), model(pixels()))


class OnlyConv2d:
    """A type that knows F.conv2d, and nothing else."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "F.conv2d's" if func in (F.conv2d, torch.conv2d) else NotImplemented


def test_a_type_that_knows_only_conv2d():
    w = torch.randn(4, 2, 3, 3)
    assert triton_conv(OnlyConv2d(), w, groups=2) == "F.conv2d's"
    with pytest.raises(TypeError, match="no implementation found for"):
        triton_conv(OnlyConv2d(), w, groups=2, backend="triton")


# --- Profiler --------------------------------------------------------------------------------------------------------


def test_profiler(device):
    """A call has a name, its algorithm's too, and shapes; nothing of it is left outside."""
    x, w, bias = (t.requires_grad_() for t in operands(device))
    with torch.profiler.profile(record_shapes=True) as profile:
        by_kernels(x, w, bias, groups=4).sum().backward()
        by_kernels(x, w, bias, groups=4, activation="silu")
    plan = explain(x, w, bias, groups=4, backend="triton")
    shapes = {event.name: event.input_shapes for event in profile.events()}
    operand_shapes = [list(t.shape) for t in (x, w, bias)]
    assert shapes[f"groupconv::fprop: {plan.fprop.algorithm}"] == operand_shapes
    assert shapes[f"groupconv::fprop: {plan.fprop.algorithm}, silu"] == [*operand_shapes, []]
    backward = f"groupconv::dgrad: {plan.dgrad.algorithm}, wgrad: {plan.wgrad.algorithm}"
    if plan.backward is not None:  # by one kernel
        backward = f"groupconv::backward: {plan.backward.algorithm}"
    assert shapes[backward] == [[2, 12, 4, 5], *operand_shapes[:2]]
    assert {"GroupedConv2d", "GroupedConv2dBackward"} <= shapes.keys()


# --- Inductor --------------------------------------------------------------------------------------------------------


class ByKernels(nn.Conv2d):
    def forward(self, x):
        return by_kernels(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def block():
    """Grouped convolutions by our kernels between two that Inductor lays out channels_last."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), ByKernels(8, 8, 3, padding=1, groups=4), nn.ReLU(),
        ByKernels(8, 8, 3, padding=1, groups=8), nn.SiLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles for a CPU by g++")
def test_inductor_lays_out_around_us(monkeypatch):
    """Operands come as Inductor has them, channels_last: nothing is copied back for us, forward or backward.

    With the variable CI, which has Inductor ask whether an operator could be decomposed.
    """
    monkeypatch.setenv("CI", "1")
    came = []

    def recorded(function):
        def method(self, *arguments):
            tensors = [t for t in arguments if isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[2:] == (9, 7)]
            came.extend(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
            return function(self, *arguments)

        return method

    for name in ("forward", "backward"):
        monkeypatch.setattr(call.Call, name, recorded(getattr(call.Call, name)))
    model, x = block(), torch.randn(2, 4, 9, 7)

    def step(model):
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]

    plain = step(model)
    assert not any(came)
    came.clear()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = step(torch.compile(model, fullgraph=True))
    assert came == [True] * 6
    for out, ref in zip(compiled, plain, strict=True):
        assert (out - ref).norm() <= 1e-5 * ref.norm()


def test_recompilations_of_another_batch():
    """As many as of F.conv2d: the second batch makes it dynamic."""
    graphs = {}
    x, w, bias = operands()
    for conv in (F.conv2d, by_kernels):
        made = graphs[conv] = []

        def backend(graph, inputs, made=made):
            made.append(graph)
            return graph

        torch._dynamo.reset()
        compiled = torch.compile(lambda x, conv=conv: conv(x, w, bias, groups=4).relu(), backend=backend)
        for batch in (2, 3, 4, 5):
            assert compiled(torch.randn(batch, *x.shape[1:])).shape[0] == batch
    assert [len(made) for made in graphs.values()] == [2, 2]
