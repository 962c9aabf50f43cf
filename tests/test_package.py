"""The package as it is installed: its imports, its layers, and what it leaves alone."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import groupconv

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
PACKAGE = pathlib.Path(groupconv.__file__).parent


def python(code, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_package_called_kernels_is_left_alone(tmp_path):
    """Both import, in either order, and ours never answers to that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'another project'\n")
    show = "print(kernels.owner, groupconv.kernels.__name__)"
    for order in ("import kernels, groupconv.kernels", "import groupconv.kernels, kernels"):
        assert python(f"{order}; {show}", tmp_path, PYTHONPATH=str(tmp_path)) == "another project groupconv.kernels"


def test_import_touches_neither_gpu_nor_files(tmp_path):
    """No CUDA context, no configuration file, no plotting: importing is cheap and safe before a fork."""
    code = """
import sys, torch, groupconv
from groupconv import configs, prepared
assert not torch.cuda.is_initialized()
assert configs.device_files.cache_info().currsize == configs.modelled_defaults.cache_info().currsize == 0
print("matplotlib" in sys.modules, "rich" in sys.modules, len(prepared._CALLS))
"""
    assert python(code, tmp_path) == "False False 0"


def imports(path):
    """The groupconv modules that a file imports when it is imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = node.module or ""
            found |= {base.split(".")[0]} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_point_down():
    """api -> eager -> operators -> prepared -> dispatch -> algorithms -> kernels; problem, cost and devices are the
    ground floor.

    Nothing of the library imports its tools.
    """
    tools = {"cli", "compile_command", "options", "progress", "tuning", "perf_reports"}
    calls = {"api", "eager", "operators", "prepared"}
    above = {
        "problem": calls | {"dispatch", "algorithms", "configs", "cost", "devices", "kernels"},
        "cost": calls | {"dispatch", "algorithms", "configs", "devices"},
        "devices": calls | {"dispatch", "algorithms", "configs"},
        "arguments": calls | {"dispatch", "algorithms", "configs", "cost", "devices", "kernels"},
        "torch_private": calls | {"dispatch", "algorithms", "configs", "cost", "devices", "kernels", "arguments"},
        "configs": calls | {"dispatch"},
        "dispatch": calls | {"kernels"},
        "prepared": {"api", "eager", "operators", "equivalents", "kernels"},
        "operators": {"api", "eager", "equivalents", "dispatch", "kernels"},
        "eager": {"api", "equivalents", "dispatch", "kernels"},
        "equivalents": calls | {"dispatch", "algorithms", "configs", "devices", "kernels"},
        "api": {"modules"},
        "modules": {"eager", "operators", "prepared", "dispatch"},
        "numerics": calls | {"dispatch"},
        "children": calls | {"dispatch"},
        "compile_check": calls,
    }
    for name, forbidden in above.items():
        assert not imports(PACKAGE / f"{name}.py") & (forbidden | tools), name
    kernels = pathlib.Path(python("import groupconv.kernels as k; print(k.__file__)", PACKAGE)).parent
    for path in kernels.glob("*.py"):
        assert "torch" not in imports(path), path.name


def test_no_call_reads_the_environment_or_prints(capfd):
    """A second call of a shape does nothing but launch: nothing on stdout or stderr."""
    import torch

    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3)
    for _ in range(2):
        groupconv.triton_conv(x, w, groups=2)
    assert capfd.readouterr() == ("", "")


WITHOUT = """
import sys, warnings
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
TOO_OLD = """
import sys, types, importlib.machinery
old = types.ModuleType("triton")
old.__version__, old.__path__ = "3.2.0", []
old.__spec__ = importlib.machinery.ModuleSpec("triton", None, is_package=True)
sys.modules["triton"] = old
"""
BROKEN = """
import sys, importlib.abc, importlib.machinery
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name == "triton" else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        raise OSError("libtriton.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
"""
SERVES = """
import torch, torch.nn.functional as F, groupconv
from groupconv import triton_conv, explain
x, w = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
y = triton_conv(x, w, groups=2)
assert torch.equal(y, F.conv2d(x, w, groups=2))
y.sum().backward()
layer = groupconv.convert(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2)))
assert layer(x).shape == (1, 4, 3, 3)
plan = explain(x, w, groups=2, target="nvidia_h200")
assert {each.algorithm for each in plan.passes} == {"torch"} and plan.backward is None
assert explain(x, w, groups=2).fprop.source == "fallback"
try:
    triton_conv(x, w, groups=2, backend=sys.argv[1])
except NotImplementedError as error:
    print(plan.fprop.reason, "|", error)
"""


@pytest.mark.parametrize("backend", ["triton", "triton:row_march"])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        (WITHOUT, "Triton is not installed"),
        (TOO_OLD, "Triton 3.2.0 cannot be used"),
        (BROKEN, "cannot be used (OSError: libtriton.so: cannot open shared object file)"),
    ],
    ids=["missing", "too old", "broken"],
)
def test_imports_and_serves_without_a_triton_that_works(how, says, backend, tmp_path):
    """F.conv2d does it, explain says why, and a backend of ours says the same in NotImplementedError."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:groupconv", "-c", how + SERVES, backend],
        capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason, error = done.stdout.split("|")
    assert says in reason
    assert says in error


def test_a_newer_triton_is_one_line_of_explain(monkeypatch):
    import torch

    from groupconv import algorithms

    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3)
    before = str(groupconv.explain(x, w, groups=2, target="sm_90"))
    monkeypatch.setattr(algorithms, "triton_version", lambda: "4.1.0+git123")
    algorithms.newer_triton.cache_clear()
    try:
        after = str(groupconv.explain(x, w, groups=2, target="sm_90"))
    finally:
        monkeypatch.undo()
        algorithms.newer_triton.cache_clear()
    added = after.removeprefix(before).strip()
    assert after.startswith(before)
    assert added.startswith("Triton 4.1.0+git123 is newer than 3.9.0")
    assert "\n" not in added
