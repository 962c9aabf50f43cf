"""What the compiler makes of the kernels, for GPUs that are not there. Runs outside the interpreter, in children."""

import dataclasses
import os
import subprocess
import sys
from unittest import mock

import filelock
import pytest
import triton

from groupconv import assembler, devices, dispatch
from groupconv.compiling import command
from groupconv.compiling import compiler as compiling
from groupconv.compiling.compiler import Compiler, Job
from groupconv.kernels.tiles import part_sizes
from groupconv.perf_reports import layers
from groupconv.problem import FINISHED, PASSES, PLANNED, ConvProblem

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def groupconv(*args, **environment):
    command = [sys.executable, "-m", "groupconv", *args]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=580)


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=580
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def compiler():
    """One process that compiles for all tests."""
    with Compiler(1) as compiler:
        yield compiler


@pytest.fixture(scope="session")
def oldest_triton():
    """The environment in which a child has the oldest supported Triton."""
    folder = os.environ.get("GROUPCONV_OLDEST_TRITON")
    if folder is None:
        pytest.skip("GROUPCONV_OLDEST_TRITON names no folder with triton 3.6.0; `make test` sets it")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}


@pytest.fixture(scope="session")
def oldest_compiler(oldest_triton):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", oldest_triton["PYTHONPATH"])
        compiler = Compiler(1)
    with compiler:
        yield compiler


def outcomes(compiler, jobs):
    """What came of jobs that have no faults, the resources of their main kernels."""
    for job in jobs:
        compiler.submit(job)
    for job in jobs:
        outcome = command.judged(job, compiler.answer(job, 580))
        assert not outcome.faults, str(job)
        yield job, outcome.resources


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pass_", "target"), [("fprop", "sm_90"), ("dgrad", "gfx942"), ("wgrad", "sm_80")])
def test_a_slice_of_what_the_general_algorithm_takes(pass_, target, compiler):
    jobs = command.general([target], pass_, "tf32")[::2]
    assert len(list(outcomes(compiler, jobs))) >= 4


