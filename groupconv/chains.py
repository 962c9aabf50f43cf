"""Which batch norm and activation certainly follow a convolution, by the code of the modules that can call them."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import itertools
import logging
import random
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import torch_private
from .layers import LOG, Conv2d

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
TIMM_NORMS = ("BatchNormAct2d", "SyncBatchNormAct")  # with a dropout and an activation of their own
TIMM_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "Swish": "silu", "Sigmoid": "sigmoid"}
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid",
}  # fmt: skip
MODES = "groupconv_modes"  # of PyTorch, while a node's module was called
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # call what they hold, and only as a whole


Place = tuple[nn.Module, str, nn.Module]


@dataclasses.dataclass(frozen=True)
class Chain:
    """A convolution and what takes its result alone, but for nn.Identity in between.

    exclusive: nothing else calls the activation, by any name. places: where the activation, and what is between it and
    the norm, are held: by whom, under which name, and they themselves. held: the norm's place, so too. caller: whose
    code calls them. recomputed: by torch.utils.checkpoint inside that code.
    """

    conv: nn.Conv2d
    norm: nn.Module
    activate: nn.Module | None
    exclusive: bool
    places: tuple[Place, ...]
    held: Place
    caller: nn.Module
    recomputed: bool = dataclasses.field(compare=False)  # which it is not without gradients


def found(model: nn.Module, modes: tuple[bool, ...]) -> dict[nn.Module, Chain | str]:
    """The chain of each grouped nn.Conv2d and Conv2d of a model, or why it has none that is certain.

    Certain is what torch.fx sees in the code of every module that holds one of the chain's, traced with its children as
    they are, in each of these modes of training, with gradients and without. Code that takes more than one argument, or
    any by choice, that cannot be traced, that draws random numbers, or that keeps what passes, might do anything. All
    of it runs on a copy of the model.
    """
    kinds = (nn.Conv2d, Conv2d)
    convs: list[Any] = [m for m in model.modules() if isinstance(m, kinds) and type(m) in kinds and m.groups > 1]
    try:
        twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    except Exception:  # whatever a module refuses
        return dict.fromkeys(convs, "the model cannot be copied, to look at its code")
    pairs = zip(twin.named_modules(remove_duplicate=False), model.named_modules(remove_duplicate=False), strict=True)
    ours: dict[nn.Module, Any] = {theirs: mine for (_, theirs), (_, mine) in pairs}
    theirs: dict[Any, Any] = {mine: twin_ for twin_, mine in ours.items()}
    kept = {theirs[module]: _kept(module, theirs) for module in model.modules()}
    readings = []
    for mode, grad in itertools.product(modes, (True, False)):
        with torch.set_grad_enabled(grad), _unmoved():
            readings.append(_Reading(twin.train(mode), kept))
    chains: dict[nn.Module, Chain | str] = {}
    for conv in convs:
        seen = [reading.chain(theirs[conv]) for reading in readings]
        why_not = next((chain for chain in seen if isinstance(chain, str)), None)
        agreed: Any = seen[0]  # a Chain if there is no reason
        if why_not is None and any(chain != agreed for chain in seen):
            why_not = "its followers are others in another mode"
        if why_not is not None:
            chains[conv] = why_not
            continue
        held, *places = ((ours[holder], name, ours[module]) for holder, name, module in (agreed.held, *agreed.places))
        chains[conv] = dataclasses.replace(
            agreed, conv=conv, norm=ours[agreed.norm], activate=ours.get(agreed.activate), places=tuple(places),
            held=held, caller=ours[agreed.caller], recomputed=any(chain.recomputed for chain in seen),  # type: ignore
        )  # fmt: skip
    return chains


@contextlib.contextmanager
def _unmoved() -> Iterator[None]:
    """Random numbers that are drawn inside are drawn again afterwards."""
    before = random.getstate()
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(before)


def _kept(module: nn.Module, theirs: dict[Any, Any]) -> tuple[set[nn.Module], set[int]]:
    """Modules (of the copy), and tensors by identity, that a module's own state leads to but its registers do not.

    Through containers, objects, bound methods, partials and functions' closures.
    """
    modules: set[nn.Module] = set()
    tensors: set[int] = set()
    seen = {id(module)}
    todo = [value for key, value in vars(module).items() if key not in ("_modules", "_parameters", "_buffers")]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            tensors.add(id(value))
        elif isinstance(value, nn.Module):
            if value in theirs:
                modules.update(theirs[value].modules())
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            todo += value
        elif isinstance(value, types.MethodType):
            todo += (value.__self__, value.__func__)
        elif isinstance(value, functools.partial):
            todo += (value.func, value.args, value.keywords)
        elif isinstance(value, types.FunctionType):
            todo += (cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
        elif hasattr(value, "__dict__"):
            todo += vars(value).values()
    return modules, tensors


class _Shallow(fx.Tracer):
    """Traces one module's own code.

    proxies: all that stood for tensors. read: other modules of which its code read what not every module has.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.proxies: list[weakref.ref] = []
        self.read: set[nn.Module] = set()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = super().proxy(node)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def holds_on(self) -> bool:
        """Whether anything, a module's state or another list of results, still has what stood for a tensor."""
        return any(proxy() is not None for proxy in self.proxies)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        def read(module: nn.Module, name: str) -> Any:
            if module is not root and not name.startswith("_") and name != "training" and not hasattr(nn.Module, name):
                self.read.add(module)
            return object.__getattribute__(module, name)

        nn.Module.__getattribute__ = read  # type: ignore
        try:
            return super().trace(root, concrete_args)
        finally:
            del nn.Module.__getattribute__

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True

    def call_module(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(module, forward, args, kwargs)
        result.node.meta[MODES] = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch_private.any_autocast(),
            torch_private.saved_tensors_are_packed(),
        )
        return result


