"""Configuration files: reading, refusing and looking up; and what plans make of them."""

import dataclasses
import importlib.resources
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groupconv import cli, configs, cost, devices, dispatch
from groupconv.algorithms import REGISTRY, able, gemm, lack
from groupconv.measuring import command, stub
from groupconv.perf_reports import calibration
from groupconv.problem import PASSES, ConvProblem

PROBLEM = ConvProblem(32, 64, 28, 28, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 16, "bf16")
CONFIG = {"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_K": 32, "SPLITS": 1, "num_warps": 4, "num_stages": 2}
DEPTHWISE = dataclasses.replace(PROBLEM, groups=64)
DIRECT = {"BLOCK_P": 8, "BLOCK_C": 32, "BLOCK_W": 4, "BLOCK_A": 1, "SEGMENTS": 1, "num_warps": 4, "num_stages": 1}
WIDE = ConvProblem(128, 480, 14, 14, 480, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 4, "bf16")
HASHES = configs.kernels_sha256()


def entry(problem=PROBLEM, pass_="fprop", **changes):
    """An entry of a device's file: implicit_gemm at 10 us beside F.conv2d at 30 us."""
    measured = {"algorithm": "implicit_gemm", "config": CONFIG, "time_us": 10.0, "torch_time_us": 30.0}
    return {"key": problem.config_key(pass_), **measured, **changes}


def direct(pass_, **changes):
    return entry(DEPTHWISE, pass_, algorithm="depthwise_direct", config=DIRECT, **changes)


def file_text(*entries, **changes):
    head = {"schema": configs.SCHEMA, "device": "NVIDIA H200", "kernels_sha256": HASHES, "tuned_with": {}}
    return json.dumps({**head, "entries": list(entries), **changes})


def with_config(**changes):
    return file_text(entry(config=CONFIG | changes))


def with_key(**changes):
    return file_text(entry(key=PROBLEM.config_key("fprop") | changes))


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """Writes the user's file of nvidia_h200."""
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(tmp_path))
    configs.reset()

    def write(content):
        path = tmp_path / "nvidia_h200.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        configs.reset()
        return path

    yield write
    configs.reset()


def plan(problem=PROBLEM, backend="auto"):
    return dispatch.plan_pass(problem, "fprop", devices.DEFAULT, backend)


# --- What plans make of them -----------------------------------------------------------------------------------------


def test_exact_entry_is_taken(user_file):
    path = user_file(file_text(entry(), direct("fprop")))
    exact = plan()
    assert (exact.source, exact.algorithm, exact.config) == ("exact", "implicit_gemm", CONFIG)
    assert (exact.time_us, exact.torch_time_us, exact.time_source) == (10.0, 30.0, "measured")
    assert str(path) in exact.reason
    assert (plan(DEPTHWISE).algorithm, plan(DEPTHWISE).config) == ("depthwise_direct", DIRECT)


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({"batch": 16}, "nearest"),
        ({"batch": 8, "h_in": 56, "w_in": 56}, "nearest"),  # as many pixels in larger maps: another tile may be best
        ({"batch": 1, "h_in": 3, "w_in": 3}, "modelled"),  # too far away
        ({"kh": 5, "pad": (2, 2, 1, 1)}, "modelled"),
    ],
)
def test_an_entry_speaks_for_problems_near_it(user_file, changes, source):
    user_file(file_text(entry(dataclasses.replace(PROBLEM, **changes))))
    assert plan().source == source


def test_the_nearest_of_two_entries_speaks(user_file):
    one, sixteen = (dataclasses.replace(PROBLEM, batch=batch) for batch in (1, 16))
    user_file(file_text(entry(one, time_us=1.0), entry(sixteen, time_us=2.0)))
    assert plan().time_us == 2.0


