"""Configuration files: reading, refusing and looking up; and what the plans make of them."""

import dataclasses
import json
import warnings

import pytest

from groupconv import configs, devices, dispatch
from groupconv.problem import ConvProblem

CONFIG = {"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
PROBLEM = ConvProblem(32, 64, 28, 28, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 16, "bf16")


def entry(problem=PROBLEM, pass_="fprop", time=10.0, torch_time=30.0, **changes):
    key = problem.config_key(pass_)
    made = {
        "key": key, "algorithm": "implicit_gemm", "config": dict(CONFIG), "time_us": time, "torch_time_us": torch_time
    }  # fmt: skip
    return made | changes


def file_text(*entries, **changes):
    data = {
        "schema": 1, "device": "NVIDIA H200", "kernels_sha256": configs.kernels_sha256(),
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


DEPTHWISE = ConvProblem(32, 64, 28, 28, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 64, "bf16")
DIRECT = {"BLOCK_P": 32, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1}


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
    "other-schema": file_text(schema=2),
    "no-schema": json.dumps({"device": "x", "entries": []}),
    "no-device": file_text(device=None),
    "kernels-not-an-object": file_text(entry(), kernels_sha256=[]),
    "calibration-not-an-object": file_text(calibration=[1.0]),
    "calibration-negative": file_text(calibration={"ours": {"row_march fprop": -1.0}}),
    "calibration-text": file_text(calibration={"torch": {"wide fprop": "fast"}}),
    "entries-not-a-list": file_text(entries={}),
    "entry-not-an-object": file_text(3),
    "foreign-key": file_text(entry(key={"dtype": "bf16"})),
    "unknown-pass": file_text(entry(key=PROBLEM.config_key("fprop") | {"pass": "bprop"})),
    "bucket-zero": file_text(entry(key=PROBLEM.config_key("fprop") | {"m_bucket": 0})),
    "bucket-text": file_text(entry(key=PROBLEM.config_key("fprop") | {"groups_bucket": "16"})),
    "block-not-a-power-of-two": _with_config(BLOCK_M=48),
    "block-too-small": _with_config(BLOCK_K=8),
    "block-true": _with_config(BLOCK_K=True),
    "too-many-warps": _with_config(num_warps=64),
    "fields-of-another-algorithm": file_text(entry(algorithm="depthwise_direct")),
    "missing-field": file_text(entry(config={"BLOCK_M": 64})),
    "extra-field": _with_config(SPLITS=2),
    "time-negative": file_text(entry(time=-1.0)),
    "time-text": file_text(entry(torch_time="fast")),
    "time-nan": file_text(entry(time=float("nan"))),
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
            assert implicit_gemm.fits(config, dtype, device) is None
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
