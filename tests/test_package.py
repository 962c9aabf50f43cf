"""The package as it is installed: its imports, its layers, and what it leaves alone."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from pretended import ENVIRONMENT

import groupconv
from groupconv import algorithms, cli, torch_private


def python(code, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_package_called_kernels_is_left_alone(tmp_path):
    """Imported before ours or after it, it is theirs, and ours never answers to that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'another project'\n")
    code = """
import sys, kernels, groupconv.kernels
before = kernels.owner
del sys.modules["kernels"]
import kernels
below = [name for name in sys.modules if name.startswith("kernels.")]
print(before, "|", kernels.owner, "|", groupconv.kernels.__name__, below)
"""
    said = "another project | another project | groupconv.kernels []"
    assert python(code, tmp_path, PYTHONPATH=str(tmp_path)) == said


def test_import_touches_neither_gpu_nor_files(tmp_path):
    """No CUDA context, no configuration file, no plotting: importing is cheap and safe before a fork."""
    code = """
import sys, torch, groupconv
from groupconv import configs, prepared
assert not torch.cuda.is_initialized()
assert configs.device_files.cache_info().currsize == 0
print("matplotlib" in sys.modules, "rich" in sys.modules, len(prepared._CALLS))
"""
    assert python(code, tmp_path) == "False False 0"


def imports(source, module):
    """What the source of a module imports wherever in it, but for type checkers alone: full names and their parents."""
    package, names = module.split(".")[:-1], set()
    waiting = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*(package[: len(package) + 1 - node.level] if node.level else ()), *(node.module or "").split(".")]
            names |= {".".join([*filter(None, base), alias.name]) for alias in node.names}
    return {name[:end] for name in names for end in (*(dot.start() for dot in re.finditer(r"\.", name)), len(name))}