@pytest.mark.parametrize("device", ["nvidia_h100_sxm", "nvidia_h100_pcie", "nvidia_a100_sxm"])
def test_devices_of_an_architecture_have_the_same_tiles(device, tmp_path, monkeypatch):
    """Their times are modelled; where multiprocessors are fewer the work is divided anew."""
    (tmp_path / "nvidia_h200.json").write_text(file_text(entry(), direct("wgrad")))
    monkeypatch.setattr(configs, "shipped_folder", lambda: tmp_path)
    target = devices.named(device)
    configs.reset()
    found = dispatch.plan_pass(PROBLEM, "fprop", target, "triton")
    assert found.source == "modelled"
    assert ("so as on NVIDIA H200 in bf16" in found.reason) == (target.arch == 90)
    assert ((found.algorithm, found.config) == ("implicit_gemm", CONFIG)) == (target.arch == 90)
    first, *_ = dispatch.contenders(PROBLEM, "fprop", target)
    assert (first == ("implicit_gemm", CONFIG)) == (target.arch == 90)
    configs.reset()


def test_kernels_of_16_bits_have_the_same_tiles(user_file):
    user_file(file_text(entry()))
    found = dispatch.plan_pass(dataclasses.replace(PROBLEM, dtype="fp16"), "fprop", devices.DEFAULT, "triton")
    assert (found.source, found.algorithm, found.config) == ("modelled", "implicit_gemm", CONFIG)
    assert "so as on NVIDIA H200 in bf16" in found.reason
    found = dispatch.plan_pass(dataclasses.replace(PROBLEM, dtype="tf32"), "fprop", devices.DEFAULT, "triton")
    assert "so as on" not in found.reason


@pytest.mark.parametrize(
    ("changes", "auto", "ours"),
    [
        ({"time_us": 30.0, "torch_time_us": 10.0}, ("torch", "exact"), "exact"),
        (
            {"algorithm": "torch", "config": {}, "time_us": 30.0},
            ("torch", "exact"),
            "modelled",
        ),  # none of ours is right
        ({"torch_time_us": None}, ("implicit_gemm", "exact"), "exact"),
        ({"algorithm": "winograd"}, ("row_march", "modelled"), "modelled"),  # unknown here
    ],
    ids=["torch-faster", "torch-alone", "torch-failed", "unknown-algorithm"],
)
def test_what_an_entry_says_is_taken(user_file, changes, auto, ours):
    user_file(file_text(entry(**changes)))
    assert (plan().algorithm, plan().source) == auto
    assert (plan(backend="triton").algorithm != "torch", plan(backend="triton").source) == (True, ours)
    assert ("F.conv2d failed" in plan().reason) == ("torch_time_us" in changes and changes["torch_time_us"] is None)


def test_a_configuration_that_does_not_fit_gives_way(user_file):
    """A class holds problems that differ in what a tile may be; its algorithm is kept, its tile is not."""
    user_file(with_config(BLOCK_N=256))
    fitting = plan()
    assert (fitting.algorithm, fitting.source) == ("implicit_gemm", "exact")
    assert fitting.config == dispatch.modelled(PROBLEM, "fprop", devices.DEFAULT, "implicit_gemm")[1]
    assert "does not fit" in fitting.reason


def test_backends_without_a_fused_backward():
    def fused(*arguments, problem=DEPTHWISE, **keywords):
        return dispatch.plan(problem, devices.DEFAULT, *arguments, **keywords).backward

    assert fused("triton").algorithm in able(DEPTHWISE, "backward", devices.DEFAULT)
    assert fused("triton:implicit_gemm") is fused("torch") is fused(refusal="a reason") is None
    assert fused("triton", problem=WIDE) is None


@pytest.mark.parametrize(
    ("gradient", "fused", "is_taken"),
    [
        ({}, {"time_us": 19.0, "torch_time_us": 60.0}, True),
        ({}, {"time_us": 21.0, "torch_time_us": 60.0}, False),  # dgrad and wgrad take 20
        ({"time_us": 1e6, "torch_time_us": 1e7}, None, False),  # a modelled time is not compared with a measured one
    ],
)
def test_a_fused_backward_is_compared_with_both_passes(user_file, gradient, fused, is_taken):
    entries = [direct("dgrad", **gradient), direct("wgrad", **gradient)]
    user_file(file_text(*entries, *([] if fused is None else [direct("backward", **fused)])))
    assert (dispatch.plan(DEPTHWISE, devices.DEFAULT).backward is not None) is is_taken


