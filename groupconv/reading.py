"""What the code of a function says of the modules that it calls, read in its source; nothing of it is run.

A source is believed only if it compiles to the very code.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import linecache
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import torch_private

Function = ast.FunctionDef | ast.Lambda
NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp,
          ast.GeneratorExp)  # fmt: skip
# Flags of code that stops and goes on when others want it to.
RESUMED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclasses.dataclass(frozen=True)
class Call:
    """A call, with one argument, of what lies under a path of attributes from a local variable.

    alone: on its lines nothing is called but what its run calls.
    """

    root: str
    path: tuple[str, ...]
    lines: range
    alone: bool


Run = tuple[Call, ...]  # one after another: each is the only one that gets the result of the one before


@functools.lru_cache(4096)
def runs(code: types.CodeType) -> tuple[Run, ...]:
    """Those in a function's code; none where its source is not at hand."""
    node = function(code)
    return () if node is None else _Calls(node, code).runs()


@functools.lru_cache(4096)
def function(code: types.CodeType) -> Function | None:
    """A function's syntax tree, if its source is at hand and compiles to this code."""
    found = _functions(code.co_filename, "".join(linecache.getlines(code.co_filename)))
    return found.get(code)


@functools.lru_cache(64)
def _functions(filename: str, source: str) -> dict[types.CodeType, Function]:
    """The functions of a file by their code, if there is one of each name in its line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of code that is not ours
            tree = ast.parse(source)
            codes = list(inner(compile(source, filename, "exec", dont_inherit=True)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    nodes: dict[tuple[int, str], list[Function]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
            nodes.setdefault((first, getattr(node, "name", "<lambda>")), []).append(node)
    found = {}
    for code in codes:
        candidates = nodes.get((code.co_firstlineno, code.co_name), [])
        if len(candidates) == 1:
            found[code] = candidates[0]
    return found


def inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from inner(constant)


def closed_over(function: types.FunctionType) -> Iterator[object]:
    """The values of a function's closure."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty
            yield cell.cell_contents


def codes_of(value: object, seen: set[int] | None = None) -> Iterator[types.CodeType]:
    """The codes of a function, of what it wraps, and of what a method or property of a class is made of."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: list[object] = []
    if isinstance(value, types.FunctionType):
        yield from inner(value.__code__)
        parts += (*closed_over(value), vars(value).get("__wrapped__"))
    elif isinstance(value, property):
        parts += (value.fget, value.fset, value.fdel)
    elif isinstance(value, (classmethod, staticmethod, types.MethodType)):
        parts.append(value.__func__)
    elif isinstance(value, (functools.partial, functools.partialmethod)):
        parts.append(value.func)
    for part in parts:
        yield from codes_of(part, seen)


def path_of(node: ast.expr) -> tuple[str, tuple[str, ...]] | None:
    """A local variable and the attributes from there, of an expression that is nothing else."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    return (node.id, tuple(reversed(path))) if path and isinstance(node, ast.Name) else None


