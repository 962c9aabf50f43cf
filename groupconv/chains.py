"""Which batch norm and activation certainly follow a convolution, by the code of the modules that call them."""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import itertools
import logging
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import reading, torch_private
from .layers import LOG, Conv2d

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
TIMM_NORMS = ("BatchNormAct2d", "SyncBatchNormAct")  # with a dropout and an activation of their own
TIMM_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "Swish": "silu", "Sigmoid": "sigmoid"}
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid",
}  # fmt: skip
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Attributes by which code comes to modules and tensors whose names it does not say.
BY_ITSELF = frozenset((
    "modules", "children", "named_modules", "named_children", "get_submodule", "parameters", "named_parameters",
    "get_parameter", "buffers", "named_buffers", "get_buffer", "state_dict", "apply", "_modules", "_parameters",
    "_buffers", "__dict__",
))  # fmt: skip
NO_NORM = "no batch norm takes its result alone"
MOST_KEPT = 100_000  # objects that a module's state leads to, before nothing is certain; a guess


@dataclasses.dataclass(frozen=True)
class Step:
    """A module that gets the result of another alone. name: under which its owner holds it; None: through others."""

    module: nn.Module
    name: str | None


Row = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Chain:
    """A convolution, the norm that alone takes its result, and the activation that alone takes that one's and is called
    by nothing else, or None.
    """

    conv: nn.Module
    norm: nn.Module
    activate: nn.Module | None


def grouped(model: nn.Module) -> list[Any]:
    """The grouped nn.Conv2d and Conv2d of a model."""
    kinds = (nn.Conv2d, Conv2d)
    return [m for m in model.modules() if isinstance(m, kinds) and type(m) in kinds and m.groups > 1]


def rows(owner: nn.Module, codes: Iterable[types.CodeType] | None = None) -> Iterator[Row]:
    """The modules that a module's code calls one after another, each with nothing but the result of the one before.

    codes: of functions of its class; by default all.
    """
    kind = type(owner)
    if isinstance(owner, nn.Sequential) and kind.forward is nn.Sequential.forward:
        yield tuple(Step(module, name) for name, module in owner._modules.items() if module is not None)
        return
    for code in _methods(kind) if codes is None else codes:
        for run in reading.runs(code):
            if run[0].root != (code.co_varnames or ("",))[0]:
                continue
            modules = [functools.reduce(reading.child, call.path, owner) for call in run]
            if None not in modules:
                names = (call.path[0] if len(call.path) == 1 else None for call in run)
                yield tuple(itertools.starmap(Step, zip(modules, names, strict=True)))


def _methods(kind: type) -> Iterator[types.CodeType]:
    """The code of all functions in a class and its bases, but for PyTorch's own."""
    for base in kind.__mro__:
        if not _is_torchs(base):
            for value in vars(base).values():
                yield from reading.codes_of(value)


def _class(module: nn.Module) -> Any:  # of a type[Module] mypy does not believe that it has a hash
    return type(module)


def _is_torchs(kind: type) -> bool:
    return kind is object or kind.__module__.startswith(("torch.nn.", "torch.ao.")) or kind.__module__ == "torch"


def after(row: Row, at: int) -> Step | None:
    """What takes the result of a module in a row, nn.Identity left out."""
    return next(
        (step for step in row[at + 1 :] if type(step.module) is not nn.Identity or _is_watched(step.module)), None
    )


def _is_watched(module: nn.Module) -> bool:
    return torch_private.has_hooks(module) or "forward" in vars(module)


def is_norm(module: nn.Module) -> bool:
    return type(module) in NORMS or is_timm_norm(module)


def found(model: nn.Module) -> dict[nn.Module, Chain | str]:
    """The chain of each grouped convolution of a model, or why it has none that is certain.

    Certain is what the code says that the model's forward can reach: it calls the convolution, the norm, and the
    activation if there is one, once each, in a row, and neither it nor any other module's names them otherwise.
    """
    look = _Look(model)
    return {conv: look.chain(conv) for conv in grouped(model)}