def test_calibration_corrects_the_model(user_file):
    """Our times by algorithm and pass, F.conv2d's by width class and pass; of changed kernels only the latter."""
    before = plan()
    assert (before.source, before.time_source) == ("modelled", "modelled")
    assert "modelled" in before.reason
    factors = {"ours": {f"{before.algorithm} fprop": 3.0}, "torch": {"narrow fprop": 50.0}}
    user_file(file_text(calibration=factors))
    after = plan(backend=f"triton:{before.algorithm}")
    assert after.time_us == pytest.approx(3.0 * before.time_us)
    assert plan().torch_time_us == pytest.approx(50.0 * after.floor_us)
    assert "as calibrated on nvidia_h200" in after.reason
    others = [name for name in able(PROBLEM, "fprop", devices.DEFAULT) if name != "implicit_gemm"]
    user_file(file_text(calibration={"ours": {f"{name} fprop": 1e3 for name in others}}))
    assert plan(backend="triton").algorithm == "implicit_gemm"
    user_file(file_text(calibration={"torch": {"narrow fprop": 1.01}}))
    assert plan().algorithm == "torch"
    user_file(file_text(calibration=factors, kernels_sha256=HASHES | {f"{before.algorithm}.py": "0" * 64}))
    assert plan().time_us == pytest.approx(before.time_us)
    assert plan().torch_time_us == pytest.approx(50.0 * after.floor_us)


# --- Entries of other kernels ----------------------------------------------------------------------------------------


def test_entries_of_other_kernels_are_left_out(user_file):
    """Those of an algorithm whose file has changed, or one that it is made of; the others hold."""
    tile = dispatch.modelled(WIDE, "fprop", devices.DEFAULT, "row_block_tma")[1]
    entries = [entry(), direct("fprop"), entry(WIDE, algorithm="row_block_tma", config=tile)]
    problems = {"implicit_gemm": PROBLEM, "depthwise_direct": DEPTHWISE, "row_block_tma": WIDE}
    for changed, skipped in (
        ("implicit_gemm.py", {"implicit_gemm"}),
        ("row_block.py", {"row_block_tma"}),  # which imports it
        ("tiles.py", set(problems)),
        ("reduce.py", set(problems)),
        ("row_march.py", set()),
    ):
        for hashes in (HASHES | {changed: "0" * 64}, {name: sha for name, sha in HASHES.items() if name != changed}):
            path = user_file(file_text(*entries, kernels_sha256=hashes))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                holding = {name for name, problem in problems.items() if plan(problem).source == "exact"}
            assert holding == set(problems) - skipped, changed
            says = f"{path}: skipping {len(skipped)} entries that were measured with other kernels"
            assert [says in str(warning.message) for warning in caught] == [True] * bool(skipped)


def test_entries_of_other_kernels_may_have_other_configurations(user_file):
    """A tile size that a later version has named does not make an earlier version's file a damaged one."""
    before = entry(algorithm="row_march", config={"BLOCK_P": 64, "num_warps": 4, "num_stages": 2})
    user_file(file_text(before, direct("fprop"), kernels_sha256=HASHES | {"row_march.py": "0" * 64}))
    with pytest.warns(UserWarning, match="skipping 1 entries that were measured with other kernels"):
        assert plan(DEPTHWISE).source == "exact"
    with pytest.raises(configs.DamagedFile, match=r"^a file: entry 0: config of row_march must have exactly"):
        configs.parse_device(file_text(before, direct("fprop")), "a file")


# --- What cannot be trusted ------------------------------------------------------------------------------------------

