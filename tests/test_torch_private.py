"""Names that PyTorch does not promise to keep: where they are used, and what happens where one is gone."""

import ast
import importlib
import importlib.util
import pathlib
import subprocess
import sys

import pytest
import torch

import groupconv
from groupconv import perf_reports, torch_private

SOURCE = pathlib.Path(torch_private.__file__)
TREE = ast.parse(SOURCE.read_text())
# Of PyTorch's tools, and one that builds for CPUs lack: the others are needed by every call.
DISPENSABLE = {
    "_cuda_getDevice", "_register_builtin", "register_decomposition", "_DEFAULT_OP_LIST_TO_FUSER_METHOD",
}  # fmt: skip


def is_private(module, name=""):
    parts = (*module.split("."), name)
    return parts[0] == "torch" and any(part.startswith("_") and not part.endswith("__") for part in parts)


def taken(tree):
    """(module, name) of each private name of PyTorch that is imported, or read as an attribute of torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module, alias.name) for alias in node.names if is_private(node.module, alias.name))
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(path := ast.unparse(node)):
            yield path, ""


IMPORTED = sorted(taken(TREE))


def test_private_names_are_in_one_file():
    folders = [pathlib.Path(package.__file__).parent for package in (groupconv, perf_reports)]
    users = {path for folder in folders for path in folder.rglob("*.py") if any(taken(ast.parse(path.read_text())))}
    assert users == {SOURCE}


def loaded():
    """The file as a new PyTorch would load it."""
    spec = importlib.util.spec_from_file_location("torch_private_again", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("module", "name"), IMPORTED, ids=[name for _, name in IMPORTED])
def test_a_name_that_is_gone_is_named_or_done_without(module, name, monkeypatch):
    monkeypatch.delattr(importlib.import_module(module), name, raising=name not in DISPENSABLE)
    if name in DISPENSABLE:
        without = loaded()
        assert without.current_gpu is torch.cuda.current_device or "cuda" not in name
        lacking = without.register_decomposition, without.register_scripted, without.fusers_of_quantization
        assert name == "_cuda_getDevice" or None in lacking
    else:
        with pytest.raises(ImportError, match=name):
            loaded()


def test_the_level_of_forward_mode_is_named(monkeypatch):
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    with pytest.raises(AttributeError, match="_current_level"):
        torch_private.is_watched()


def test_calls_do_without_what_tools_lack():
    code = """
import torch, torch._decomp, torch.ao.quantization.fuser_method_mappings as mappings
del torch._decomp.register_decomposition, mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
import groupconv
x, layer = torch.randn(1, 4, 5, 5), torch.nn.Conv2d(4, 4, 3, groups=2)
y = layer(x)
with groupconv.enable():
    assert torch.equal(layer(x), y)
assert torch.equal(groupconv.convert(layer)(x), y)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