class _Look:
    """What the code of a model's modules names."""

    def __init__(self, model: nn.Module):
        self.paths = collections.Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self.holders: dict[nn.Module, list[tuple[nn.Module, str]]] = collections.defaultdict(list)
        self.rows: dict[nn.Module, tuple[nn.Module, Row, int]] = {}  # the first in which a convolution is
        for module in model.modules():
            for name, child in module._modules.items():
                if child is not None:
                    self.holders[child].append((module, name))
            for row in rows(module, _reached(_class(module))):
                for at, step in enumerate(row):
                    if at + 1 < len(row):
                        self.rows.setdefault(step.module, (module, row, at))
        kinds: set[Any] = {type(module) for module in model.modules() if not _is_torchs(type(module))}
        instances = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
        self.named = [*map(_named, kinds), *(_Named(_outermost(function)) for function in instances)]
        self.kept = _kept(model)
        self.tensors = collections.Counter(
            id(tensor) for module in model.modules() for held in (module._parameters, module._buffers)
            for tensor in held.values() if tensor is not None
        )  # fmt: skip

    def chain(self, conv: nn.Module) -> Chain | str:
        owner, row, at = self.rows.get(conv, (None, (), 0))
        norm = after(row, at)
        if owner is None or norm is None or not is_norm(norm.module) or norm is not row[at + 1]:
            return NO_NORM
        for step in (row[at], norm):
            doubt = self._doubt(owner, step)
            if doubt is not None:
                return doubt
        activate = after(row, at + 1)
        if activate is None or self._doubt(owner, activate) is not None:
            return Chain(conv, norm.module, None)
        return Chain(conv, norm.module, activate.module)

    def _doubt(self, owner: nn.Module, step: Step) -> str | None:
        """Why a module may be called, or read, in another way than its row says."""
        module, name = step.module, step.name
        if "forward" in vars(module):
            return "it or its batch norm has a forward of its own"
        if torch_private.has_hooks(module):
            return "it or its batch norm has hooks"
        if getattr(module, "qconfig", None) is not None:
            return "it is to be quantised"
        tensors = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
        if self.paths[module] > 1 or name is None or any(self.tensors[tensor] > 1 for tensor in tensors):
            return "it or its batch norm, or a part of them, is held in more than one place"
        if id(module) in self.kept or any(tensor in self.kept for tensor in tensors):
            return "it or its batch norm, or a part of them, is kept by code besides"
        if "forward" in vars(owner) or type(owner).__call__ is not nn.Module.__call__:
            return "a function of its own has taken the place of its module's code"
        if isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward:
            return self._doubt_of_items(owner)
        return self._doubt_of_name(_class(owner), name) or self._doubt_of_those_above(owner)

    def _doubt_of_name(self, kind: Any, name: str) -> str | None:
        own = _named(kind)
        if own.unread:
            return f"the source of {kind.__name__} is not at hand"
        if own.by_itself or own.by_made_up_names or issubclass(kind, CONTAINERS):
            return f"the code of {kind.__name__} goes through its modules by itself"
        if own.uses(name) > 1:
            return "it or its batch norm is called or read more than once"
        if any(named.names_of_another(name) for named in self.named):
            return "other code names it, or its batch norm"
        return None

    def _doubt_of_items(self, container: nn.Module) -> str | None:
        """Of what a container holds, which code may come to by its place."""
        item, depth = container, 0
        while True:
            holders = self.holders[item]
            if not holders:
                return None  # it is the model
            holder, name = holders[0]
            if not isinstance(holder, CONTAINERS):
                break
            if type(holder).forward not in (nn.Sequential.forward, nn.Module.forward):
                break
            item, depth = holder, depth + 1
        own = _named(_class(holder))
        if own.unread:
            return f"the source of {type(holder).__name__} is not at hand"
        by_itself = own.by_itself or own.by_made_up_names or isinstance(holder, CONTAINERS)
        if by_itself or own.other_uses(name, depth) or any(named.names_of_another(name) for named in self.named):
            return f"the code of {type(holder).__name__} may take single modules out of {name}"
        return self._doubt_of_those_above(holder)

    def _doubt_of_those_above(self, module: nn.Module) -> str | None:
        for holder, _ in self.holders[module]:
            if not _is_torchs(type(holder)) and _named(_class(holder)).by_itself:
                return f"the code of {type(holder).__name__} goes through its modules by itself"
            doubt = self._doubt_of_those_above(holder)
            if doubt is not None:
                return doubt
        return None


