"""The build for Hugging Face's Hub: the rules of its documentation, and that it runs beside others and the installed
package. It is loaded as the package `kernels` does, which has some 40 dependencies: that itself is asked where it is
installed.
"""

import ast
import base64
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import types
from unittest import mock

import filelock
import platformdirs
import pytest
import torch
import torch.nn.functional as F
from pretended import ENVIRONMENT
from torch import nn

import groupconv
from groupconv import devices

ROOT = pathlib.Path(__file__).parents[1]


def from_file(name, path):
    """A module or package from its file, by a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub_build = from_file("hub_build", ROOT / "hub" / "build.py")


def load(variant):
    """What kernels.get_kernel makes of a variant's folder."""
    return from_file(json.loads((variant / "metadata.json").read_text())["id"], variant / "__init__.py")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    hub_build.build(out)
    return out


@pytest.fixture(scope="module")
def kernel(project):
    return load(project / "build/torch-cuda")


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """A build of other sources, as far as anybody can tell."""
    out = tmp_path_factory.mktemp("another")
    hub_build.build(out, "another")
    return load(out / "build/torch-cuda")


@pytest.fixture
def small(kernel, another, few_programs, monkeypatch):
    """What few_programs and the tests' start do to the package: no measurements, and a GPU of one multiprocessor."""
    for library in (kernel.library, another.library):
        monkeypatch.setattr(library.configs, "shipped_folder", lambda: ROOT / "none")
        monkeypatch.setattr(library.prepared, "target_of", groupconv.prepared.target_of)
        library.configs.reset(), library.prepared.reset()
    yield
    for library in (kernel.library, another.library):
        library.configs.reset(), library.prepared.reset()


def files(folder):
    """Those of a folder by path, without what Python compiled of a build that was loaded."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix(): path for path in found}


# --- Rules -----------------------------------------------------------------------------------------------------------


def test_the_project_has_what_the_builder_takes(project):
    tomllib = pytest.importorskip("tomllib")
    said = tomllib.loads((project / "build.toml").read_text())
    general, hub, noarch = said["general"], said["general"].pop("hub"), said["torch-noarch"]
    assert general | hub | noarch == hub_build.settings()
    assert general["edition"] == 5
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"])
    assert {path.name for path in project.iterdir()} == {
        "build.toml", "CARD.md", "flake.nix", "LICENSE", "torch-ext", "build"
    }  # fmt: skip
    sources = files(project / "torch-ext/groupconv")
    assert "_ops.py" not in sources  # the builder writes it
    assert {path.suffix for path in sources.values()} == {f".{suffix}" for suffix in noarch["pyext"]}
    assert not any(name.startswith("groupconv") for name in sources)


@pytest.mark.parametrize("backend", ["cuda", "rocm"])
def test_a_variant_is_what_its_metadata_says(project, backend):
    folder = project / f"build/torch-{backend}"
    metadata = json.loads((folder / "metadata.json").read_text())
    assert re.fullmatch(rf"_groupconv_{backend}_[0-9a-f]{{10}}", metadata["id"])
    assert (metadata["name"], metadata["license"], metadata["python-depends"]) == ("groupconv", "Apache-2.0", [])
    assert type(metadata["version"]) is int
    assert metadata["backend"] == {"type": backend}
    contents = files(folder)
    del contents["metadata.json"]
    digests = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in contents.items()}
    assert metadata["digest"]["algorithm"] == "sha256"
    assert metadata["digest"]["files"] == {name: base64.b64encode(each).decode() for name, each in digests.items()}
    assert contents.keys() == files(project / "torch-ext/groupconv").keys() | {"_ops.py"}
    assert f'"{metadata["id"]}"' in contents["_ops.py"].read_text()


def test_builds_differ_by_what_is_in_them():
    sources = hub_build.package(["py", "json"])
    changed = sources | {"library/kernels/tiles.py": sources["library/kernels/tiles.py"] + b"\n"}
    assert hub_build.unique(sources) == hub_build.unique(dict(reversed(sources.items())))
    assert hub_build.unique(sources) != hub_build.unique(changed)


def breaches(name, source, shipped):
    """What a source of a variant does that the Hub's rules forbid: it imports others than the standard library, torch
    and triton, or what is not shipped; it goes by the package's name, or by another namespace of operators.
    """
    tree, found = ast.parse(source, feature_version=(3, 10)), []
    folder = name.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] not in ALLOWED]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module] if node.module.split(".")[0] not in ALLOWED else []
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) + 1 - node.level], *filter(None, (node.module or "").split("."))]
            targets = [base] if node.module else [[*base, alias.name] for alias in node.names]
            for target in map("/".join, targets):
                found += [] if {f"{target}.py", f"{target}/__init__.py"} & shipped else [target]
            found += [name] if node.level > len(folder) + 1 else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"^groupconv(?:\.\w+|::\w+)+$", node.value)
        elif isinstance(node, ast.Call) and REGISTERS.match(ast.unparse(node.func)):
            found += [] if PREFIXED.match(ast.unparse(node.args[0])) else [ast.unparse(node)]
    return found


ALLOWED = sys.stdlib_module_names | {"torch", "triton"}
REGISTERS = re.compile(r"torch\.library\.(Library|register_|custom_op|triton_op|define|impl)")
PREFIXED = re.compile(r"add_op_namespace_prefix\(")


def test_sources_keep_to_the_rules(project):
    contents = files(project / "build/torch-cuda")
    sources = {name: path.read_text() for name, path in contents.items() if name.endswith(".py")}
    found = {name: breaches(name, source, contents.keys()) for name, source in sources.items()}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("source", "breach"),
    [
        ("import platformdirs", ["platformdirs"]),
        ("def f():\n    from groupconv import api", ["groupconv"]),
        ("from .measuring import lab", ["library/measuring"]),
        ("from . import cli, api", ["library/cli"]),
        ("from ..layers import Conv2d", []),
        ("from ...other import x", ["other", "library/some.py"]),
        ("files('groupconv.kernels')", ["groupconv.kernels"]),
        ("@torch.library.register_fake('a::b')\ndef f(): ...", ["torch.library.register_fake('a::b')"]),
        ("import torch.nn, triton.language as tl, json", []),
    ],
)
def test_a_breach_of_the_rules_is_found(source, breach):
    assert breaches("library/some.py", source, {"library/api.py", "layers.py"}) == breach


def test_what_is_public(project, kernel):
    """The list is a literal, as the builder reads it: all that the package has, and layers."""
    tree = ast.parse((project / "torch-ext/groupconv/__init__.py").read_text())
    (names,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert sorted(names) == sorted([*groupconv.__all__, "layers"])
    assert all(hasattr(kernel, name) for name in names)


# --- Calls -----------------------------------------------------------------------------------------------------------


def test_builds_and_the_package_run_side_by_side(kernel, another, small, ieee, device):
    """Each by its own kernels and operators, to the same numbers, which are F.conv2d's."""
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 7, 6, generator=drawn).to(device).requires_grad_()
    w = torch.randn(12, 4, 3, 3, generator=drawn).to(device).requires_grad_()
    y = F.conv2d(x, w, padding=1, groups=2)
    dy = torch.randn(y.shape, generator=drawn).to(device)
    expected = [y, *torch.autograd.grad(y, (x, w), dy)]
    namespaces = set()
    for module in (kernel, another, groupconv):
        y = module.triton_conv(x, w, padding=1, groups=2, backend="triton")
        found = [y, *torch.autograd.grad(y, (x, w), dy)]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        library = getattr(module, "library", module)
        namespaces.add(library.operators.conv2d.default.namespace)
        call = next(iter(library.prepared._CALLS.values()))
        assert call.__class__.__module__.startswith(f"{module.__name__}.")
    assert namespaces == {kernel.__name__, another.__name__, "groupconv"}


