"""The library's compiled kernels: a slice of them on the software GPU, and the waits in their machine code.

Runs with TRITON_INTERPRET=0 (`make test-compiled`).
"""

import itertools
import json
import math
import re

import cases
import compiled_code
import pytest
import softgpu
import torch

from groupconv import batch_norm, devices, dispatch
from groupconv.algorithms import NAMES, REGISTRY, interpretable, lack
from groupconv.compiling import command, compiler
from groupconv.perf_reports import counted, layers
from groupconv.problem import FINISHED, PASSES, PLANNED, ConvProblem

needs_a_compiler = pytest.mark.skipif(
    softgpu.compiler() is None, reason="no C compiler: neither $CC nor cc nor gcc; the software GPU is in C"
)

CONTIGUOUS = ("depthwise_mma_nchw",)  # serve no channels_last
# Layers of the suite; of an algorithm that is not here, the first that it serves. On sm_90 in bf16 and channels_last,
# where tensor cores take most, if it serves that; on sm_80 as below.
LAYERS = {
    "implicit_gemm": ("regnety_160.s1d", "shufflenet_g3.s2c"),
    "row_block": ("regnetx_040.s3", "regnetx_032.s1d"),
    "row_block_tma": ("eca_nfnet_l0.s2", "regnety_016.s1d"),
    "row_march": ("resnext50_32x4d.s1", "resnext50_32x4d.s2d"),
    "depthwise_direct": ("mobilenetv2_100.b1d",),
    "depthwise_mma_nchw": ("efficientnet_b0.b4",),
    "depthwise_toeplitz": ("efficientnet_b0.b4",),
    "depthwise_map": ("replknet_31b.s2",),
    "depthwise_plane": ("mobilenetv2_100.b5",),
}
ON_SM_80 = {
    "implicit_gemm": ("bf16x3", "nchw"),
    "row_block": ("fp16", "nhwc"),
    "row_march": ("fp16", "nhwc"),
    "depthwise_direct": ("fp32", "nchw"),
    "depthwise_mma_nchw": ("fp16", "nchw"),
    "depthwise_toeplitz": ("tf32", "nhwc"),
    "depthwise_map": ("fp16", "nhwc"),
    "depthwise_plane": ("fp16", "nchw"),
}


def job(layer: str, pass_: str, target: str, algorithm: str, dtype="bf16", layout=None, **config):
    """A pass of a layer as an algorithm would be planned for it, but for what `config` changes; None if it cannot."""
    layout = layout or ("nchw" if algorithm in CONTIGUOUS else "nhwc")
    (problem,) = (row.problem for row in layers.suite(dtype, layout) if row.name == layer)
    if pass_ == FINISHED:
        problem, pass_ = command.ended(problem), "fprop"
    if lack(algorithm, problem, pass_, devices.named(target)) is not None:
        return None
    planned = dispatch.modelled(problem, pass_, devices.named(target), algorithm)[1]
    return compiled_code.Job(layer, problem, pass_, target, algorithm, planned | config)


def layers_of(algorithm: str) -> tuple[str, ...]:
    """The suite's layers to try an algorithm with."""
    suite = layers.suite("bf16", "nhwc")
    return LAYERS.get(algorithm) or tuple(row.name for row in suite if job(row.name, "fprop", "sm_90", algorithm))[:1]