DAMAGED = {
    "empty": "",
    "truncated": file_text(entry())[:-20],
    "not-an-object": "[1, 2]",
    "binary": "\x00\x01",
    "other-schema": file_text(schema=1),
    "schema-a-fraction": file_text(schema=float(configs.SCHEMA)),
    "no-schema": json.dumps({"device": "x", "entries": []}),
    "no-device": file_text(device=None),
    "other-device": file_text(entry(), device="NVIDIA H100 PCIe"),
    "stub": file_text(entry(), device="stub"),
    "stub-clock": file_text(entry(), kind="stub"),
    "kind-a-list": file_text(entry(), kind=["measured"]),
    "nested": "[" * 200_000,
    "kernels-not-an-object": file_text(entry(), kernels_sha256=[]),
    "calibration-not-an-object": file_text(calibration=[1.0]),
    "calibration-negative": file_text(calibration={"ours": {"row_march fprop": -1.0}}),
    "calibration-without-a-name": file_text(calibration={"ours": {"": 2.0}}),
    "calibration-without-a-pass": file_text(calibration={"torch": {"wide": 2.0}}),
    "calibration-too-large": file_text(calibration={"ours": {"row_march fprop": 10**400}}),
    "calibration-text": file_text(calibration={"torch": {"wide fprop": "fast"}}),
    "entries-not-a-list": file_text(entries={}),
    "entry-not-an-object": file_text(3),
    "foreign-key": file_text(entry(key={"dtype": "bf16"})),
    "unknown-pass": with_key(**{"pass": "bprop"}),
    "pass-a-list": with_key(**{"pass": ["fprop"]}),
    "dtype-an-object": with_key(dtype={}),
    "unknown-dtype": with_key(dtype="fp8"),
    "layout-a-number": with_key(layout=0),
    "width-a-fraction": with_key(cin_g=4.5),
    "kernel-of-one": with_key(k=[3]),
    "kernel-of-text": with_key(k=["3", "3"]),
    "stride-a-number": with_key(stride=1),
    "bucket-too-large": with_key(m_bucket=10**400),
    "algorithm-a-list": file_text(entry(algorithm=["implicit_gemm"])),
    "algorithm-a-path": file_text(entry(algorithm="../implicit_gemm")),
    "config-of-another-a-list": file_text(entry(algorithm="winograd", config=[1])),
    "bucket-zero": with_key(m_bucket=0),
    "bucket-text": with_key(groups_bucket="16"),
    "block-not-a-power-of-two": with_config(BLOCK_M=48),
    "block-too-small": with_config(BLOCK_K=8),
    "block-true": with_config(BLOCK_K=True),
    "too-many-warps": with_config(num_warps=64),
    "fields-of-another-algorithm": file_text(entry(algorithm="depthwise_direct")),
    "missing-field": file_text(entry(config={"BLOCK_M": 64})),
    "extra-field": with_config(SEGMENTS=2),
    "time-negative": file_text(entry(time_us=-1.0)),
    "time-text": file_text(entry(torch_time_us="fast")),
    "time-nan": file_text(entry(time_us=float("nan"))),
    "time-too-large": file_text(entry(time_us=10**400)),
    "time-true": file_text(entry(time_us=True)),
}


@pytest.mark.parametrize("content", [*DAMAGED.values(), b"\xff\xfe\x80"], ids=[*DAMAGED, "undecodable"])
def test_a_damaged_file_is_named_once_and_skipped(user_file, content):
    path = user_file(content)
    before = path.read_bytes()
    with pytest.warns(UserWarning, match="skipping a configuration file") as caught:
        assert plan().source == plan().source == "modelled"
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert path.read_bytes() == before


PLACES = {
    "a symlink to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "a folder": (lambda path: path.mkdir(), "not a file"),
    "a pipe": (os.mkfifo, "not a file"),
}