class _Reading:
    """What the code of a model's modules calls, in one mode."""

    def __init__(self, model: nn.Module, kept: dict[nn.Module, tuple[set[nn.Module], set[int]]]):
        self.holders = collections.defaultdict(set)  # of each module, all that can reach it
        self.opaque: dict[nn.Module, str] = {}  # whose code says nothing for certain
        self.calls: dict[nn.Module, int] = collections.Counter()
        self.paths = collections.Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self.nodes: dict[nn.Module, tuple[nn.Module, fx.Node]] = {}
        self.reached_into: set[nn.Module] = set()  # for a part of it, by other code than its own
        self.readers = collections.defaultdict(set)  # of parameters and buffers by identity, whose code takes them
        self.keepers = collections.defaultdict(set)  # of parameters and buffers by identity, that can reach them
        traced: dict[nn.Module, tuple[fx.Graph | None, _Shallow]] = {}
        for module in model.modules():
            modules, tensors = kept[module]
            for inner in {*module.modules(), *modules} - {module}:
                self.holders[inner].add(module)
            for tensor in tensors:
                self.keepers[tensor].add(module)
            if type(module).forward is nn.Module.forward or isinstance(module, WRAPPERS):
                continue
            if modules or tensors or list(module.children()):
                tracer = _Shallow()
                traced[module] = _traced(module, tracer), tracer
        if any(tracer.holds_on() for _, tracer in traced.values()):
            gc.collect()  # of cycles
        names = {module: name or "the model" for name, module in model.named_modules()}
        for module, (graph, tracer) in traced.items():
            self.reached_into |= tracer.read
            if graph is None or tracer.holds_on() or (any(kept[module]) and torch_private.has_hooks(module)):
                self.opaque[module] = names[module]
                continue
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    holder = str(node.target).rpartition(".")[0]
                    if holder:
                        self.reached_into.add(module.get_submodule(holder))
                if node.op == "call_module":
                    called = module.get_submodule(str(node.target))
                    self.calls[called] += 1
                    self.nodes[called] = module, node
                elif node.op == "get_attr":
                    self.readers[id(_attribute(module, str(node.target)))].add(module)

    def chain(self, conv: Any) -> Chain | str:
        if conv not in self.nodes:
            return next(iter(self._doubts(conv)), "nothing calls it")
        owner, node = self.nodes[conv]
        *_, last = self._following(owner, node)
        if last is None or not (type(last[1]) in NORMS or is_timm_norm(last[1])):
            return next(iter(self._doubts(conv)), "no batch norm takes its result alone")
        node, norm = last
        for module in (conv, norm):
            for doubt in self._doubts(module):
                return doubt
        held = _place(owner, node, norm)
        *between, last = self._following(owner, node)
        if last is None or any(self._doubts(last[1], by_one=False)):
            return Chain(conv, norm, None, False, (), held, owner, node.meta[MODES][-1])
        activate = last[1]
        places = tuple(_place(owner, node, module) for node, module in (*between, last))
        exclusive = self.calls[activate] == self.paths[activate] == 1 and activate not in self.reached_into
        return Chain(conv, norm, activate, exclusive, places, held, owner, node.meta[MODES][-1])

    def _following(self, owner: nn.Module, node: fx.Node) -> Iterator[Any]:
        """The nodes and modules of nn.Identity that take a node's result alone, and of what comes next, or None."""
        while following := _next(owner, node):
            node, module = following
            yield following
            if type(module) is not nn.Identity or any(self._doubts(module, by_one=False)):
                return
        yield None

    def _doubts(self, module: Any, by_one: bool = True) -> Iterator[str]:
        """Why it may be called, or read, in another way than its one call says."""
        for holder in self.holders[module] & self.opaque.keys():
            yield f"torch.fx cannot tell what {self.opaque[holder]} calls"
        if by_one and self.calls[module] > 1:
            yield "it or its batch norm is called more than once"
        if "forward" in vars(module):
            yield "it or its batch norm has a forward of its own"
        if torch_private.has_hooks(module):
            yield "it or its batch norm has hooks"
        if module in self.reached_into:
            yield "its batch norm's parts are called or read elsewhere too"
        tensors = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
        if any((self.readers[tensor] | self.keepers[tensor] & self.opaque.keys()) - {module} for tensor in tensors):
            yield "its parameters or its batch norm's are read elsewhere too"
        if getattr(module, "qconfig", None) is not None:
            yield "it is to be quantised"