def test_16_bit_types_are_excluded_on_sm_75_with_the_reason():
    shipped = ("--pass", "fprop", "--dtype", "fp16", "--algorithm", "implicit_gemm")
    done = groupconv("compile", "--targets", "sm_75", *shipped, "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert "fp16 configurations on sm_75: Triton has no fp16 matrix instructions on sm_75" in done.stdout
    assert "0 configurations compiled" in done.stdout


def test_a_fault_fails_the_command():
    """A tile that cannot fit makes the command say so and exit 1."""
    code = """
import sys
from groupconv import cli
from groupconv.compiling import command, compiler
from groupconv.problem import ConvProblem
problem = ConvProblem(32, 512, 28, 28, 512, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 4)
huge = dict(BLOCK_M=256, BLOCK_N=256, BLOCK_K=128, SPLITS=1, num_warps=8, num_stages=4)
job = compiler.Job("implicit_gemm", "fprop", huge, problem, "sm_86")
command.general = lambda *a: [job]
command.planned = lambda *a: []
command.run_parallel = lambda work, on_done, processes: [command.run_here(job) for job in work]
sys.exit(0 if cli.main(["compile", "--targets", "sm_86"]) == 1 else 7)
"""
    assert "fault: sm_86 implicit_gemm fprop" in python(code)


def test_unknown_target_is_an_error_before_any_work():
    done = groupconv("compile", "--targets", "sm_90", "voodoo2")
    assert done.returncode == 2
    assert done.stderr.startswith("groupconv compile: target 'voodoo2' is not known")


# --- Resources and instructions --------------------------------------------------------------------------------------

WIDE = [
    (232, "fprop", "sm_90"), (64, "dgrad", "sm_90"), (120, "wgrad", "sm_90"), (112, "fprop", "sm_90"),
    (72, "wgrad", "sm_90"), (168, "dgrad", "sm_90"), (40, "fprop", "sm_80"),
]  # fmt: skip


def by_implicit_gemm(width, pass_, target):
    problem = ConvProblem(64, 3 * width, 28, 28, 3 * width, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 3, "bf16")
    name, config, _ = dispatch.modelled(problem, pass_, devices.named(target), "implicit_gemm")
    return Job(name, pass_, config, problem, target)


def check_wide(compiler):
    """Channels_last loads and stores are 16 bytes a thread, also where C is a multiple of 8 only (3 x 232, 3 x 120).

    But for what belongs to a part of the columns too narrow to give every thread as much.
    """
    for job, used in outcomes(compiler, [by_implicit_gemm(*case) for case in WIDE]):
        each = 8 * devices.named(job.target).warp_size * job.config["num_warps"]  # elements of 16 bytes a thread
        sizes = part_sizes(job.config["BLOCK_N"])
        narrow = sum(size * job.config["BLOCK_K"] < each for size in sizes)
        assert 0 < used.loads <= used.wide_loads + narrow * job.config["num_stages"]
        assert 0 < used.stores <= used.wide_stores + sum(size * job.config["BLOCK_M"] < each for size in sizes)
        assert used.matrix == "HGMMA" or (job.target == "sm_80" and used.matrix_count > 0)


def test_channels_last_is_vectorised(compiler):
    check_wide(compiler)


def test_the_oldest_supported_triton_compiles_them_too(oldest_compiler):
    check_wide(oldest_compiler)
    others = [by_implicit_gemm(4, "fprop", "gfx942"), by_implicit_gemm(16, "wgrad", "sm_86")]
    assert len(list(outcomes(oldest_compiler, others))) == 2
    for job, used in outcomes(oldest_compiler, planned("sm_90", "nhwc", "resnext50_32x4d.s1", ["fprop", "backward"])):
        assert job.algorithm == "row_march"
        assert used.matrix in ("HGMMA", "HMMA")  # of a warp group, or of fewer warps


def test_a_constant_that_ptxas_would_drop(oldest_triton):
    """Triton 3.6's pipelined 31x31 fprop adds 33 to one of two 16-bit numbers, which ptxas forgets: it is made anew."""
    code = """
import triton
from groupconv import assembler
from groupconv.compiling import compiler
from groupconv.algorithms import implicit_gemm
from groupconv.problem import ConvProblem
problem = ConvProblem(1, 2, 9, 33, 2, 31, 31, pad=(15,) * 4, groups=2, dtype="fp32")
config = dict(BLOCK_M=128, BLOCK_N=16, BLOCK_K=16, SPLITS=1, num_warps=4, num_stages=3)
(launch,) = compiler.launched(compiler.Job("implicit_gemm", "fprop", config, problem, "sm_90"))
print(triton.__version__, launch.options["num_stages"], assembler.adds_half_a_constant(launch.compiled.asm["ptx"]))
"""
    assert python(code, **oldest_triton).split() == ["3.6.0", "1", "False"]


@pytest.mark.parametrize(("constant", "found"), [(33, True), (33 << 16, True), (40 << 16 | 41, False)])
def test_half_constants_are_found(constant, found):
    ptx = f"mov.b32 \t%r3, {constant};\n\tadd.s16x2 \t%r4, %r2, %r3;\n"
    assert assembler.adds_half_a_constant(ptx) is found
    assert not assembler.adds_half_a_constant(ptx.replace("add.s16x2", "add.s32"))


SHIFTED = "mul.lo.s32 \t%r1{0}, %r{0}, %r9;\n\tshl.b32 \t%r2{0}, %r1{0}, {1};\n\t"


@pytest.mark.parametrize(
    ("amounts", "found"), [((2, 2, 1), True), ((4, 4, 4, 2), True), ((2, 1), False), ((2, 2, 2), False)]
)
def test_products_shifted_apart_are_found(amounts, found):
    ptx = "".join(SHIFTED.format(number, amount) for number, amount in enumerate(amounts, 1))
    assert assembler.shifts_products_apart(ptx) is found
    assert not assembler.shifts_products_apart(ptx.replace("shl.b32", "shr.b32"))


def test_products_shifted_apart_are_assembled_with_care():
    """What x, dx and dy of a strided depthwise layer share is a lane, of 4, 4 and 2 pixels."""
    code = """
from groupconv import assembler
from groupconv.compiling import compiler
from groupconv.problem import ConvProblem
problem = ConvProblem(2, 32, 16, 16, 32, 3, 3, (2, 2), (1, 1, 1, 1), groups=32, dtype="bf16")
config = dict(BLOCK_P=16, BLOCK_C=32, BLOCK_W=2, BLOCK_A=1, SEGMENTS=1, num_warps=4, num_stages=1)
for pass_ in ("backward", "dgrad"):
    (launch, *_) = compiler.launched(compiler.Job("depthwise_direct", pass_, config, problem, "sm_90"))
    print(assembler.shifts_products_apart(launch.compiled.asm["ptx"]), launch.options.get("ptx_options"))
"""
    assert python(code).splitlines() == ["True --opt-level 1", "False None"]


def test_an_address_that_ptxas_loses():
    """Of a 1x1 layer, whose two parts of 64 and 16 columns lie where the other did: 64 and 32 bytes apart."""
    code = """
from groupconv import assembler
from groupconv.compiling import compiler
from groupconv.problem import ConvProblem
problem = ConvProblem(4, 480, 14, 14, 120, 1, 1, groups=3, dtype="bf16")
for columns, depth in ((80, 64), (80, 16), (64, 64)):
    config = dict(BLOCK_M=128, BLOCK_N=columns, BLOCK_K=depth, SPLITS=1, num_warps=4, num_stages=2)
    try:
        compiler.launched(compiler.Job("implicit_gemm", "dgrad", config, problem, "sm_90"))
        print("right")
    except assembler.Miscompiled as error:
        print(str(error).split(";")[0])
"""
    refused = "groupconv: ptxas would miscompile dgrad_kernel"
    assert python(code).splitlines() == [refused, "right", "right"]


@pytest.mark.parametrize(
    ("code", "lost"),
    [
        ("UIADD3 UR4, UP0, UR34, 0x40, URZ", True),
        ("UIADD3 UR18, UP0, UR18, 0x20, URZ", True),
        ("R2UR UR34, R5 ;\n /*0010*/ UIADD3 UR4, UP0, UR34, 0x40, URZ", True),  # something else was there before
        ("USGXT.U32 UR34, UR5, 0xe ;\n /*0010*/ UIADD3 UR4, UP0, UR34, 0x40, URZ", False),
        ("UIADD3 UR4, UR7, 0x40, URZ", False),
        ("UIMAD UR21, UR20, 0x50, URZ ;\n /*0010*/ UIADD3 UR21, UP0, UR21, UR6, URZ", False),  # of a pointer
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4].tnspB, R24, gsb0", True),
        (
            "UIMAD.WIDE.U32 UR6, UR5, UR4, URZ ;\n /*0010*/ @P1 HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR4], R24",
            False,
        ),
        ("HGMMA.64x32x16.F32.BF16 R24, R40, desc[UR4], R24", True),
        ("IADD3 R4, R5, 0x1, RZ", False),
    ],
)
def test_lost_addresses_are_found(code, lost):
    assert assembler.loses(f"        /*0000*/                   {code} ;\n") is lost