class _Calls:
    """The calls in a function's own code, and which of them takes another's result alone."""

    def __init__(self, node: Function, code: types.CodeType):
        self.body = node.body if isinstance(node.body, list) else [node.body]
        whole = [each for part in self.body for each in ast.walk(part)]
        self.all = [each for each in whole if isinstance(each, ast.Call)]
        self.stored = {each.id for each in whole if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}
        shared = (name for each in whole if isinstance(each, (ast.Global, ast.Nonlocal)) for name in each.names)
        self.elsewhere = {*code.co_cellvars, *shared}
        self.own = [each for part in self.body for each in _own(part)]
        self.next: dict[ast.Call, ast.Call] = {}
        if code.co_flags & RESUMED:
            return
        for call in self.own:
            if self._is_plain(call) and self._is_plain(call.args[0]):
                self.next[call.args[0]] = call
        for block in self._blocks(self.body):
            for statement, following in itertools.pairwise(block):
                self._link(statement, following)

    def _is_plain(self, node: ast.AST) -> bool:
        """Whether it is a call of a path, from a variable that nothing changes, with one argument."""
        if (
            not isinstance(node, ast.Call)
            or node.keywords
            or len(node.args) != 1
            or isinstance(node.args[0], ast.Starred)
        ):
            return False
        found = path_of(node.func)
        return found is not None and found[0] not in self.stored

    def _blocks(self, body: list) -> Iterator[list]:
        """Statements that follow one another; none inside try, where others may follow."""
        yield body
        for statement in body:
            if isinstance(statement, (ast.If, ast.For, ast.While, ast.With)):
                yield from self._blocks(statement.body)
                yield from self._blocks(getattr(statement, "orelse", []))

    def _link(self, statement: ast.AST, following: ast.AST) -> None:
        """A call whose result is a variable, and the one that takes this before it is another's."""
        name = _assigned(statement)
        if name is None or name in self.elsewhere or not self._is_plain(statement.value):  # type: ignore[attr-defined]
            return
        if _assigned(following) != name and not isinstance(following, ast.Return):
            return
        loads = [
            each for each in ast.walk(following)
            if isinstance(each, ast.Name) and each.id == name and isinstance(each.ctx, ast.Load)
        ]  # fmt: skip
        takers = [each for each in _own(following) if self._is_plain(each) and each.args[0] in loads]
        if len(loads) == len(takers) == 1:
            self.next[statement.value] = takers[0]  # type: ignore[attr-defined]

    def runs(self) -> tuple[Run, ...]:
        plain, taken = [call for call in self.own if self._is_plain(call)], set(self.next.values())
        found = []
        for call in plain:
            if call not in taken:
                run = [call]
                while run[-1] in self.next:
                    run.append(self.next[run[-1]])
                found.append(tuple(self._described(each, run) for each in run))
        return tuple(found)

    def _described(self, call: Any, run: list[ast.Call]) -> Call:
        found, lines = path_of(call.func), range(call.lineno, (call.end_lineno or call.lineno) + 1)
        beside = (each for each in self.all if each.lineno < lines.stop and (each.end_lineno or 0) >= lines.start)
        assert found is not None
        return Call(*found, lines, all(each in run for each in beside))


def _own(node: ast.AST) -> Iterator[Any]:
    """The calls of a statement or expression, but for those of functions and comprehensions in it."""
    if isinstance(node, NESTED):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _own(child)


def _assigned(statement: ast.AST) -> str | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


# --- At a call's own time --------------------------------------------------------------------------------------------


def child(module: object, name: str) -> Any:
    """The module that an attribute of a module is, if it can be nothing else; or None."""
    kind: Any = type(module)
    if not isinstance(module, nn.Module) or name in vars(module) or hasattr(kind, name):
        return None
    if kind.__getattr__ is not nn.Module.__getattr__ or kind.__getattribute__ is not object.__getattribute__:
        return None
    return module._modules.get(name)


def followers(module: nn.Module, depth: int) -> tuple[nn.Module, ...]:
    """The modules that take the result of a call in progress, one after another, each alone that of the one before.

    By the code that made the call, which is the first `depth` frames up or more that is not nn.Module's own.
    """
    frame: Any = sys._getframe(depth + 1)
    while frame is not None and frame.f_code in torch_private.CODES_OF_MODULE_CALLS:
        frame = frame.f_back
    if frame is None:
        return ()
    if frame.f_code is nn.Sequential.forward.__code__:
        return _next_in_sequence(_local(frame, "self"), module)
    for run in runs(frame.f_code):
        for at, call in enumerate(run):
            if call.alone and frame.f_lineno in call.lines:
                root = _local(frame, call.root)
                found: list[Any] = [functools.reduce(child, each.path, root) for each in run if each.root == call.root]
                if len(found) == len(run) and found[at] is module and _once(module, found) and None not in found:
                    return tuple(found[at + 1 :])
    return ()


def _local(frame: Any, name: str) -> object:
    values = frame.f_locals
    found = values.get(name)
    if isinstance(values, dict):  # a copy, which would keep all that it holds until the function ends
        values.clear()
    return found


def _next_in_sequence(sequence: object, module: nn.Module) -> tuple[nn.Module, ...]:
    if not isinstance(sequence, nn.Sequential) or type(sequence).__iter__ is not nn.Sequential.__iter__:
        return ()
    found: list[Any] = list(sequence._modules.values())
    return tuple(found[found.index(module) + 1 :]) if _once(module, found) else ()


def _once(module: object, found: list) -> bool:
    return sum(each is module for each in found) == 1