def _traced(module: nn.Module, tracer: _Shallow) -> fx.Graph | None:
    """What a module's code does; None if that is not certain."""
    if "forward" in vars(module):
        return None
    states = _random_states()
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
        if len(parameters) != 1 or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ) or parameters[0].default is not inspect.Parameter.empty:  # fmt: skip
            return None
        graph = tracer.trace(module)
    except Exception:  # whatever code does with what is no tensor
        return None
    return graph if states == _random_states() else None


def _random_states() -> tuple[object, bytes]:
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def _next(owner: nn.Module, node: fx.Node) -> tuple[fx.Node, nn.Module] | None:
    """The call that takes a node's result alone, and is the next thing that happens, in the same modes."""
    following = node.next
    if following.op != "call_module" or list(node.users) != [following]:
        return None
    if following.args != (node,) or following.kwargs or following.meta[MODES] != node.meta[MODES]:
        return None
    return following, owner.get_submodule(str(following.target))


def _place(owner: nn.Module, node: fx.Node, module: nn.Module) -> Place:
    holder, _, name = str(node.target).rpartition(".")
    return owner.get_submodule(holder), name, module


def _attribute(module: nn.Module, path: str) -> object:
    *holders, name = path.split(".")
    return getattr(module.get_submodule(".".join(holders)), name)


def is_timm_norm(module: object) -> bool:
    """Whether it is timm's batch norm that also drops out and activates, in its modules `drop` and `act`."""
    kind = type(module)
    return kind.__name__ in TIMM_NORMS and kind.__module__.startswith("timm.") and isinstance(module, NORMS)


def doubt_of_timm_norm(norm: Any) -> str | None:
    """Why one of timm's batch norms does more than to normalise and activate as triton_conv can, or other than that."""
    if type(norm.drop) is not nn.Identity:
        return "a dropout follows its batch norm"
    if torch_private.has_hooks(norm.drop, norm.act) or "forward" in {**vars(norm.drop), **vars(norm.act)}:
        return "its batch norm's activation has hooks, or a forward of its own"
    if activation_of(norm.act) is None and type(norm.act) is not nn.Identity:
        return "its batch norm has an activation that is none of triton_conv's"
    return None


def activation_of(module: Any, kind: type[nn.Module] | None = None) -> str | None:
    """triton_conv's name of what an activation module computes. kind: its class, if not its own."""
    kind = kind or type(module)
    if kind in ACTIVATIONS:
        return ACTIVATIONS[kind]
    if kind is nn.LeakyReLU and module.negative_slope == 0.01:
        return "leaky_relu"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return TIMM_ACTIVATIONS.get(kind.__name__) if kind.__module__ == "timm.layers.activations" else None


def tell(function: str, taken: dict[str, str], left: dict[str, str]) -> None:
    """Log what becomes of a model's grouped convolutions, by name."""
    if LOG.isEnabledFor(logging.INFO):
        lines = [*(f"{name}: {what}" for name, what in taken.items()), *(f"{n}: left, {w}" for n, w in left.items())]
        total = len(taken) + len(left)
        LOG.info("%s", "\n  ".join([f"{function}: {len(taken)} of {total} grouped convolutions", *lines]))