def modules():
    """The library's files by module, those of its packages outside groupconv/ too."""
    folders = {name: pathlib.Path(spec.submodule_search_locations[0]) for name, spec in PARTS.items()}
    return {
        ".".join([name, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }


def breaches(source, module):
    """What a module's source imports and must not: of the library what is above it, in the kernels torch."""
    imported = imports(source, module)
    part = module.split(".")[1] if "." in module else ""
    if part == "kernels":
        return imported & {"torch"}
    tools = {f"groupconv.{name}" for name in TOOLS[TOOLS.index(part) + 1 if part in TOOLS else 0 :]}
    return imported & (tools | {f"groupconv.{name}" for name in ABOVE.get(part, ())})


PARTS = {name: importlib.util.find_spec(name) for name in ("groupconv", "groupconv.kernels", "groupconv.perf_reports")}
# The tools, each of which imports only those before it and the runtime; the runtime none of them.
TOOLS = ("options", "common", "compiling", "measuring", "perf_reports", "cli", "__main__")
CALLS = {"api", "eager", "operators", "prepared", "call", "trial"}
ABOVE = {  # of the runtime: what each module must not import
    "problem": CALLS | {"dispatch", "algorithms", "configs", "cost", "devices", "kernels", "occupancy"},
    "cost": CALLS | {"dispatch", "algorithms", "configs", "devices", "occupancy"},
    "devices": CALLS | {"dispatch", "algorithms", "configs", "occupancy"},
    "occupancy": CALLS | {"dispatch", "algorithms", "configs", "cost", "devices", "kernels"},
    "arguments": CALLS | {"dispatch", "algorithms", "configs", "cost", "devices", "kernels"},
    "torch_private": CALLS | {"dispatch", "algorithms", "configs", "cost", "devices", "kernels", "arguments"},
    "configs": CALLS | {"dispatch", "raced"},
    "raced": CALLS | {"dispatch"},
    "workers": CALLS | {"dispatch", "algorithms", "configs", "cost", "devices", "kernels"},
    "algorithms": CALLS | {"dispatch"},
    "dispatch": CALLS | {"kernels"},
    "trial": {"api", "eager", "operators", "prepared", "call", "kernels"},
    "call": {"api", "eager", "operators", "prepared", "equivalents", "kernels"},
    "prepared": {"api", "eager", "operators", "equivalents", "kernels"},
    "operators": {"api", "eager", "equivalents", "dispatch", "kernels"},
    "eager": {"api", "equivalents", "dispatch", "kernels"},
    "equivalents": CALLS | {"dispatch", "algorithms", "configs", "devices", "kernels"},
    "epilogue": {"api", "batch_norm", "equivalents", "kernels"},
    "batch_norm": {"api", "equivalents", "dispatch"},
    "api": {"layers", "chains", "folding", "fusing", "modules"},
    "layers": {"chains", "folding", "fusing", "modules"},
    "chains": {"api", "folding", "fusing", "modules"},
    "fusing": {"folding", "modules"},
    "folding": {"modules"},
    "modules": {"eager", "operators", "prepared", "call", "trial", "dispatch"},
}


def test_imports_point_down():
    """api -> eager -> operators -> prepared -> dispatch -> algorithms -> kernels, and below them the ground floor."""
    files = modules()
    assert {"groupconv.prepared", "groupconv.algorithms.gemm", "groupconv.kernels.tiles"} <= files.keys()
    assert {name: found for name, path in files.items() if (found := breaches(path.read_text(), name))} == {}


@pytest.mark.parametrize(
    ("module", "source", "breach"),
    [
        ("kernels.tiles", "from torch import nn", "torch"),
        ("kernels.tiles", "import torch.nn", "torch"),
        ("kernels.tiles", "def f():\n    import torch.nn.functional as F", "torch"),
        ("dispatch", "from .prepared import lookup", "groupconv.prepared"),
        ("dispatch", "from . import devices, eager", "groupconv.eager"),
        ("dispatch", "import groupconv.operators as o", "groupconv.operators"),
        ("algorithms.gemm", "from ..measuring import lab", "groupconv.measuring"),
        ("algorithms.gemm", "def f():\n    from ..common.files import read", "groupconv.common"),
        ("common.files", "from ..compiling.compiler import Job", "groupconv.compiling"),
        ("compiling.command", "from ..measuring.lab import Lab", "groupconv.measuring"),
        ("measuring.search", "from ..perf_reports.rows import FIELDS", "groupconv.perf_reports"),
        ("measuring.search", "from groupconv import perf_reports", "groupconv.perf_reports"),
        ("perf_reports.text", "if x:\n    from .. import cli", "groupconv.cli"),
        ("perf_reports.text", "from groupconv.measuring import lab", None),
        ("prepared", "if TYPE_CHECKING:\n    from .api import triton_conv", None),
    ],
)
def test_an_import_that_points_up_is_found(module, source, breach):
    assert breaches(source, f"groupconv.{module}") == (set() if breach is None else {breach})


def used(tree):
    """What a source reads of modules, and calls by a plain name: "time.sleep", "eval"."""
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return attributes | {function.id for function in calls if isinstance(function, ast.Name)}


def forbidden(source):
    """What a source uses that executes or unpickles what it reads, opens connections, or has a shell read commands."""
    tree = ast.parse(source)
    shells = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "shell"}
    parts = {name.partition(".")[0] for name in imports(source, "groupconv.any")}
    return shells | {name for name in used(tree) if EXECUTING.fullmatch(name)} | (parts & MODULES)


EXECUTING = re.compile(
    r"eval|exec|__import__|torch\.(load|hub\..*)|os\.(system|popen)|(dist|torch\.distributed)\.\w+_object\w*"
)
MODULES = {
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy", "code",
    "socket", "ssl", "urllib", "http", "requests", "httpx", "ftplib", "smtplib", "xmlrpc", "asyncio",
}  # fmt: skip
# Of processes that the user started together (torchrun), which tell each other what they measured.
ALLOWED = {"groupconv.measuring.share": {"dist.gather_object"}}


def test_nothing_is_executed_and_no_connection_opened():
    """No source evaluates or unpickles what it reads, and none knows how to reach a host."""
    found = {name: forbidden(path.read_text()) for name, path in modules().items()}
    assert {name: names for name, names in found.items() if names} == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "exec(text)", "import pickle", "from pickle import loads", "torch.load(path)",
        "import urllib.request", "from socket import socket", "subprocess.run(line, shell=True)", "os.system(line)",
        "torch.hub.load(name)", "def f():\n    import http.client", "dist.broadcast_object_list(found)",
    ],
)  # fmt: skip
def test_what_executes_or_connects_is_found(source):
    assert forbidden(source)


def test_no_connection_at_import_or_in_calls(tmp_path):
    """Nor a process that is started, or a file that is written."""
    code = """
import sys, torch, torch._dynamo, triton

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and args[1].strip("rbtU")
    if event.startswith(("socket.", "subprocess.", "urllib.", "pickle.", "os.system", "os.exec", "os.fork")) or writes:
        seen.append((event, args))

seen = []
sys.addaudithook(watch)
import groupconv, groupconv.cli
from groupconv import configs
x, layer = torch.randn(1, 4, 5, 5), torch.nn.Conv2d(4, 4, 3, groups=2)
groupconv.triton_conv(x, layer.weight, groups=2)
groupconv.convert(torch.nn.Sequential(layer))(x).sum().backward()
print(groupconv.explain(x, layer.weight, groups=2, target="h100").fprop.algorithm)
assert not seen, seen
open("written", "w").close()
assert seen
"""
    assert python(code, tmp_path, PYTHONDONTWRITEBYTECODE="1")