@pytest.mark.parametrize(("make", "why"), PLACES.values(), ids=PLACES)
def test_what_is_no_file_is_skipped(user_file, tmp_path, make, why):
    make(tmp_path / "nvidia_h200.json")
    with pytest.warns(UserWarning, match=f"skipping a configuration file: .*nvidia_h200.json: {why}") as caught:
        assert plan().source == plan().source == "modelled"
    assert len(caught) == 1


def test_a_file_in_the_folders_place_is_named(user_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(tmp_path / "file"))
    for _ in range(2):  # and again after what was read is forgotten
        configs.reset()
        with pytest.warns(UserWarning, match="skipping .*file/nvidia_h200.json: Not a directory") as caught:
            assert plan().source == plan().source == "modelled"
        assert len(caught) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["fprop", "bf16", "nhwc", "implicit_gemm", "row_march fprop", "torch", "measured", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value):
    """(container, key) of everything that a JSON value holds."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate(content, draw):
    """Replace, remove or add a value somewhere."""
    container, key = draw(st.sampled_from(list(places(content))))
    how = draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "replace":
        container[key] = draw(JSON)
    elif how == "remove":
        del container[key]
    elif isinstance(container, dict):
        container[draw(st.sampled_from(["", "winograd fprop", "k", "ours"]))] = draw(JSON)
    else:
        container.insert(key, draw(JSON))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_file_stops_a_plan(user_file, data):
    """Whatever became of a whole file, or whatever bytes are in its place: a plan, with at most one warning, which
    names the file.
    """
    calibration = {"ours": {"row_march fprop": 2.0}, "torch": {"narrow fprop": 3.0}}
    whole = file_text(
        entry(), entry(torch_time_us=None), entry(pass_="dgrad"), direct("backward"), calibration=calibration
    )
    content = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(content, data.draw)
    path = user_file(data.draw(st.binary(max_size=40) | st.just(json.dumps(content))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for problem in (PROBLEM, DEPTHWISE, dataclasses.replace(PROBLEM, batch=16)):
            assert all(pass_plan.algorithm for pass_plan in dispatch.plan(problem, devices.DEFAULT).passes)
    assert len(caught) <= 1
    assert all(str(path) in str(warning.message) for warning in caught)


# Everything is loaded before the privileges go, as the Python itself may lie in a folder that its user may not enter.
CONTAINER_USER = """
import json, os, sys, warnings
import importlib.readers, platformdirs, torch
import groupconv
from groupconv import configs, devices, dispatch, prepared
from groupconv.problem import ConvProblem
closed, shown = sys.argv[1:]
x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3)
def called():
    configs.reset(), prepared.reset()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        y = groupconv.triton_conv(x, w, padding=1, groups=2, backend="triton")
        dispatch.plan(ConvProblem(2, 8, 9, 9, 8, 3, 3), devices.DEFAULT)
    assert (y - torch.nn.functional.conv2d(x, w, padding=1, groups=2)).abs().max() < 1e-5
    return [str(configs.user_folder()), *(str(warning.message) for warning in seen)]
for name in ("GROUPCONV_CONFIG_DIR", "XDG_CONFIG_HOME", "HOME", "USER", "LOGNAME"):
    os.environ.pop(name, None)
os.environ["HOME"] = "/"
called()  # loads what is loaded late
os.setgid(54321), os.setuid(54321)
found = {}
for home in (None, closed, "/dev/null", "/nowhere"):
    os.environ.pop("HOME", None)
    if home is not None:
        os.environ["HOME"] = home
    found[str(home)] = called()