class _Named:
    """What functions name."""

    def __init__(self, codes: Iterable[types.CodeType]):
        self.unread = self.by_itself = False
        self.by_made_up_names = False  # of its own
        self.attributes: list[tuple[ast.Attribute, list[ast.AST], str]] = []  # what they are in, and the name of self
        self.strings: set[str] = set()
        self.unread_names: set[str] = set()
        for code in codes:
            names = {name for each in reading.inner(code) for name in each.co_names}
            node = reading.function(code)
            if node is None:
                self.unread = True
                self.unread_names |= names | {
                    c for each in reading.inner(code) for c in each.co_consts if isinstance(c, str)
                }
                continue
            self._walk(node, [node], (code.co_varnames or ("",))[0])

    def _walk(self, node: ast.AST, inside: list[ast.AST], itself: str) -> None:
        if isinstance(node, ast.Attribute):
            self.attributes.append((node, inside, itself))
            self.by_itself |= node.attr in BY_ITSELF and not (
                node.attr == "children" and _is_a_call(inside[-1], inside[:-1], 1)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            self.strings.add(node.value)
        elif isinstance(node, ast.Name):
            handed_on = node.id == itself and isinstance(node.ctx, ast.Load) and not _is_of_itself(inside[-1])
            self.by_itself |= node.id == "vars" or handed_on
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            self.by_made_up_names |= not (len(node.args) > 1 and isinstance(node.args[1], ast.Constant))
        for child in ast.iter_child_nodes(node):
            self._walk(child, [*inside, node], itself)

    def uses(self, name: str) -> int:
        """How often a name is said, but to ask whether there is such a thing."""
        said = sum(node.attr == name and not _is_asked_for(inside[-1]) for node, inside, _ in self.attributes)
        return said + (name in self.strings)

    def names_of_another(self, name: str) -> bool:
        """Whether a module's part of that name is named that is not the code's own."""
        return name in self.unread_names or any(
            node.attr == name and not (isinstance(node.value, ast.Name) and node.value.id == itself)
            for node, _, itself in self.attributes
        )  # fmt: skip

    def other_uses(self, name: str, depth: int) -> bool:
        """Whether a container is not only called, asked for, or, of those inside it, called one by one."""
        return name in self.strings or any(
            node.attr == name and not _is_a_call(node, inside, depth) for node, inside, _ in self.attributes
        )  # fmt: skip


def _is_a_call(node: ast.AST, inside: list[ast.AST], depth: int) -> bool:
    holder = inside[-1]
    if isinstance(holder, ast.Call) and holder.func is node:
        return True
    if _is_asked_for(holder):
        return True
    if depth == 0:
        return False
    if isinstance(holder, ast.Call) and _is_checkpoint(holder):
        return True
    if isinstance(holder, ast.Subscript) and holder.value is node and not isinstance(holder.slice, ast.Slice):
        return _is_a_call(holder, inside[:-1], 0)
    if isinstance(holder, ast.Call) and isinstance(holder.func, ast.Name) and holder.func.id == "enumerate":
        return isinstance(inside[-2], ast.For) and inside[-2].iter is holder and _calls_alone(inside[-2])
    return isinstance(holder, ast.For) and holder.iter is node and _calls_alone(holder)


def _is_of_itself(holder: ast.AST) -> bool:
    """Whether code that has `self` there takes a part of it by name, or asks for its class: it is handed to nobody."""
    if isinstance(holder, ast.Call) and isinstance(holder.func, ast.Name):
        return holder.func.id in ("super", "isinstance", "type", "hasattr", "getattr", "setattr")
    return isinstance(holder, ast.Attribute)


def _is_asked_for(holder: ast.AST) -> bool:
    return isinstance(holder, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in holder.ops)


def _is_checkpoint(call: ast.Call) -> bool:
    """Whether it calls what it is given, as torch.utils.checkpoint's functions do and timm's."""
    return ast.unparse(call.func).rpartition(".")[2].startswith("checkpoint")


def _calls_alone(loop: ast.For) -> bool:
    """Whether a loop does nothing with what it goes through but to call it, or to have `checkpoint` call it."""
    target = loop.target.elts[-1] if isinstance(loop.target, ast.Tuple) else loop.target
    if not isinstance(target, ast.Name):
        return False
    inner = [each for statement in loop.body for each in ast.walk(statement)]
    calls = [each for each in inner if isinstance(each, ast.Call)]
    called = {id(each.func) for each in calls}
    called |= {id(each.args[0]) for each in calls if each.args and _is_checkpoint(each)}
    return all(id(each) in called for each in inner if isinstance(each, ast.Name) and each.id == target.id)


@functools.lru_cache(1024)
def _named(kind: Any) -> _Named:
    return _Named(_reached(kind))


@functools.lru_cache(1024)
def _reached(kind: Any) -> list[types.CodeType]:
    """The code of the methods that a call can reach, and of those of bases that these may call.

    Of all where the class has no forward, which then is an instance's.
    """
    bases = [base for base in kind.__mro__ if not _is_torchs(base)]
    classes = {base.__name__ for base in bases} | {"super", "__class__"}
    reached: set[str] = set()
    todo, codes = ["forward", "__call__"], []
    if kind.forward is nn.Module.forward and not issubclass(kind, CONTAINERS):
        todo += [name for base in bases for name in vars(base)]
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        for base in bases:
            if name not in vars(base):
                continue
            mine = list(reading.codes_of(vars(base)[name]))
            codes += _outermost(vars(base)[name])
            said = {word for code in mine for word in (*code.co_names, *code.co_freevars)}
            todo += [word for word in said if any(word in vars(each) for each in bases)]
            if not said & classes:
                break
    return codes


def _outermost(function: object) -> list[types.CodeType]:
    """The codes of a function that are not inside another of its codes."""
    codes = list(dict.fromkeys(reading.codes_of(function)))
    inside = {code for outer in codes for code in reading.inner(outer) if code is not outer}
    return [code for code in codes if code not in inside]


def _kept(model: nn.Module) -> set[int]:
    """By identity, the modules and tensors that modules' own states lead to, but for what they register.

    Through containers, objects, weak references, functions, their defaults and closures, and modules that these have
    as globals. What leads to a module that holds it leads to nothing new.
    """
    above: dict[nn.Module, set[int]] = collections.defaultdict(set)
    for module in model.modules():
        for inner in module.modules():
            above[inner].add(id(module))
    kept: set[int] = set()
    for module in model.modules():
        seen: set[int] = set()
        todo = [value for key, value in vars(module).items() if key not in ("_modules", "_parameters", "_buffers")]
        todo += [
            v for base in type(module).__mro__ if not _is_torchs(base) for k, v in vars(base).items() if k[:2] != "__"
        ]
        while todo:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if len(seen) > MOST_KEPT:
                return {id(each) for each in model.modules()}
            if issubclass(type(value), Tensor):
                kept.add(id(value))
            elif issubclass(type(value), nn.Module):
                if id(value) not in above[module]:
                    kept |= {id(each) for each in value.modules()}
            else:
                todo += _parts(value)
    return kept


def _parts(value: Any) -> list:
    """What an object holds; a class, and what says that it is what it is not, hold nothing."""
    kind = type(value)
    if issubclass(kind, (type, types.ModuleType, str, bytes, int, float, torch.dtype, torch.device)):
        return []
    if issubclass(kind, dict):
        return [*dict.values(value)]
    if issubclass(kind, (list, tuple, set, frozenset, collections.deque)):
        return [*value]
    if issubclass(kind, types.MethodType):
        return [value.__self__, value.__func__]
    if issubclass(kind, weakref.ReferenceType):
        return [weakref.ReferenceType.__call__(value)]
    if issubclass(kind, functools.partial):
        return [value.func, value.args, value.keywords]
    if issubclass(kind, types.FunctionType):
        globals_ = (value.__globals__.get(name) for code in reading.inner(value.__code__) for name in code.co_names)
        parts = [each for each in globals_ if issubclass(type(each), nn.Module)]
        return [*parts, value.__defaults__, value.__kwdefaults__, *reading.closed_over(value)]
    parts = []
    for name in ("__dict__", *(slot for base in kind.__mro__ for slot in _slots(base))):
        try:
            parts.append(object.__getattribute__(value, name))
        except (AttributeError, TypeError):
            continue
    return parts


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def is_timm_norm(module: object) -> bool:
    """Whether it is timm's batch norm that also drops out and activates, in its modules `drop` and `act`."""
    kind = type(module)
    return kind.__name__ in TIMM_NORMS and kind.__module__.startswith("timm.") and isinstance(module, NORMS)


def doubt_of_timm_norm(norm: Any) -> str | None:
    """Why one of timm's batch norms does more than to normalise and activate as triton_conv can, or other than that."""
    if type(norm.drop) is not nn.Identity:
        return "a dropout follows its batch norm"
    if _is_watched(norm.drop) or _is_watched(norm.act):
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