def planned(target, layout, name, passes):
    """The jobs of the plans of a layer of the suite."""
    (problem,) = (layer.problem for layer in layers.suite("bf16", layout) if layer.name == name)
    jobs = [job for pass_ in passes for job in command.planned([target], [problem], pass_)]
    assert len(jobs) == len(passes)
    return jobs


@pytest.mark.parametrize(
    ("target", "layout", "name", "passes"),
    [
        ("sm_90", "nhwc", "mobilenetv2_100.b3", PLANNED),
        ("sm_90", "nhwc", "convnext_tiny.s0", ["fprop"]),
        # Triton takes half a minute for the largest tiles.
        pytest.param("sm_90", "nhwc", "convnext_tiny.s0", ["dgrad", "wgrad"], marks=pytest.mark.full),
        ("sm_90", "nhwc", "fastvit_t8.down", ["dgrad"]),
        ("sm_90", "nchw", "convnext_base.s2", ["fprop"]),
        pytest.param("sm_90", "nchw", "convnext_base.s2", ["dgrad", "wgrad"], marks=pytest.mark.full),
        ("sm_90", "nchw", "efficientnet_b4.b1", PLANNED),
        ("sm_90", "nchw", "efficientnet_b0.b4", ["dgrad", "wgrad"]),
        ("sm_80", "nhwc", "efficientnet_b0.b4", ["fprop", "wgrad"]),
        ("sm_100", "nchw", "mobilenetv2_100.b3", ["wgrad"]),
        ("gfx942", "nhwc", "convnext_tiny.s0", ["fprop"]),
        pytest.param("gfx942", "nhwc", "convnext_tiny.s0", ["dgrad"], marks=pytest.mark.full),
    ],
)
def test_planned_depthwise_configurations(target, layout, name, passes, compiler):
    """No spills, matrix instructions where they are promised; channels_last loads are 16 bytes wide if a program has so
    many channels, and two channels at least; of rows that are multiples of 16 bytes all accesses but a filter's and a
    lane's neighbours' are.
    """
    for job, used in outcomes(compiler, planned(target, layout, name, passes)):
        assert job.algorithm.startswith("depthwise_") or job.algorithm == "row_march"
        assert (used.matrix_count > 0) == (job.algorithm != "depthwise_direct"), str(job)
        taps = job.problem.kh * job.problem.kw
        if job.algorithm == "depthwise_direct" and layout == "nhwc":
            each = 1 if taps * job.problem.cout_g > 32 else 2  # channels of a thread, whose filters it holds
            assert job.config["BLOCK_P"] * job.config["BLOCK_C"] >= each * 32 * job.config["num_warps"], str(job)
        elif job.algorithm == "depthwise_direct" and job.problem.w_in % 8 == 0:
            assert job.config["BLOCK_W"] >= 8, str(job)
            # By step that is in flight and element of a thread: its own columns, and a run on either side, of which
            # ptxas leaves out what nothing uses.
            each = (job.config["BLOCK_A"] + 1) * job.config["BLOCK_P"] // (32 * job.config["num_warps"])
            assert used.loads - used.wide_loads <= taps * (job.pass_ != "wgrad") + 2 * each, str(job)
            assert used.wide_loads >= each, str(job)
            assert used.stores - used.wide_stores == taps * (job.pass_ in ("wgrad", "backward")), str(job)
        elif layout == "nhwc" and job.config["BLOCK_C"] >= 8 and job.algorithm != "row_march":
            assert used.wide_loads > 0, str(job)  # row_march's tiles may have less than 16 bytes for each thread


