"""The package as it is installed: its imports, its layers, and what it leaves alone."""

import ast
import os
import pathlib
import subprocess
import sys

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
from groupconv import configs, ops
assert not torch.cuda.is_initialized()
assert configs.device_files.cache_info().currsize == configs.modelled_defaults.cache_info().currsize == 0
print("matplotlib" in sys.modules, "rich" in sys.modules, len(ops._CALLS))
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
    """api -> ops -> dispatch -> algorithms -> kernels; problem, cost and devices are the ground floor.

    Nothing of the library imports its tools.
    """
    tools = {"cli", "compile_command", "options", "progress", "tuning", "perf_reports"}
    above = {
        "problem": {"api", "ops", "dispatch", "algorithms", "configs", "cost", "devices", "kernels"},
        "cost": {"api", "ops", "dispatch", "algorithms", "configs", "devices"},
        "devices": {"api", "ops", "dispatch", "algorithms", "configs"},
        "configs": {"api", "ops", "dispatch"},
        "dispatch": {"api", "ops", "kernels"},
        "ops": {"api", "equivalents"},
        "equivalents": {"api", "ops", "dispatch", "algorithms", "configs", "devices", "kernels"},
        "api": {"modules"},
        "modules": {"ops", "dispatch"},
        "numerics": {"api", "ops", "dispatch"},
        "children": {"api", "ops", "dispatch"},
        "compile_check": {"api", "ops"},
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