def test_a_build_in_a_compiled_graph(kernel, another, small, ieee, device):
    """As one operator, which is that build's."""
    x, w = torch.randn(1, 4, 6, 6, device=device), torch.randn(4, 2, 3, 3, device=device, requires_grad=True)
    graphs = []

    def kept(graph, inputs):
        graphs.append({node.target for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    for module in (kernel, another):
        call = torch.compile(
            lambda x, w, module=module: module.triton_conv(x, w, groups=2, backend="triton"),
            backend=kept, fullgraph=True,
        )  # fmt: skip
        y = call(x, w)
        torch.testing.assert_close(y, F.conv2d(x, w, groups=2), rtol=2e-3, atol=2e-3)
        y.sum().backward()
        assert getattr(torch.ops, module.__name__).conv2d in graphs[-1]


def test_configurations_are_the_packages(kernel):
    """The measurements hold for the kernels of the build, which are those of the package."""
    ours, theirs = groupconv.configs, kernel.library.configs
    assert ours.kernels_sha256() == theirs.kernels_sha256()
    text = theirs.shipped_folder().joinpath("nvidia_h200.json").read_text()
    assert theirs.parse_device(text, "").stale == ours.parse_device(text, "").stale
    x, w = torch.empty(8, 64, 28, 28, device="meta"), torch.empty(64, 4, 3, 3, device="meta")
    plans = [module.explain(x, w, padding=1, groups=16, target="sm_86") for module in (kernel, groupconv)]
    assert str(plans[0]) == str(plans[1])


def test_a_build_compiles_in_other_processes(kernel, tmp_path):
    """For trials: under the build's name, which no search finds."""
    on = devices.named("sm_90")
    problem = kernel.ConvProblem(2, 8, 8, 8, 8, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 8, "bf16")
    name, config, _ = kernel.library.dispatch.best(problem, "fprop", on, ["depthwise_direct"])
    fields = {"pass_": "fprop", "problem": dataclasses.asdict(problem), "target": on.arch_name, "on": None}
    job = {"algorithm": name, "config": config, "strides": None, "folder": str(tmp_path / "cache"), **fields}
    answer = kernel.library.trial.submit(job).result(300)
    kernel.library.trial.end_processes()
    assert answer["failed"] == ""
    assert list((tmp_path / "cache").rglob("*.cubin"))


# --- Layers ----------------------------------------------------------------------------------------------------------

LAYERS = ("Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d")
CALLED = {"Conv1d": "conv1d", "Conv2d": "triton_conv"}
CALLED |= {f"ConvTranspose{axes}d": f"conv_transpose{axes}d" for axes in (1, 2)}


def replaced(kernel, layer, name):
    """A layer as kernels.kernelize leaves it."""
    layer.forward = types.MethodType(getattr(kernel.layers, name).forward, layer)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_pure(kernel, name):
    """What kernels.kernelize asks of a layer before it takes its forward."""
    layer, native = getattr(kernel.layers, name), getattr(nn, name)
    assert layer.__init__ is nn.Module.__init__
    more = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert more == {"can_torch_compile"}
    parameters, wanted = (inspect.signature(kind.forward).parameters.values() for kind in (layer, native))
    assert [(each.name, each.kind) for each in parameters] == [(each.name, each.kind) for each in wanted]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_replaced_forward(kernel, name, compiled, ieee, device):
    layer = getattr(nn, name)(4, 8, 3, stride=2, padding=1, groups=2, device=device)
    x = torch.randn(2, 4, *[7] * int(name[-2]), device=device)
    expected = layer(x)
    with mock.patch.object(kernel.layers, CALLED[name], wraps=getattr(kernel, CALLED[name])) as ours:
        found = replaced(kernel, layer, name)(x)
        assert ours.call_count == 1
    if compiled:
        found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert layer.weight.grad is not None


class Tripled(nn.Conv2d):
    def forward(self, input):
        return 3 * super().forward(input)


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3), Tripled(4, 4, 3, groups=2), Standardized(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="reflect"),
    ],
    ids=["ungrouped", "forward", "convolution", "reflect"],
)  # fmt: skip
def test_other_layers_stay_what_they_are(kernel, layer):
    x = torch.randn(1, 4, 6, 6)
    expected = layer(x)
    with mock.patch.object(kernel.layers, "triton_conv") as ours:
        assert torch.equal(replaced(kernel, layer, "Conv2d")(x), expected)
    assert not ours.called