def _slice():
    for algorithm in NAMES:
        names = layers_of(algorithm)
        for pass_ in (*PLANNED, FINISHED):
            yield from (job(name, pass_, "sm_90", algorithm) for name in names)
            yield job(names[0], pass_, "sm_80", algorithm, *ON_SM_80.get(algorithm, ()))
    # Lanes of images and columns at once; a part of a width too narrow for warp groups, in few rows.
    for pass_ in ("fprop", "dgrad"):
        yield job("regnetx_080.s3", pass_, "sm_90", "row_block_tma", BLOCK_M=64, BLOCK_I=4)
    narrow = {"BLOCK_R": 2, "BLOCK_M": 64, "BLOCK_N": 40, "BLOCK_K": 32, "BLOCK_L": 0, "num_warps": 4, "num_stages": 2}
    yield job("regnetx_040.s3", "wgrad", "sm_90", "row_block", **narrow)
    yield job("shufflenet_g3.s2c", "wgrad", "sm_80", "row_block")
    # The left operand in registers, of few rows and few steps; and of one kernel row, with nothing carried along.
    for pass_ in PASSES:
        yield job("regnetx_040.s3", pass_, "sm_90", "row_block", **narrow | {"BLOCK_L": 1})
    left = {"BLOCK_P": 64, "BLOCK_S": 4, "BLOCK_A": 0, "BLOCK_L": 1, "BLOCK_W": 1, "num_warps": 4}
    for layer, pass_ in (("resnext50_32x4d.s1", "wgrad"), ("resnext50_32x4d.s2d", "backward")):
        yield job(layer, pass_, "sm_90", "row_march", **left)
    # Several columns to a lane, for warp groups and for single warps.
    abreast = {"BLOCK_C": 16, "BLOCK_S": 1, "BLOCK_A": 0, "BLOCK_L": 0, "num_stages": 3}
    groups, warp = {"BLOCK_P": 64, "BLOCK_R": 4, "num_warps": 4}, {"BLOCK_P": 16, "BLOCK_R": 1, "num_warps": 1}
    for layer, pass_ in itertools.product(LAYERS["row_march"], PLANNED):
        yield job(layer, pass_, "sm_90", "row_march", **abreast | warp | {"BLOCK_W": 4})
    for pass_ in ("fprop", "dgrad"):
        yield job(LAYERS["row_march"][0], pass_, "sm_90", "row_march", **abreast | groups | {"BLOCK_W": 2})
    yield job(LAYERS["row_march"][0], "backward", "sm_80", "row_march", **abreast | warp | {"BLOCK_W": 2})
    alone = {"BLOCK_P": 128, "BLOCK_C": 32, "BLOCK_S": 1, "num_warps": 4, "num_stages": 3}
    yield job("shufflenet_g8.s1d", "wgrad", "sm_90", "row_march", **alone | {"BLOCK_L": 1, "BLOCK_A": 0, "BLOCK_W": 1})


SLICE = {job.key: job for job in _slice() if job is not None}
FIRST = [job(layers_of(algorithm)[0], pass_, "sm_90", algorithm) for algorithm in NAMES for pass_ in PASSES]


def test_the_slice_has_every_algorithm_and_pass():
    for target in compiled_code.TARGETS:
        on = devices.named(target)
        for algorithm in NAMES:
            rows = [row.problem for layout in ("nhwc", "nchw") for row in layers.suite("bf16", layout)]
            able = {pass_ for pass_ in PLANNED if any(lack(algorithm, p, pass_, on) is None for p in rows)}
            able |= {FINISHED} if "fprop" in able else set()
            there = {
                job.problem.kernel_of(job.pass_)
                for job in SLICE.values()
                if (job.target, job.algorithm) == (target, algorithm)
            }
            assert there == able, (target, algorithm)


RUNS = {
    "depthwise_direct": {
        "BLOCK_P": 32, "BLOCK_C": 1, "BLOCK_W": 8, "BLOCK_A": 1, "SEGMENTS": 1, "num_warps": 1, "num_stages": 1,
    },
    "row_march": {
        "BLOCK_P": 64, "BLOCK_C": 16, "BLOCK_S": 1, "BLOCK_R": 1, "BLOCK_A": 2, "BLOCK_L": 0, "BLOCK_W": 1,
        "SEGMENTS": 1, "LANE_BLOCKS": 1, "num_warps": 1, "num_stages": 1,
    },
}  # fmt: skip


