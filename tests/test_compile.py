"""What the compiler makes of the kernels, for GPUs that are not there. Runs outside the interpreter, in children."""

import json
import os
import re
import subprocess
import sys

import pytest

from groupconv import launcher

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def groupconv(*args, **environment):
    command = [sys.executable, "-m", "groupconv", *args]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=580)


def oldest_triton():
    """The environment in which a child has the oldest supported Triton."""
    folder = os.environ.get("GROUPCONV_OLDEST_TRITON")
    if folder is None:
        pytest.skip("GROUPCONV_OLDEST_TRITON names no folder with triton 3.6.0; `make test` sets it")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=580
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("pass_", "target"), [("fprop", "sm_90"), ("dgrad", "gfx942"), ("wgrad", "sm_80")])
def test_a_slice_of_the_shipped_configurations(pass_, target):
    shipped = ("--pass", pass_, "--dtype", "tf32", "--algorithm", "implicit_gemm")
    done = groupconv("compile", "--targets", target, *shipped, "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = re.search(r"(\d+) configurations compiled, 0 with faults, 0 excluded", done.stdout)
    assert summary, done.stdout
    assert int(summary[1]) >= 8


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
command.shipped = lambda *a: [job]
command.planned = lambda *a: []
command.run_parallel = lambda work, on_done, processes: [command.run_here(job) for job in work]
sys.exit(0 if cli.main(["compile", "--targets", "sm_86"]) == 1 else 7)
"""
    assert "fault: sm_86 implicit_gemm fprop" in python(code)


def test_unknown_target_is_an_error_before_any_work():
    done = groupconv("compile", "--targets", "sm_90", "voodoo2")
    assert done.returncode == 2
    assert done.stderr.startswith("groupconv compile: target 'voodoo2' is not known")


RESOURCES = """
import dataclasses, json, sys, triton
from groupconv import devices, dispatch
from groupconv.compiling import compiler
from groupconv.problem import PASSES, ConvProblem
found = []
for width, pass_, target in json.loads(sys.argv[1]):
    p = ConvProblem(64, 3 * width, 28, 28, 3 * width, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 3, "bf16", "nhwc", "nhwc")
    name, config, _ = dispatch.modelled(p, pass_, devices.named(target), "implicit_gemm")
    used = compiler.compiled(compiler.Job(name, pass_, config, p, target)).kernels[0]
    found.append(dataclasses.asdict(used) | {"triton": triton.__version__, "columns": config["BLOCK_N"]})
print(json.dumps(found))
"""


def resources(cases, **environment):
    done = subprocess.run(
        [sys.executable, "-c", RESOURCES, json.dumps(cases)],
        capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WIDE = [
    [232, "fprop", "sm_90"], [64, "dgrad", "sm_90"], [120, "wgrad", "sm_90"], [112, "fprop", "sm_90"],
    [72, "wgrad", "sm_90"], [168, "dgrad", "sm_90"], [40, "fprop", "sm_80"],
]  # fmt: skip


def check_wide(found):
    """Channels_last loads and stores are 16 bytes a thread, also where C is a multiple of 8 only (3 x 232, 3 x 120).

    But for what belongs to a part of the columns too narrow to give every thread as much.
    """
    for used in found:
        assert used["loads"] > 0
        whole = 0.7 if used["columns"].bit_count() > 1 else 1
        assert used["wide_loads"] >= whole * used["loads"]
        assert used["wide_stores"] >= whole * used["stores"] > 0
        assert used["spill_bytes"] == 0
        assert used["matrix_count"] > 0
    assert {used["matrix"] for used in found[:6]} == {"HGMMA"}


def test_channels_last_is_vectorised():
    check_wide(resources(WIDE))


def test_the_oldest_supported_triton_compiles_them_too():
    oldest = oldest_triton()
    found = resources([*WIDE, [4, "fprop", "gfx942"], [16, "wgrad", "sm_86"]], **oldest)
    assert {used["triton"] for used in found} == {"3.6.0"}
    check_wide(found[:7])
    assert all(used["spill_bytes"] == 0 for used in found)
    for used in planned("sm_90", "nhwc", ["resnext50_32x4d.s1"], ["fprop", "backward"], **oldest):
        assert (used["algorithm"], used["matrix"]) == ("row_march", "HGMMA")


def test_a_constant_that_ptxas_would_drop():
    """Triton 3.6's pipelined 31x31 fprop adds 33 to one of two 16-bit numbers, which ptxas forgets: it is made anew."""
    code = """
from groupconv import launcher
from groupconv.compiling import compiler
from groupconv.algorithms import implicit_gemm
from groupconv.problem import ConvProblem
problem = ConvProblem(1, 2, 9, 33, 2, 31, 31, pad=(15,) * 4, groups=2, dtype="fp32")
config = dict(BLOCK_M=128, BLOCK_N=16, BLOCK_K=16, SPLITS=1, num_warps=4, num_stages=3)
(launch,) = compiler.launched(problem, "fprop", "implicit_gemm", config, "sm_90")
print(launch.options["num_stages"], launcher.adds_half_a_constant(launch.compiled.asm["ptx"]))
"""
    assert python(code, **oldest_triton()).split() == ["1", "False"]


@pytest.mark.parametrize(("constant", "found"), [(33, True), (33 << 16, True), (40 << 16 | 41, False)])
def test_half_constants_are_found(constant, found):
    ptx = f"mov.b32 \t%r3, {constant};\n\tadd.s16x2 \t%r4, %r2, %r3;\n"
    assert launcher.adds_half_a_constant(ptx) is found
    assert not launcher.adds_half_a_constant(ptx.replace("add.s16x2", "add.s32"))


def test_host_path_launches_through_the_compiled_kernel():
    """The eager path under the stub driver: the second call compiles nothing and reuses the prepared call."""
    code = """
import torch, groupconv
from groupconv import prepared
from groupconv.compiling import stub_driver
from triton import knobs
compiled = []
knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(info["fn"].name)
with stub_driver.active("sm_90"):
    x = torch.randn(2, 32, 8, 8, dtype=torch.float16).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(32, 4, 3, 3, dtype=torch.float16, requires_grad=True)
    def step():
        groupconv.triton_conv(x, w, padding=1, groups=8, backend="triton").sum().backward()
    step()
    first = len(compiled)
    step()
    assert 3 <= len(compiled) == first, compiled  # forward, one or two gradients, the sum of the splits
    assert len(prepared._CALLS) == 1
    groupconv.triton_conv(torch.randn(5, 32, 11, 9, dtype=torch.float16).contiguous(memory_format=torch.channels_last),
                          w.detach(), padding=1, groups=8, backend="triton")
    assert len(compiled) == first, "another batch and map size compiled anew"
print("ok")
"""
    assert python(code).strip() == "ok"


PLANNED = """
import dataclasses, json, sys, triton
from groupconv.compiling import command
from groupconv.perf_reports import layers
target, layout, names, passes = json.loads(sys.argv[1])
suite = [row.problem for row in layers.suite("bf16", layout) if row.name in names]
assert len(suite) == len(names)
found = []
for pass_ in passes:
    for outcome in map(command.run_here, command.planned([target], suite, pass_)):
        job = outcome.job
        about = {"name": str(job), "pass": pass_, "algorithm": job.algorithm, "config": job.config}
        found.append(about | {"faults": outcome.faults} | dataclasses.asdict(outcome.resources))
print(json.dumps(found))
"""
ALL_PASSES = ["fprop", "dgrad", "wgrad", "backward"]


def planned(target, layout, names, passes, **environment):
    """What the compiler makes of the plans of suite layers, which have no faults."""
    done = subprocess.run(
        [sys.executable, "-c", PLANNED, json.dumps([target, layout, names, passes])],
        capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= len(passes)
    for used in found:
        assert used["faults"] == [], used["name"]
        assert used["spill_bytes"] == 0
    return found


@pytest.mark.parametrize(
    ("target", "layout", "names", "passes"),
    [
        ("sm_90", "nhwc", ["mobilenetv2_100.b3", "mobilenetv2_100.b1d", "convnext_tiny.s0"], ALL_PASSES),
        ("sm_90", "nchw", ["mobilenetv2_100.b0", "convnext_base.s2", "efficientnet_b0.b4"], ALL_PASSES[:3]),
        ("sm_80", "nhwc", ["efficientnet_b0.b4"], ALL_PASSES[:3]),
        ("sm_100", "nchw", ["mobilenetv2_100.b3"], ["fprop", "wgrad"]),
        ("gfx942", "nhwc", ["mobilenetv2_100.b3", "convnext_tiny.s0"], ["fprop", "dgrad"]),
    ],
)
def test_planned_depthwise_configurations(target, layout, names, passes):
    """No spills, matrix instructions where they are promised, channels_last loads of activations 16 bytes wide."""
    for used in planned(target, layout, names, passes):
        assert used["algorithm"].startswith("depthwise_")
        assert (used["matrix_count"] > 0) == (used["algorithm"] != "depthwise_direct"), used["name"]
        if layout == "nhwc" and used["pass"] != "backward":  # which has registers for half as many channels
            assert used["wide_loads"] > 0, used["name"]


@pytest.mark.parametrize(
    ("target", "layout", "names", "passes"),
    [
        ("sm_90", "nhwc", ["resnext50_32x4d.s1", "resnext50_32x4d.s2d", "dpn92.s2"], ALL_PASSES),
        ("sm_90", "nchw", ["resnext101_32x8d.s1"], ALL_PASSES),
        ("sm_80", "nhwc", ["resnext50_32x4d.s3"], ALL_PASSES[:3]),
        ("sm_100", "nhwc", ["resnext50_32x4d.s1"], ["fprop", "wgrad"]),
        ("gfx942", "nhwc", ["resnext50_32x4d.s1", "efficientnet_b0_g8_gn.s5"], ALL_PASSES[:3]),
    ],
)
def test_planned_narrow_configurations(target, layout, names, passes):
    """No spills; on sm_90 matrix instructions of a warp group, and channels_last accesses of activations are wide."""
    for used in planned(target, layout, names, passes):
        assert used["algorithm"] == "row_march", used["name"]
        assert used["matrix_count"] > 0
        if target == "sm_90":
            assert used["matrix"] == "HGMMA", used["name"]
        if (target, layout) == ("sm_90", "nhwc"):
            # Narrow loads are of weights, before the loop. wgrad has none, but x of 32 lanes, 16 channels is 8 bytes a
            # thread.
            assert used["wide_loads"] > (0 if used["pass"] != "wgrad" else used["loads"] / 2)
            if used["pass"] in ("fprop", "dgrad"):
                assert used["wide_stores"] == used["stores"] > 0


@pytest.mark.parametrize(
    ("target", "names", "passes"),
    [
        ("sm_90", ["regnetx_040.s3", "regnety_064.s3", "regnety_320.s2d"], ALL_PASSES[:3]),
        ("sm_90", ["regnety_160.s3", "regnetx_080.s3", "shufflenet_g3.s2c"], ["fprop", "wgrad"]),
        ("sm_80", ["regnetx_320.s3"], ALL_PASSES[:3]),
        ("sm_100", ["regnety_320.s2d"], ["fprop", "dgrad"]),
        ("gfx942", ["repvgg_b2g4.s1"], ["fprop", "wgrad"]),
    ],
)
def test_planned_wide_configurations(target, names, passes):
    """No spills; on sm_90 products of a warp group, 64 columns at least where groups are as wide; wide accesses."""
    for used in planned(target, "nhwc", names, passes):
        assert used["algorithm"] in ("implicit_gemm", "row_block", "row_block_tma"), used["name"]
        assert used["matrix_count"] > 0
        if target == "sm_90":
            assert used["matrix_n"] >= min(64, 32 if "40" in used["name"] else 64), used["name"]
            loaded = used["wide_loads"] if used["algorithm"] != "row_block_tma" else used["loads"]
            assert loaded >= 0.4 * used["loads"] > 0


DESCRIPTORS = """
import json, sys
from groupconv import devices, dispatch
from groupconv.compiling import compiler
from groupconv.problem import ConvProblem
found = []
for target, stride, pass_, tiles in json.loads(sys.argv[1]):
    p = ConvProblem(32, 512, 28, 28, 512, 3, 3, (stride, stride), (1, 1, 1, 1), (1, 1), 4, "bf16")
    name, config, _ = dispatch.modelled(p, pass_, devices.named(target), "row_block_tma")
    config |= dict(zip(("BLOCK_M", "BLOCK_I", "BLOCK_K"), tiles))
    ptx = compiler.launched(p, pass_, name, config, target)[0].compiled.asm["ptx"]
    found.append([ptx.count("cp.async.bulk.tensor.5d"), ptx.count("cp.async.bulk.tensor.4d"), ptx.count("ld.global")])
print(json.dumps(found))
"""


def test_operands_come_by_descriptors():
    """On sm_90 and later no operand is loaded by pointers: activations have five axes, weights four."""
    passes = [
        ["sm_90", 1, "fprop", [128, 32, 32]], ["sm_90", 2, "fprop", [128, 16, 32]], ["sm_90", 2, "dgrad", [64, 1, 32]],
        ["sm_90", 1, "wgrad", [64, 32, 32]], ["sm_100", 1, "fprop", [128, 32, 32]],
    ]  # fmt: skip
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", DESCRIPTORS, json.dumps(passes)],
            capture_output=True, text=True, env=ENVIRONMENT, timeout=580, check=True,
        ).stdout
    )  # fmt: skip
    for (_, _, pass_, _), (activations, weights, pointers) in zip(passes, found, strict=True):
        assert activations > 0
        assert (weights > 0) == (pass_ != "wgrad")
        assert pointers == 0


def test_three_bf16_products_take_the_place_of_one():
    """bf16x3 compiles to bf16 matrix instructions on every target that has them, without spills."""
    code = """
import json
from groupconv import devices, dispatch
from groupconv.compiling import compiler
from groupconv.problem import ConvProblem
found = []
for target, pass_ in (("sm_90", "fprop"), ("sm_80", "dgrad"), ("gfx942", "wgrad")):
    p = ConvProblem(32, 480, 14, 14, 480, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 4, "bf16x3")
    name, config, _ = dispatch.best(p, pass_, devices.named(target), ["implicit_gemm"])
    made = compiler.launched(p, pass_, name, config, target)[0].compiled
    text = made.asm.get("ptx") or made.asm["amdgcn"]
    used = compiler.compiled(compiler.Job(name, pass_, config, p, target)).kernels[0]
    found.append([used.spill_bytes, used.matrix_count, ".f32.bf16.bf16" in text or "_bf16 " in text, "tf32" in text])
print(json.dumps(found))
"""
    for spills, matrix, bf16, tf32 in json.loads(python(code)):
        assert spills == 0
        assert matrix > 0
        assert bf16
        assert not tf32