# --- In place of platformdirs and filelock ---------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no Triton")
@pytest.mark.parametrize("home", [None, "", "/somewhere", "relative"])
def test_the_users_folder_is_the_packages(kernel, monkeypatch, home):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("XDG_CONFIG_HOME", home)
    theirs = platformdirs.user_config_path("groupconv", appauthor=False)
    assert kernel.library.outside.user_config_path() == theirs == groupconv.outside.user_config_path()


def hold(path, held, over):
    with filelock.FileLock(path):
        held.set()
        over.wait(60)


def test_a_lock_is_the_packages(kernel, tmp_path):
    """Of two processes, one with the package and one with a build, one has it."""
    path, outside = str(tmp_path / "lock"), kernel.library.outside
    with outside.alone(path), pytest.raises(TimeoutError), groupconv.outside.alone(path, 0.1):
        pass
    context = multiprocessing.get_context("fork")
    held, over = context.Event(), context.Event()
    other = context.Process(target=hold, args=(path, held, over))
    other.start()
    assert held.wait(60)
    with pytest.raises(TimeoutError, match="is locked"), outside.alone(path, 0.1):
        pass
    over.set()
    with outside.alone(path):
        pass
    other.join()
    with mock.patch.object(outside, "fcntl", None), pytest.raises(NotImplementedError), outside.alone(path):
        pass


# --- The package `kernels` itself ------------------------------------------------------------------------------------

LOADED = """
import pathlib, sys
try:
    from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, replace_kernel_forward_from_hub
    from kernels import get_loaded_kernels, use_kernel_mapping
except ImportError:
    sys.exit(77)
import torch, torch.nn.functional as F
from torch import nn

variant = pathlib.Path(sys.argv[1])
kernel = get_local_kernel(variant)
assert get_loaded_kernels()[0].metadata.id == kernel.__name__
x, w = torch.randn(1, 4, 6, 6), torch.randn(4, 2, 3, 3)
torch.testing.assert_close(kernel.triton_conv(x, w, groups=2, backend="triton"), F.conv2d(x, w, groups=2))

replace_kernel_forward_from_hub(nn.Conv2d, "Conv2d")
model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
expected = model(x)
layer = LocalLayerRepository(repo_path=variant, layer_name="Conv2d")
with use_kernel_mapping({"Conv2d": {"cpu": layer}}, inherit_mapping=False):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
assert model[0].forward.__func__ is kernel.layers.Conv2d.forward
torch.testing.assert_close(model(x), expected)
"""


def test_the_package_kernels_loads_it(project, tmp_path):
    """And takes its layers. Not from the checkout's root, where kernels/ would be taken for it."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(project / "build/torch-cuda")],
        capture_output=True, text=True, cwd=tmp_path,
        env=ENVIRONMENT | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("kernels is not installed")
    assert done.returncode == 0, done.stderr


def test_the_command_builds_it(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "hub" / "build.py", tmp_path / "out", "--unique-id", "abc"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metadata = json.loads((tmp_path / "out/build/torch-rocm/metadata.json").read_text())
    assert metadata["id"] == "_groupconv_rocm_abc"