os.environ["GROUPCONV_CONFIG_DIR"] = shown
print(json.dumps(found | {"unreadable": called()}))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_users_home_may_be_missing_or_closed(tmp_path):
    """A container's user: no passwd entry, and no HOME or none that may be entered. Calls run, and nothing is said; but
    a file that may not be read is named."""
    with tempfile.TemporaryDirectory() as shown:  # not below pytest's folder, which others may not enter
        os.chmod(shown, 0o755)
        path = os.path.join(shown, "nvidia_h200.json")
        with open(path, "w") as file:
            file.write(file_text(entry()))
        os.chmod(path, 0)
        (tmp_path / "closed").mkdir(mode=0o700)
        done = subprocess.run(
            [sys.executable, "-c", CONTAINER_USER, str(tmp_path / "closed"), shown],
            env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("unreadable") == [shown, f"groupconv: skipping a configuration file: {path}: Permission denied"]
    assert found.pop("/nowhere") == ["/nowhere/.config/groupconv"]
    assert found == {"None": ["None"], str(tmp_path / "closed"): ["None"], "/dev/null": ["None"]}


def test_tuning_without_a_home_asks_for_a_folder(monkeypatch, capsys):
    monkeypatch.setattr(configs, "user_folder", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(command, "this_gpu", lambda: stub.StubLab(devices.DEFAULT))
    assert cli.main(["tune", "--quick"]) == 2
    said = capsys.readouterr().err
    assert said == "groupconv tune: --out: there is no home with a configuration folder here, so it must name one\n"


# --- What is shipped -------------------------------------------------------------------------------------------------


def test_shipped_measurements_are_whole():
    """Every shipped device file parses, was measured with these kernels, and names known algorithms."""
    folder = importlib.resources.files("groupconv.autotune_configs")
    texts = {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith(".json")}
    device_files = {name: text for name, text in texts.items() if "device" in json.loads(text)}
    assert device_files
    for name, text in device_files.items():
        file = configs.parse_device(text, name)
        assert devices.slugify(file.device) == name.removesuffix(".json")
        assert not file.stale, f"{name}: {file.stale} entries were measured with other kernels"
        assert all(measured.algorithm in (*REGISTRY, "torch") for measured in file.entries)


def pointwise(n, dtype):
    """A layer whose GEMM N is n in every pass."""
    return ConvProblem(2, n, 5, 5, n, 1, 1, dtype=dtype)


@pytest.mark.parametrize("target", devices.BY_ARCH)
def test_every_width_has_a_configuration_that_fits(target):
    device = devices.named(target)
    for dtype, pass_, n in itertools.product(("fp16", "fp32"), PASSES, (1, 16, 17, 64, 100, 128, 300, 373, 5000)):
        problem = pointwise(n, dtype)
        if lack("implicit_gemm", problem, pass_, device) is None:
            name, config, _ = dispatch.modelled(problem, pass_, device, "implicit_gemm")
            assert REGISTRY[name].held(problem, pass_, config, device).shared_bytes <= device.shared_bytes
            configs.check_config(name, config)


@pytest.mark.parametrize("width", [40, 56, 72, 112, 168, 232])
def test_columns_are_cut_to_the_group(width):
    """Some columns that candidates try pad the group by little; matrix units that take 16 at least get multiples."""
    tiles = gemm.column_tiles(width, pointwise(width, "bf16"), devices.named("sm_90"))
    assert min(-(-width // size) * size for size in tiles) * 0.85 <= width
    assert all(size % 16 == 0 for size in gemm.column_tiles(width, pointwise(width, "bf16"), devices.named("gfx942")))


def test_the_model_is_as_it_was_fitted():
    """Weights are what the races give, prefer what was fast, and the files' factors are over this model."""
    found = list(calibration.samples(calibration.races()))
    assert len(found) > 2000
    fit = calibration.fits(found)
    assert set(fit) == set(cost.weights())
    for kernel, weights in cost.weights().items():
        assert fit[kernel] == pytest.approx(weights, rel=0.05, abs=0.05), kernel
    lost = calibration.losses(found, calibration.modelled(found, cost.weights()))
    again = calibration.losses(found, calibration.modelled(found, fit))
    assert statistics.geometric_mean(lost) == pytest.approx(statistics.geometric_mean(again), rel=0.01)
    assert statistics.geometric_mean(lost) < 1.15
    for path in calibration.device_files():
        file = configs.parse_device(path.read_text(encoding="utf-8"), path.name)
        assert calibration.factors(file) == file.calibration.ours