STEADY = {"monotonic", "perf_counter", "process_time", "sleep"}


def test_nothing_goes_by_a_clock_that_jumps():
    """Durations are of a clock that does not; the time of day is a label, and of no file is it asked how old it is."""
    labels = set()
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        names = used(tree)
        assert {each.removeprefix("time.") for each in names if re.fullmatch(r"time\.\w+", each)} <= STEADY, name
        assert not any(re.search(r"[macu]time\b|getatime", each) for each in names if "monotonic" not in each), name
        assert not any(isinstance(node, ast.ImportFrom) and node.module == "time" for node in ast.walk(tree)), name
        labels |= {name for each in names if each.startswith("datetime.datetime.")}
    assert labels == {"groupconv.common.files", "groupconv.raced"}


def test_no_call_reads_the_environment_or_prints(capfd):
    """A second call of a shape does nothing but launch: nothing on stdout or stderr."""
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
OLDER = """
import triton
triton.__version__ = "3.5.1"
del triton.runtime.driver._active  # which 3.4 calls otherwise
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
assert {pass_plan.algorithm for pass_plan in plan.passes} == {"torch"} and plan.backward is None
assert explain(x, w, groups=2).fprop.source == "fallback"
for backend in ("triton", "triton:row_march"):
    try:
        triton_conv(x, w, groups=2, backend=backend)
    except NotImplementedError as error:
        print(plan.fprop.reason, "|", error)
"""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (WITHOUT, "Triton is not installed"),
        (TOO_OLD, "Triton 3.2.0 cannot be used; 3.6.0 or newer is needed"),
        (OLDER, "Triton 3.5.1 cannot be used; 3.6.0 or newer is needed"),
        (BROKEN, "cannot be used (OSError: libtriton.so: cannot open shared object file)"),
    ],
    ids=["missing", "too old", "older", "broken"],
)
def test_imports_and_serves_without_a_triton_that_works(how, says, tmp_path):
    """F.conv2d does it, explain says why, and backends of ours say the same in NotImplementedError."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:groupconv", "-c", how + SERVES],
        capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert all(says in reason and says in error for reason, error in (line.split("|") for line in said))


@pytest.mark.parametrize("command", ["report", "compile", "tune --stub --out x", "bench --stub --out x", "advise"])
def test_commands_say_why_they_cannot_run(command, monkeypatch, capsys):
    monkeypatch.setattr(algorithms, "UNUSABLE", "Triton 3.5.1 cannot be used")
    assert cli.main(command.split()) == 2
    assert capsys.readouterr() == ("", f"groupconv {command.split()[0]}: Triton 3.5.1 cannot be used\n")


def test_an_older_torch_is_named(tmp_path):
    code = """
import torch
torch.__version__ = "2.8.0"
del torch._C._get_fp32_precision_getter
try:
    import groupconv
except ImportError as error:
    print(error)
"""
    said = python(code, tmp_path)
    assert said.startswith(
        "groupconv: PyTorch 2.11 or newer is needed, and 2.13 was tried; of 2.8.0: cannot import name"
    )
    assert "_get_fp32_precision_getter" in said


def test_versions_are_those_of_the_project():
    """What messages say is needed, or was tried, is what the project's files have."""
    root = pathlib.Path(__file__).parents[1]
    wanted, pinned = (root / "pyproject.toml").read_text(), (root / "constraints.txt").read_text()
    tried = re.search(r"Tried with torch (\S+) and (\S+), Triton (\S+) to (\S+)\.", wanted).groups()
    oldest, newest = (version.removesuffix(".0") for version in algorithms.TESTED_TRITON)
    assert tried == (torch_private.OLDEST_TORCH, torch_private.TESTED_TORCH, oldest, newest)
    assert re.search(r'"torch>=(\S+)", "triton>=(\S+);', wanted).groups() == (tried[0], oldest)
    assert f"torch=={torch_private.TESTED_TORCH}." in pinned


def test_a_newer_triton_is_one_line_of_explain(monkeypatch):
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


def test_one_version_of_ruff():
    """What formats before a commit is what `make lint` asks."""
    root = pathlib.Path(__file__).parents[1]
    wanted = re.findall(r"ruff==([\d.]+)", (root / "pyproject.toml").read_text())
    hooks = re.findall(r"ruff==([\d.]+)", (root / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 2
    assert set(hooks) == set(wanted)