def of_runs(algorithm: str, **changes) -> ConvProblem:
    """A layer that an algorithm serves, in NCHW, of rows in which runs are longest."""
    width = {"depthwise_direct": 1, "row_march": 4}[algorithm]
    given = {"pad": (1, 1, 1, 1), "groups": 3, "dtype": "bf16", "layout": "nchw", "out_layout": "nchw"} | changes
    return ConvProblem(1, 3 * width, 3, 16 * (1 + given.get("stride", (1, 1))[1]) // 2, 3 * width, 3, 3, **given)


@needs_a_compiler
@pytest.mark.parametrize("gap", [1, 2, 8])
@pytest.mark.parametrize(("pass_", "stride"), [("fprop", 2), ("dgrad", 1), ("backward", 2)])
@pytest.mark.parametrize("algorithm", RUNS)
def test_runs_of_columns(algorithm, pass_, stride, gap):
    """Accesses of several columns are aligned whatever lies between rows, of x and of dy."""
    problem = of_runs(algorithm, stride=(1, stride))
    config = RUNS[algorithm] | ({"BLOCK_S": 4} if (algorithm, pass_) == ("row_march", "backward") else {})
    given = cases.operands(cases.Case(problem, x=f"rows+{gap}", w="nchw", dy=f"rows+{gap}"))
    with softgpu.active("sm_90"), cases.guarded():
        call = REGISTRY[algorithm].prepare(problem, pass_, config, devices.named("sm_90"), given.strides(problem))
        out = call(*given.of(pass_))
    found = cases.runs_of_columns(call.launches[0])
    of_x, of_dy = math.gcd(8, gap), math.gcd(8, problem.w_out, problem.w_out + gap)
    of_y = math.gcd(8, problem.w_out)
    if algorithm == "row_march":  # which has one for all, of x and dx as many times the stride
        least = {"fprop": min(of_x, of_y), "dgrad": of_dy, "backward": min(of_dy, math.gcd(8, gap) // stride or 1)}
        assert found == {"RUN": least[pass_]}
    elif pass_ == "fprop":
        assert found == {"X": of_x, "Y": of_y}
    else:
        assert found == {"DY": of_dy, "X": of_x if pass_ == "backward" else 1, "DX": 8}
    expected = cases.references(problem, given)
    produced = cases.PRODUCES.get(pass_, (pass_,))
    for each, result in zip(produced, out if isinstance(out, tuple) else (out,), strict=True):
        assert cases.error(result, expected[each]) <= cases.bound("bf16", cases.terms(problem, each))


@needs_a_compiler
@pytest.mark.parametrize("algorithm", RUNS)
@pytest.mark.parametrize(("pass_", "unaligned"), [("fprop", "x"), ("wgrad", "dy"), ("wgrad", "x")])
def test_runs_want_aligned_tensors(algorithm, pass_, unaligned):
    """Of a tensor that begins elsewhere Triton knows of no alignment: its accesses are single."""
    problem, found = of_runs(algorithm), {}
    for which in ((), (unaligned,)):
        job = compiler.Job(algorithm, pass_, RUNS[algorithm], problem, "sm_90", unaligned=which)
        launch = compiler.launched(job)[0]
        found[which] = cases.runs_of_columns(launch), launch.compiled.asm["ptx"].count(".v4.b32")
    (aligned, wide), (single, narrow) = found.values()
    name = "RUN" if algorithm == "row_march" else unaligned.upper()
    assert (aligned[name], single[name]) == (8, 1)
    assert wide > narrow


@needs_a_compiler
def test_runs_of_depthwise_direct_move_nothing_about():
    (launch,) = compiler.launched(
        compiler.Job("depthwise_direct", "fprop", RUNS["depthwise_direct"], of_runs("depthwise_direct"), "sm_90")
    )
    assert launch.compiled.metadata.shared == 0


@needs_a_compiler
@pytest.mark.parametrize("job", SLICE.values(), ids=SLICE)
def test_slice(job):
    """No fault, and the numbers of float64, read early and late, from dense tensors and from views with gaps."""
    problem = compiled_code.shrunk(job.problem, pixels=9, groups=2)
    for varied in (False, True):
        errors, _ = compiled_code.run_pass(problem, job.pass_, job.algorithm, job.config, job.target, varied)
        assert max(errors.values()) <= 1, (errors, varied)


@needs_a_compiler
@pytest.mark.parametrize(
    ("algorithm", "pass_"),
    [(found.algorithm, found.pass_) for found in FIRST if found is not None],
)
def test_offsets_of_64_bits(algorithm, pass_):
    found = job(layers_of(algorithm)[0], pass_, "sm_90", algorithm)
    problem = compiled_code.shrunk(found.problem, pixels=7, groups=2)
    with compiled_code.wide_offsets():
        errors, session = compiled_code.run_pass(problem, pass_, algorithm, found.config, "sm_90", varied=True)
    assert max(errors.values()) <= 1
    kernel = session.results[0].loaded.kernel
    assert any(".s64" in s.op or ".u64" in s.op for s in kernel.body if not isinstance(s, tuple))


@needs_a_compiler
@pytest.mark.parametrize("target", compiled_code.TARGETS)
@pytest.mark.parametrize(("dtype", "view"), [("bf16", "nhwc"), ("fp32", "nchw"), ("fp16", "nchw")])
def test_batch_norm(dtype, view, target):
    """No fault, the numbers of float64, and, of NHWC, accesses of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    y, dz = (torch.randn((3, 40, 20, 12), generator=generator).to(cases.MODES[dtype]) for _ in range(2))
    y, dz = cases.lay_out(y, view), cases.lay_out(dz, view)
    weight, bias = torch.randn((2, 40), generator=generator)
    running = torch.zeros(40), torch.ones(40)
    exact = [tensor.double().requires_grad_() for tensor in (y, weight, bias)]
    expected = [torch.zeros(40).double(), torch.ones(40).double()]
    z = torch.nn.functional.silu(torch.nn.functional.batch_norm(exact[0], *expected, *exact[1:], True))
    expected += [z, *torch.autograd.grad(z, exact, dz.double())]
    batch_norm._launch.cache_clear()
    with softgpu.active(target) as session, cases.guarded():
        mean, rstd = batch_norm._statistics(y, *running, 0.1, 1e-5)
        out = batch_norm._applied(y, weight, bias, mean, rstd, "silu")
        grads = batch_norm._gradients(dz, y, weight, bias, mean, rstd, True, "silu", (True, True, True))
    batch_norm._launch.cache_clear()
    for found, reference in zip((*running, out, *grads), expected, strict=True):
        assert cases.error(found, reference) <= max(cases.bound(dtype, 720), 1e-5)
    if view == "nhwc":
        loads = [s for s in session.results[0].loaded.kernel.body if not isinstance(s, tuple) and "ld.global" in s.op]
        assert any("v4" in s.op for s in loads)


def replaced(pattern, by):
    def edit(name, text):
        text, found = re.subn(pattern, by, text)
        assert found or "sum_splits" in name
        return text

    return edit


@needs_a_compiler
@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (replaced(r"cp\.async\.wait_group[^;]*;", ""), "in flight|never written"),
        (replaced(r"wgmma\.wait_group[^;]*;", ""), "register in flight|overwrite in flight"),
        (replaced(r"(cp\.async\.cg\.shared\.global \[[^\]]*\], \[ %rd\d+ \+ )0", r"\g<1>16"), "gap between elements"),
        (replaced(r"(st\.global\S* \[ %rd\d+ \+ )0", r"\g<1>1073741824"), "global access out of range"),
    ],
)
def test_planted_faults_are_found(edit, kind):
    found = job("regnety_160.s1d", "fprop", "sm_90", "implicit_gemm")
    problem = compiled_code.shrunk(found.problem, pixels=7, groups=2)
    with pytest.raises(softgpu.Fault) as caught:
        compiled_code.run_pass(problem, "fprop", "implicit_gemm", found.config, "sm_90", varied=True, edit=edit)
    assert re.search(kind, caught.value.kind), str(caught.value)
    assert any(f"{name}.py:" in caught.value.source for name in ("implicit_gemm", "tiles", "epilogue"))


@needs_a_compiler
def test_the_command_goes_on_and_lists_what_is_bad(tmp_path, capsys):
    layer = ["--layers", "mobilenetv2_100.b5", "--targets", "sm_80", "--dtypes", "bf16", "--layouts", "nhwc"]
    command = ["run", *layer, "--passes", "fprop", "--jobs", "1", "--out", str(tmp_path)]
    assert compiled_code.main(command) == 0
    assert "1 jobs, 1 to run" in capsys.readouterr().out
    assert compiled_code.main(command) == 0
    assert "1 jobs, 0 to run" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row["padded, late"]["error over bound"]["fprop"] <= 1
    (problem,) = (layer.problem for layer in layers.suite("bf16", "nhwc") if layer.name == "mobilenetv2_100.b5")
    moved = compiled_code.shrunk(problem).min_bytes("fprop")
    assert 0.5 < row["counted"]["dram_bytes"] / moved < 4
    path.write_text(json.dumps(row | {"bad": "a planted fault"}) + "\n")
    assert compiled_code.main(command) == 1
    told = capsys.readouterr().out
    assert "1 are bad:" in told
    assert "a planted fault" in told


# --- Counts ----------------------------------------------------------------------------------------------------------


def test_what_was_counted_is_of_these_kernels():
    """After a change of kernels: `python tests/compiled_code.py counts --write`."""
    stale = {row["algorithm"] for row in counted.read() if row["kernels"] != counted.kernels_of(row["algorithm"])}
    assert not stale


@needs_a_compiler
@pytest.mark.parametrize(("algorithm", "pass_"), [("depthwise_direct", "wgrad"), ("row_march", "fprop")])
def test_counts_are_as_written(algorithm, pass_):
    """Counted again, by another compiler perhaps: nearly as much of everything."""
    asked = algorithm, pass_, "nhwc"
    (row,) = (row for row in counted.read() if (row["algorithm"], row["pass"], row["layout"]) == asked)
    job = compiled_code.Job(
        row["layer"], counted.problem_of(row), pass_, row["target"], algorithm, json.loads(row["config"])
    )
    again = compiled_code.count(job)
    for name in (*counted.QUANTITIES, *counted.WAVEFRONTS):
        assert again[name] == pytest.approx(float(row[name]), rel=0.2), name


# --- Waits -----------------------------------------------------------------------------------------------------------

COUNTED = (
    "resnext50_32x4d.s1", "resnext50_32x4d.s2d", "dpn92.s2", "resnext101_32x8d.s4d", "regnety_016.s1d",
    "regnetx_040.s3", "regnetx_080.s3", "regnety_160.s3", "shufflenet_g3.s2c", "regnety_2560.s2",
)  # fmt: skip
PLANS = {
    f"{job.layer}-{job.pass_}-{job.algorithm}": job
    for layer in layers.suite("bf16", "nhwc")
    if layer.name in COUNTED
    for pass_ in PLANNED
    for job in compiled_code.planned(layer, pass_, "sm_90")
    if job.config["num_warps"] >= 4 and interpretable(job.algorithm)  # fewer are no warp group; nor is what is in Gluon
}


def test_most_plans_have_warp_groups():
    assert len(PLANS) >= 2 * len(COUNTED)


@pytest.mark.parametrize("job", PLANS.values(), ids=PLANS)
def test_machine_code_waits_no_more_than_ptx(job):
    found = compiled_code.waits_of(job)
    assert found is not None, "no products of warp groups"
    assert not found.added, found


@pytest.mark.parametrize(
    ("ptx", "code", "added"),
    [((8, 2), (8, 2), False), ((8, 2), (40, 6), False), ((8, 2), (8, 3), True), ((8, 2), (8, 8), True)],
)
def test_waits_that_ptxas_added(ptx, code, added):
    """(products, waits) in PTX and in machine code, where ptxas may have doubled a loop."""
    counted = dict(zip(("ptx_products", "ptx_waits", "products", "waits"), (*ptx, *code), strict=True))
    found = compiled_code.Waits(None, **counted, serialised=False, registers=0, spill_bytes=0)
    assert found.added is added
