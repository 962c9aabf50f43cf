"""Configuration files: reading, refusing and looking up; and what the plans make of them."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groupconv import cli, configs, devices, dispatch
from groupconv.problem import ConvProblem

CONFIG = {"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_K": 32, "SPLITS": 1, "num_warps": 4, "num_stages": 2}
PROBLEM = ConvProblem(32, 64, 28, 28, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 16, "bf16")


def entry(problem=PROBLEM, pass_="fprop", time=10.0, torch_time=30.0, **changes):
    key = problem.config_key(pass_)
    made = {
        "key": key, "algorithm": "implicit_gemm", "config": dict(CONFIG), "time_us": time, "torch_time_us": torch_time
    }  # fmt: skip
    return made | changes


def file_text(*entries, **changes):
    data = {
        "schema": configs.SCHEMA, "device": "NVIDIA H200", "kernels_sha256": configs.kernels_sha256(),
        "tuned_with": {}, "entries": list(entries),
    }  # fmt: skip
    return json.dumps(data | changes)


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """Writes the user's file of nvidia_h200."""
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(tmp_path))
    configs.reset()

    def write(text):
        path = tmp_path / "nvidia_h200.json"
        path.write_text(text)
        configs.reset()
        return path

    yield write
    configs.reset()


def plan(problem=PROBLEM, backend="auto"):
    return dispatch.plan_pass(problem, "fprop", devices.DEFAULT, backend)


def test_exact_entry_is_taken(user_file):
    path = user_file(file_text(entry()))
    found = plan()
    assert (found.source, found.algorithm, found.config) == ("exact", "implicit_gemm", CONFIG)
    assert (found.time_us, found.torch_time_us, found.time_source) == (10.0, 30.0, "measured")
    assert str(path) in found.reason


def test_nearest_entry_differs_only_in_batch_or_groups(user_file):
    far = ConvProblem(1, 64, 28, 28, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 16, "bf16")
    near = ConvProblem(16, 64, 28, 28, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 16, "bf16")
    other = ConvProblem(32, 64, 28, 28, 64, 5, 5, (1, 1), (2, 2, 2, 2), (1, 1), 16, "bf16")
    user_file(file_text(entry(far, time=1.0), entry(near, time=2.0), entry(other, time=3.0)))
    found = plan()
    assert (found.source, found.time_us) == ("nearest", 2.0)


def test_entries_too_far_away_do_not_speak(user_file):
    tiny = ConvProblem(1, 64, 3, 3, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 16, "bf16")
    user_file(file_text(entry(tiny)))
    assert plan().source == "modelled"


def test_torch_is_taken_where_it_measured_faster(user_file):
    user_file(file_text(entry(time=30.0, torch_time=10.0)))
    assert (plan().algorithm, plan().source) == ("torch", "exact")
    assert plan(backend="triton").algorithm == "implicit_gemm"


def test_modelled_plan_says_so(user_file):
    user_file(file_text())
    found = plan(backend="triton")
    assert (found.source, found.time_source) == ("modelled", "modelled")
    assert "modelled" in found.reason
    assert found.config is not None


def _with_config(**changes):
    return file_text(entry(config=CONFIG | changes))


def _with_key(**changes):
    return file_text(entry(key=PROBLEM.config_key("fprop") | changes))


DEPTHWISE = ConvProblem(32, 64, 28, 28, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 64, "bf16")
DIRECT = {"BLOCK_P": 32, "BLOCK_C": 32, "SEGMENTS": 1, "num_warps": 4, "num_stages": 1}


WIDE = ConvProblem(128, 480, 14, 14, 480, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 4, "bf16")


def configs_of(problem, algorithm):
    return dispatch.contenders(problem, "fprop", devices.DEFAULT, algorithm)[0]


def direct(pass_, **times):
    return entry(DEPTHWISE, pass_, algorithm="depthwise_direct", config=DIRECT, **times)


def test_entries_have_the_fields_of_their_algorithm(user_file):
    user_file(file_text(direct("fprop")))
    assert (plan(DEPTHWISE).algorithm, plan(DEPTHWISE).config) == ("depthwise_direct", DIRECT)


def test_fused_backward_is_planned_where_it_is_faster():
    found = dispatch.plan(DEPTHWISE, devices.DEFAULT, "triton")
    assert found.backward is not None
    assert found.backward.time_us < found.dgrad.time_us + found.wgrad.time_us
    assert "backward: depthwise_direct" in str(found)
    assert dispatch.plan(DEPTHWISE, devices.DEFAULT, "triton:implicit_gemm").backward is None
    assert dispatch.plan(DEPTHWISE, devices.DEFAULT, "torch").backward is None
    assert dispatch.plan(DEPTHWISE, devices.DEFAULT, refusal="a reason").backward is None
    assert dispatch.plan(PROBLEM, devices.DEFAULT, "triton").backward.algorithm == "row_march"
    assert dispatch.plan(dataclasses.replace(PROBLEM, groups=1), devices.DEFAULT, "triton").backward is None