@pytest.mark.parametrize(
    ("target", "layout", "name", "passes"),
    [
        ("sm_90", "nhwc", "resnext50_32x4d.s1", PLANNED),
        ("sm_90", "nhwc", "resnext50_32x4d.s2d", ["fprop", "wgrad"]),
        ("sm_90", "nchw", "resnext101_32x8d.s1", PASSES),
        ("sm_80", "nhwc", "resnext50_32x4d.s3", ["fprop", "wgrad"]),
        ("sm_100", "nhwc", "resnext50_32x4d.s1", ["fprop", "wgrad"]),
        ("gfx942", "nhwc", "efficientnet_b0_g8_gn.s5", ["fprop", "dgrad"]),
    ],
)
def test_planned_narrow_configurations(target, layout, name, passes, compiler):
    """No spills; on sm_90 four warps have matrix instructions of a warp group, and channels_last accesses are wide."""
    for job, used in outcomes(compiler, planned(target, layout, name, passes)):
        assert job.algorithm == "row_march", str(job)
        assert used.matrix_count > 0
        if target == "sm_90":
            assert used.matrix == ("HGMMA" if job.config["num_warps"] >= 4 else "HMMA"), str(job)
        if (target, layout) == ("sm_90", "nhwc"):
            # Narrow loads are of weights, before the loop. wgrad has none, but x of 32 lanes, 16 channels is 8 bytes a
            # thread.
            assert used.wide_loads > (0 if job.pass_ != "wgrad" else used.loads / 2)
            if job.pass_ in ("fprop", "dgrad"):
                assert used.wide_stores == used.stores > 0


