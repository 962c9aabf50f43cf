"""Which batch norm and activation certainly follow a convolution, by the code of the modules that can call them."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

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
    the norm, are held: by whom, under which name, and they themselves. held: the norm's place, so too.
    """

    conv: nn.Conv2d
    norm: nn.Module
    activate: nn.Module | None
    exclusive: bool
    places: tuple[Place, ...]
    held: Place


def found(model: nn.Module, modes: tuple[bool, ...]) -> dict[nn.Module, Chain | str]:
    """The chain of each grouped nn.Conv2d and Conv2d of a model, or why it has none that is certain.

    Certain is what torch.fx sees in the code of every module that holds one of the chain's, traced with its children as
    they are, in each of these modes of training. Code that takes more than one argument, or any by choice, that cannot
    be traced, or that keeps what passes, might do anything. All of it runs on a copy of the model.
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
    readings = [_Reading(twin.train(mode)) for mode in modes]
    chains: dict[nn.Module, Chain | str] = {}
    for conv in convs:
        seen = [reading.chain(theirs[conv]) for reading in readings]
        first = seen[0]
        if isinstance(first, str) or any(other != first for other in seen):
            chains[conv] = first if isinstance(first, str) else "its followers are others in training"
        else:
            activate = None if first.activate is None else ours[first.activate]
            held, *places = ((ours[holder], name, ours[module]) for holder, name, module in (first.held, *first.places))
            chains[conv] = Chain(conv, ours[first.norm], activate, first.exclusive, tuple(places), held)
    return chains


class _Shallow(fx.Tracer):
    """Traces one module's own code."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True

    def call_module(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(module, forward, args, kwargs)
        result.node.meta[MODES] = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch_private.any_autocast(),
        )
        return result


class _Reading:
    """What the code of a model's modules calls, in one mode."""

    def __init__(self, model: nn.Module):
        self.holders = collections.defaultdict(set)  # of each module, all that can reach it
        self.opaque: dict[nn.Module, str] = {}  # whose code says nothing for certain
        self.calls: dict[nn.Module, int] = collections.Counter()
        self.paths = collections.Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self.nodes: dict[nn.Module, tuple[nn.Module, fx.Node]] = {}
        self.reached_into: set[nn.Module] = set()  # for a part of it, by other code than its own
        self.readers = collections.defaultdict(set)  # of parameters and buffers by identity, whose code takes them
        for name, module in model.named_modules():
            for inner in module.modules():
                if inner is not module:
                    self.holders[inner].add(module)
            if type(module).forward is nn.Module.forward or isinstance(module, WRAPPERS) or not list(module.children()):
                continue
            graph = _traced(module)
            if graph is None:
                self.opaque[module] = name or "the model"
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
            return Chain(conv, norm, None, False, (), held)
        activate = last[1]
        places = tuple(_place(owner, node, module) for node, module in (*between, last))
        return Chain(conv, norm, activate, self.calls[activate] == self.paths[activate] == 1, places, held)

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
        if any(self.readers[id(tensor)] - {module} for tensor in (*module.parameters(), *module.buffers())):
            yield "its parameters or its batch norm's are read elsewhere too"
        if getattr(module, "qconfig", None) is not None:
            yield "it is to be quantised"


def _traced(module: nn.Module) -> fx.Graph | None:
    """What a module's code does; None if that is not certain."""
    if "forward" in vars(module):
        return None
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
        if len(parameters) != 1 or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ) or parameters[0].default is not inspect.Parameter.empty:  # fmt: skip
            return None
        graph = _Shallow().trace(module)
    except Exception:  # whatever code does with what is no tensor
        return None
    return None if any(map(_holds_a_proxy, vars(module).values())) else graph


def _holds_a_proxy(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, fx.Proxy) or (isinstance(value, (list, tuple, set)) and any(map(_holds_a_proxy, value)))


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