@pytest.mark.parametrize(("fused", "taken"), [(19.0, True), (21.0, False)])
def test_measured_fused_backward_is_compared_with_both_passes(user_file, fused, taken):
    user_file(file_text(direct("dgrad"), direct("wgrad"), direct("backward", time=fused, torch_time=60.0)))
    assert (dispatch.plan(DEPTHWISE, devices.DEFAULT).backward is not None) is taken


def test_modelled_and_measured_times_are_not_compared(user_file):
    user_file(file_text(direct("dgrad", time=1e6, torch_time=1e7), direct("wgrad", time=1e6, torch_time=1e7)))
    assert dispatch.plan(DEPTHWISE, devices.DEFAULT).backward is None


DAMAGED = {
    "empty": "",
    "truncated": file_text(entry())[:-20],
    "not-an-object": "[1, 2]",
    "binary": "\x00\x01",
    "other-schema": file_text(schema=1),
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
    "unknown-pass": file_text(entry(key=PROBLEM.config_key("fprop") | {"pass": "bprop"})),
    "pass-a-list": _with_key(**{"pass": ["fprop"]}),
    "dtype-an-object": _with_key(dtype={}),
    "unknown-dtype": _with_key(dtype="fp8"),
    "layout-a-number": _with_key(layout=0),
    "width-a-fraction": _with_key(cin_g=4.5),
    "kernel-of-one": _with_key(k=[3]),
    "kernel-of-text": _with_key(k=["3", "3"]),
    "stride-a-number": _with_key(stride=1),
    "bucket-too-large": _with_key(m_bucket=10**400),
    "algorithm-a-list": file_text(entry(algorithm=["implicit_gemm"])),
    "algorithm-a-path": file_text(entry(algorithm="../implicit_gemm")),
    "config-of-another-a-list": file_text(entry(algorithm="winograd", config=[1])),
    "bucket-zero": file_text(entry(key=PROBLEM.config_key("fprop") | {"m_bucket": 0})),
    "bucket-text": file_text(entry(key=PROBLEM.config_key("fprop") | {"groups_bucket": "16"})),
    "block-not-a-power-of-two": _with_config(BLOCK_M=48),
    "block-too-small": _with_config(BLOCK_K=8),
    "block-true": _with_config(BLOCK_K=True),
    "too-many-warps": _with_config(num_warps=64),
    "fields-of-another-algorithm": file_text(entry(algorithm="depthwise_direct")),
    "missing-field": file_text(entry(config={"BLOCK_M": 64})),
    "extra-field": _with_config(SEGMENTS=2),
    "time-negative": file_text(entry(time=-1.0)),
    "time-text": file_text(entry(torch_time="fast")),
    "time-nan": file_text(entry(time=float("nan"))),
    "time-too-large": file_text(entry(time=10**400)),
    "time-true": file_text(entry(time=True)),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_named_once_and_skipped(user_file, text):
    path = user_file(text)
    with pytest.warns(UserWarning, match="skipping a configuration file") as caught:
        assert plan().source == "modelled"
    assert str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan()
    assert path.read_text() == text


def test_undecodable_file_is_skipped(user_file):
    path = user_file("")
    path.write_bytes(b"\xff\xfe\x80")
    configs.reset()
    with pytest.warns(UserWarning, match="skipping"):
        assert plan().source == "modelled"


def _loop(path):
    path.symlink_to(path.name)


PLACES = {
    "a symlink that leads to itself": (_loop, "Too many levels of symbolic links"),
    "a folder": (lambda path: path.mkdir(), "not a file"),
    "a pipe": (os.mkfifo, "not a file"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_skipped(user_file, tmp_path, name):
    make, why = PLACES[name]
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


def _mutated(data, draw):
    """JSON with one value, somewhere, replaced, removed or added."""
    at = data
    while True:
        if isinstance(at, dict) and at:
            key = draw(st.sampled_from(sorted(at)))
        elif isinstance(at, list) and at:
            key = draw(st.integers(0, len(at) - 1))
        else:
            return
        if isinstance(at[key], (dict, list)) and at[key] and draw(st.integers(0, 3)):
            at = at[key]
            continue
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "replace":
            at[key] = draw(JSON)
        elif how == "remove":
            del at[key]
        elif isinstance(at, dict):
            at[draw(st.sampled_from(["", "winograd fprop", "k", "ours"]))] = draw(JSON)
        else:
            at.insert(key, draw(JSON))
        return


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_file_stops_a_plan(user_file, data):
    """Whatever became of a whole file: a plan, with at most one warning, which names the file."""
    content = json.loads(
        file_text(
            entry(), entry(torch_time=None), entry(pass_="dgrad"), direct("backward"),
            calibration={"ours": {"row_march fprop": 2.0}, "torch": {"narrow fprop": 3.0}},
        )
    )  # fmt: skip
    for _ in range(data.draw(st.integers(1, 3))):
        _mutated(content, data.draw)
    path = user_file(json.dumps(content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for problem in (PROBLEM, DEPTHWISE, dataclasses.replace(PROBLEM, batch=16)):
            assert all(found.algorithm for found in dispatch.plan(problem, devices.DEFAULT).passes)
    assert len(caught) <= 1
    assert all(str(path) in str(warning.message) for warning in caught)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40))
def test_no_bytes_stop_a_plan(user_file, content):
    path = user_file("")
    path.write_bytes(content)
    configs.reset()
    with pytest.warns(UserWarning, match="skipping a configuration file") as caught:
        assert plan().source == "modelled"
    assert len(caught) == 1


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
    import tempfile

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
    import torch

    from groupconv.measuring import command, stub

    monkeypatch.setattr(configs, "user_folder", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(command, "this_gpu", lambda: stub.StubLab(devices.DEFAULT))
    assert cli.main(["tune", "--quick"]) == 2
    said = capsys.readouterr().err
    assert said == "groupconv tune: --out: there is no home with a configuration folder here, so it must name one\n"


def test_entries_of_other_kernels_are_left_out(user_file):
    """Those of an algorithm whose file has changed, or one that it is made of; the others hold."""
    hashes = configs.kernels_sha256()
    mine = [entry(), direct("fprop")]
    path = user_file(file_text(*mine, kernels_sha256=hashes | {"implicit_gemm.py": "0" * 64}))
    with pytest.warns(UserWarning, match="skipping 1 entries that were measured with other kernels") as caught:
        assert plan().source == "modelled"
    assert str(path) in str(caught[0].message)
    assert plan(DEPTHWISE).source == "exact"
    user_file(file_text(*mine, kernels_sha256=hashes | {"tiles.py": "0" * 64}))
    with pytest.warns(UserWarning, match="skipping 2 entries"):
        assert plan(DEPTHWISE).source == "modelled"
    wide = entry(WIDE, algorithm="row_block_tma", config=configs_of(WIDE, "row_block_tma"))
    user_file(file_text(wide, kernels_sha256=hashes | {"row_march.py": "0" * 64}))
    assert plan(WIDE).source == "exact"
    user_file(file_text(wide, kernels_sha256=hashes | {"row_block.py": "0" * 64}))
    with pytest.warns(UserWarning, match="skipping 1 entries"):
        assert plan(WIDE).source == "modelled"
    user_file(file_text(*mine, kernels_sha256={name: sha for name, sha in hashes.items() if name != "reduce.py"}))
    with pytest.warns(UserWarning, match="skipping 2 entries"):
        assert plan(DEPTHWISE).source == "modelled"


def test_entries_of_other_kernels_may_have_other_configurations(user_file):
    """A tile size that a later version has named does not make an earlier version's file a damaged one."""
    hashes = configs.kernels_sha256() | {"row_march.py": "0" * 64}
    before = entry(algorithm="row_march", config={"BLOCK_P": 64, "num_warps": 4, "num_stages": 2})
    user_file(file_text(before, direct("fprop"), kernels_sha256=hashes))
    with pytest.warns(UserWarning, match="skipping 1 entries that were measured with other kernels"):
        assert plan(DEPTHWISE).source == "exact"
    damaged = file_text(before, direct("fprop"))
    with pytest.raises(configs.DamagedFile, match="config of row_march must have exactly"):
        configs.parse_device(damaged, "a file")


def test_entry_without_a_kernel_of_ours(user_file):
    user_file(file_text(entry(algorithm="torch", config={}, time=30.0, torch_time=30.0)))
    assert (plan().algorithm, plan().source) == ("torch", "exact")
    assert plan(backend="triton").source == "modelled"


def test_entry_where_torch_failed(user_file):
    user_file(file_text(entry(torch_time=None)))
    assert (plan().algorithm, plan().source) == ("implicit_gemm", "exact")
    assert "F.conv2d failed" in plan().reason


def test_configuration_that_does_not_fit_gives_way(user_file):
    """A class holds problems that differ in what a tile may be; its algorithm is kept, its tile is not."""
    user_file(file_text(entry(config=CONFIG | {"BLOCK_N": 256})))
    found = plan()
    assert (found.algorithm, found.source) == ("implicit_gemm", "exact")
    assert found.config in dispatch.contenders(PROBLEM, "fprop", devices.DEFAULT, "implicit_gemm")
    assert "does not fit" in found.reason


def test_calibration_corrects_the_model(user_file):
    """Our times by algorithm and pass, F.conv2d's by width class and pass; of changed kernels only the latter."""
    before = plan()
    assert before.algorithm == "row_march"
    factors = {"ours": {"row_march fprop": 3.0}, "torch": {"narrow fprop": 50.0}}
    user_file(file_text(calibration=factors))
    after = plan()
    assert after.source == "modelled"
    assert after.algorithm == "row_march"
    assert after.time_us == pytest.approx(3.0 * before.time_us)
    assert after.torch_time_us == pytest.approx(50.0 * after.floor_us)
    assert "as calibrated on nvidia_h200" in after.reason
    others = ("row_march", "row_block", "row_block_tma")
    user_file(file_text(calibration={"ours": {f"{name} fprop": 1e3 for name in others}}))
    assert plan(backend="triton").algorithm == "implicit_gemm"
    user_file(file_text(calibration={"torch": {"narrow fprop": 1.01}}))
    assert plan().algorithm == "torch"
    hashes = configs.kernels_sha256()
    user_file(file_text(calibration=factors, kernels_sha256=hashes | {"row_march.py": "0" * 64}))
    assert plan().time_us == pytest.approx(before.time_us)
    assert plan().torch_time_us == pytest.approx(50.0 * after.floor_us)


def test_other_maps_of_a_class_do_not_count_as_exact(user_file):
    """As many pixels in fewer images of larger maps: another tile may be best."""
    larger = dataclasses.replace(PROBLEM, batch=8, h_in=56, w_in=56)
    assert larger.out_pixels == PROBLEM.out_pixels
    user_file(file_text(entry(larger)))
    assert plan().source == "nearest"


def test_unknown_algorithm_of_an_entry_is_passed_over(user_file):
    user_file(file_text(entry(algorithm="winograd")))
    assert plan().source == "modelled"


def test_shipped_files_are_whole():
    """Every shipped device file parses, was measured with these kernels, and names known algorithms."""
    import importlib.resources

    from groupconv.algorithms import REGISTRY

    folder = importlib.resources.files("groupconv.autotune_configs")
    names = {file.name for file in folder.iterdir() if file.name.endswith(".json")}
    assert "modelled.json" in names
    for name in names - {"modelled.json"}:
        found = configs.parse_device(folder.joinpath(name).read_text(), name)
        assert devices.slugify(found.device) == name.removesuffix(".json")
        assert not found.stale, f"{name}: {found.stale} entries were measured with other kernels"
        assert all(e.algorithm in (*REGISTRY, "torch") for e in found.entries)
    assert all(default.algorithm in REGISTRY for default in configs.modelled_defaults())


def pointwise(n, dtype):
    """A layer whose GEMM N is n in every pass."""
    return ConvProblem(2, n, 5, 5, n, 1, 1, dtype=dtype)


@pytest.mark.parametrize("target", devices.BY_ARCH)
@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_width_has_a_configuration_that_fits(target, pass_, dtype):
    from groupconv.algorithms import implicit_gemm

    device = devices.named(target)
    for n in (1, 16, 17, 64, 100, 128, 300, 373, 5000):
        problem = pointwise(n, dtype)
        if implicit_gemm.supports(problem, pass_, device) is None:
            name, config, _ = dispatch.modelled(problem, pass_, device, "implicit_gemm")
            held = implicit_gemm.held(problem, pass_, config, device)
            assert held.shared_bytes <= device.shared_bytes
            configs._check_config(name, config, "here", "this")


@pytest.mark.parametrize(
    ("width", "tiles"),
    [(40, {40}), (56, {56, 64}), (72, {72, 40}), (112, {112, 64}), (168, {168, 56}), (232, {256, 128, 80, 64})],
)
def test_columns_are_cut_to_the_group(width, tiles):
    """The columns that candidates try include those that pad the group by less than a part; matrix units that take 16
    columns at least get multiples of it."""
    from groupconv.algorithms import gemm

    problem = pointwise(width, "bf16")
    found = gemm.column_tiles(width, problem, devices.named("sm_90"))
    assert tiles <= set(found)
    assert min(-(-width // size) * size for size in found) * 0.85 <= width
    assert all(size % 16 == 0 for size in gemm.column_tiles(width, problem, devices.named("gfx942")))


def test_defaults_for_one_architecture_replace_the_general_ones():
    general = configs.modelled("implicit_gemm", pointwise(64, "fp32"), "fprop", "sm_90")
    special = configs.modelled("implicit_gemm", pointwise(64, "fp32"), "fprop", "gfx1100")
    assert general is not None
    assert special is not None
    assert general.only is None
    assert special.only == ("gfx1100",)