@pytest.mark.parametrize(
    ("target", "name", "passes"),
    [
        ("sm_90", "regnetx_040.s3", ["dgrad", "wgrad"]),
        ("sm_90", "regnety_320.s2d", PASSES),
        ("sm_90", "shufflenet_g3.s2c", ["fprop", "wgrad"]),
        ("sm_80", "regnetx_320.s3", ["fprop", "wgrad"]),
        ("sm_100", "regnety_320.s2d", ["dgrad"]),
        ("gfx942", "repvgg_b2g4.s1", ["fprop", "wgrad"]),
    ],
)
def test_planned_wide_configurations(target, name, passes, compiler):
    """No spills; on sm_90 products of a warp group, 64 columns at least where groups are as wide; wide accesses."""
    for job, used in outcomes(compiler, planned(target, "nhwc", name, passes)):
        assert job.algorithm in ("implicit_gemm", "row_block", "row_block_tma"), str(job)
        assert used.matrix_count > 0
        if target == "sm_90":
            assert used.matrix_n >= (32 if "40" in str(job) else 64), str(job)
            loaded = used.wide_loads if job.algorithm != "row_block_tma" else used.loads
            assert loaded >= 0.4 * used.loads > 0


@pytest.mark.parametrize(
    ("target", "layout", "name"),
    [
        ("sm_90", "nhwc", "resnext101_32x8d.s4d"),
        ("sm_90", "nhwc", "dpn92.s2"),
        ("sm_90", "nhwc", "eca_nfnet_l0.s2"),
        ("sm_90", "nchw", "mobilenetv2_100.b3"),
        ("sm_80", "nhwc", "senet154.s3"),
        ("sm_100", "nhwc", "regnety_016.s3"),
        ("gfx942", "nhwc", "resnext50_32x4d.s1"),
    ],
)
def test_what_follows_adds_no_spills(target, layout, name, compiler):
    """The most that may follow: an activation that takes many registers, a residual, and a second result."""
    ((job, used),) = outcomes(compiler, planned(target, layout, name, [FINISHED]))
    assert job.problem.keeps
    assert used.stores >= 2


def test_operands_come_by_descriptors_and_bf16x3_by_three_products():
    """On sm_90 and later no operand is loaded by pointers: activations have five axes, weights four.

    bf16x3 compiles to bf16 matrix instructions on every target that has them, without spills.
    """
    code = """
from groupconv import devices, dispatch
from groupconv.compiling import compiler, resources
from groupconv.problem import ConvProblem
for target, stride, pass_, tiles in (
    ("sm_90", 1, "fprop", (128, 32, 32)), ("sm_90", 2, "fprop", (128, 16, 32)), ("sm_90", 2, "dgrad", (64, 1, 32)),
    ("sm_90", 1, "wgrad", (64, 32, 32)), ("sm_100", 1, "fprop", (128, 32, 32)),
):
    p = ConvProblem(32, 512, 28, 28, 512, 3, 3, (stride, stride), (1, 1, 1, 1), (1, 1), 4, "bf16")
    name, config, _ = dispatch.modelled(p, pass_, devices.named(target), "row_block_tma")
    config |= dict(zip(("BLOCK_M", "BLOCK_I", "BLOCK_K"), tiles))
    ptx = compiler.launched(compiler.Job(name, pass_, config, p, target))[0].compiled.asm["ptx"]
    assert ptx.count("cp.async.bulk.tensor.5d") > 0
    assert (ptx.count("cp.async.bulk.tensor.4d") > 0) == (pass_ != "wgrad")
    assert ptx.count("ld.global") == 0
for target, pass_ in (("sm_90", "fprop"), ("sm_80", "dgrad"), ("gfx942", "wgrad")):
    p = ConvProblem(32, 480, 14, 14, 480, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 4, "bf16x3")
    name, config, _ = dispatch.best(p, pass_, devices.named(target), ["implicit_gemm"])
    made = compiler.launched(compiler.Job(name, pass_, config, p, target))[0].compiled
    text, used = made.asm.get("ptx") or made.asm["amdgcn"], resources.of(made)
    assert used.spill_bytes == 0
    assert used.matrix_count > 0
    assert ".f32.bf16.bf16" in text or "_bf16 " in text
    assert "tf32" not in text
print("ok")
"""
    assert python(code).strip() == "ok"


# --- The host's side -------------------------------------------------------------------------------------------------


def test_host_path_launches_through_the_compiled_kernel():
    """The eager path under the stub driver: the second call compiles nothing and reuses the prepared call."""
    code = """
import torch, groupconv
from groupconv import prepared
from groupconv.compiling import stub_driver
from triton import knobs
compiled = []
knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(info["fn"].name)

def channels_last(*shape):
    return torch.randn(shape, dtype=torch.float16).to(memory_format=torch.channels_last).requires_grad_()

with stub_driver.active("sm_90"):
    x, w = channels_last(2, 32, 8, 8), torch.randn(32, 4, 3, 3, dtype=torch.float16, requires_grad=True)
    def step():
        groupconv.triton_conv(x, w, padding=1, groups=8, backend="triton").sum().backward()
    step()
    first = len(compiled)
    step()
    assert 2 <= len(compiled) == first, compiled  # forward, one or two gradients, the sum of any splits
    assert len(prepared._CALLS) == 1
    with torch.no_grad():
        groupconv.triton_conv(channels_last(5, 32, 11, 9), w, padding=1, groups=8, backend="triton")
    assert len(compiled) == first, "another batch and map size compiled anew"

    # By descriptors: forward, two gradients, the sum of the splits.
    x, w = channels_last(64, 64, 8, 8), channels_last(64, 32, 3, 3)
    def step():
        groupconv.triton_conv(x, w, padding=1, groups=2, backend="triton:row_block_tma").sum().backward()
    step()
    assert len(compiled) == first + 4, compiled
    step()
    assert len(compiled) == first + 4, compiled
print("ok")
"""
    assert python(code).strip() == "ok"


def test_gpus_without_a_representative(compiler):
    """Of a GPU whose architecture has no entry, what is compiled goes by the GPU itself."""
    like, layer = devices.named("sm_86"), layers.suite("bf16", "nhwc")[0]
    on = dataclasses.replace(like, slug="nvidia_orin", arch=87)
    name, config, _ = dispatch.best(layer.problem, "fprop", on, ["row_march"])
    job = Job(name, "fprop", config, layer.problem, on.arch_name, on=on)
    assert compiler.answer(job).failed == ""
    assert "not known" in compiler.answer(dataclasses.replace(job, on=None)).failed


def test_compiling_goes_on_without_locks(monkeypatch, tmp_path):
    """Another user's lock, or a file system that has none."""
    done = []
    for folder, broken in ((tmp_path, PermissionError), (tmp_path, NotImplementedError), (tmp_path / "file", None)):
        if broken is None:
            folder.touch()
        else:
            monkeypatch.setattr(filelock.FileLock, "acquire", mock.Mock(side_effect=broken))
        monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
        with compiling._alone({"a": 1}):
            done.append(broken)
    assert len(done) == 3
    with pytest.raises(OSError, match="of the job"), compiling._alone({}):
        raise OSError("of the job")
