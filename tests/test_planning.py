"""A configuration says all of a launch: how its work is divided, and how much memory that takes. Planning is short."""

import dataclasses
import sys

import cases
import pytest
import torch

from groupconv import cost, devices, dispatch, occupancy
from groupconv.algorithms import REGISTRY, able, calls, candidates, divided, interpretable, tiling
from groupconv.perf_reports import layers
from groupconv.problem import PLANNED, ConvProblem, dense_strides

TARGETS = ("sm_80", "h100", "gfx942", "gfx1100")
# Huge filters on tiny maps, one image, one pixel; and few groups of many channels.
EXTREME = (
    ConvProblem(2, 4096, 7, 7, 4096, 3, 3, pad=(1, 1, 1, 1), groups=4),
    ConvProblem(1, 64, 1, 1, 64, 7, 7, pad=(3, 3, 3, 3), groups=64),
    ConvProblem(1, 3000, 2, 3, 3000, 5, 5, pad=(2, 2, 2, 2), groups=3000),
    ConvProblem(256, 8, 2, 2, 8, 7, 7, pad=(3, 3, 3, 3), groups=8),
    ConvProblem(1, 128, 224, 224, 128, 3, 3, pad=(1, 1, 1, 1), groups=32),
)


def strides_of(problem):
    shapes = {"x": problem.x_shape, "dx": problem.x_shape, "w": problem.w_shape, "dw": problem.w_shape}
    shapes |= {"y": problem.y_shape, "dy": problem.y_shape}
    return {name: dense_strides(shape, problem.layout == "nhwc") for name, shape in shapes.items()}


def workspace(problem, pass_, name, config, on):
    """Bytes of fp32 partial sums of a launch, and how many launches there are."""
    call = REGISTRY[name].prepare(problem, pass_, config, on, strides_of(problem))
    splits = call.result.splits
    return (4 * splits * problem.params if splits > 1 else 0), len(call.launches)


def problems():
    for layout in ("nhwc", "nchw"):
        yield from (layer.problem for layer in layers.suite("bf16", layout))
        yield from (dataclasses.replace(problem, layout=layout, out_layout=layout) for problem in EXTREME)


@pytest.mark.parametrize("target", ["h100", "gfx942"])
def test_partial_sums_take_no_more_memory_than_the_operands(target):
    on = devices.named(target)
    for problem in problems():
        for pass_ in ("wgrad", "backward"):
            for name in able(problem, pass_, on):
                tile = candidates(name, problem, pass_, on)[0]
                for config in divided(name, problem, pass_, tile, on):
                    bytes_, launches = workspace(problem, pass_, name, config, on)
                    assert bytes_ <= problem.min_bytes(pass_), (problem, name, config)
                    assert launches == (2 if bytes_ else 1)
                    # The model counts what is launched.
                    asked = tiling(name, problem, pass_, config, on)
                    assert asked.launches == launches
                    assert asked.dram_bytes == problem.min_bytes(pass_) + 2 * bytes_


@pytest.mark.parametrize("target", TARGETS)
def test_any_division_of_a_tile_is_legal(target):
    """A measurement's division serves other problems of its class: it is cut down to what they have."""
    on = devices.named(target)
    for problem in (*EXTREME, ConvProblem(3, 32, 5, 6, 32, 3, 3, groups=8), ConvProblem(3, 9, 5, 6, 9, 3, 3, groups=9)):
        for pass_ in PLANNED:
            for name in able(problem, pass_, on):
                module = REGISTRY[name]
                tile = candidates(name, problem, pass_, on)[0]
                most = {field: bounds[1] for field, bounds in module.DIVISION.items()}
                for division in (dict.fromkeys(module.DIVISION, 1), most):
                    config = divided(name, problem, pass_, tile, on)[0] | division
                    assert tiling(name, problem, pass_, config, on).programs > 0
                    if pass_ in ("wgrad", "backward"):
                        bytes_, _ = workspace(problem, pass_, name, config, on)
                        assert bytes_ <= problem.min_bytes(pass_)


@pytest.mark.parametrize(
    ("name", "width", "side"),
    [
        ("implicit_gemm", 64, 5), ("row_block", 64, 5), ("row_block_tma", 64, 5), ("row_march", 4, 5),
        ("depthwise_toeplitz", 1, 11),
    ],
)  # fmt: skip
def test_offsets_of_partial_sums_beyond_32_bits(name, width, side):
    """No operand has 2^31 elements, but the partial sums of as many splits as may be have more together."""
    on, module = devices.named("h100"), REGISTRY[name]
    problem = ConvProblem(
        98304, 16384, 1, 1, 16384, side, side, pad=(side // 2,) * 4, groups=16384 // width, dtype="tf32"
    )
    most = {field: 1 if field == "LANE_BLOCKS" else bounds[1] for field, bounds in module.DIVISION.items()}
    config = divided(name, problem, "wgrad", candidates(name, problem, "wgrad", on)[0], on)[0] | most
    call = module.prepare(problem, "wgrad", config, on, strides_of(problem))
    kernel, scalars = call.launches[0].kernel, call.launches[0].scalars
    assert call.result.splits * problem.params >= 2**31
    assert dict(zip(kernel.arg_names[-len(scalars) :], scalars, strict=True))["INDEX_64"]


@pytest.mark.parametrize(("pad", "wide"), [(0, False), (3, True)])
def test_offsets_from_above_a_map(pad, wide):
    """A march that begins in the padding counts its rows from there: the last is further from it than from the map."""
    problem = ConvProblem(1, 8, 3, 4, 8, 1, 1, pad=(pad, 0, 0, 0), groups=8, dtype="fp16", layout="nhwc")
    strides = {"x": (2**31, 1, 2**29, 8), "w": (1, 1, 1, 1), "dw": (1, 1, 1, 1)}
    assert calls.index_64(problem, strides) is wide


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name in filter(interpretable, REGISTRY)
        for layout in ("nhwc", "nchw")
        if name != "depthwise_map" and (name, layout) != ("row_block_tma", "nchw")
    ],
)
def test_one_split_writes_dw_itself(name, layout, device):
    """Of one split there are no partial sums: dw is written with its own strides and type, in one launch."""
    width = {"row_march": 4, "row_block": 4, "row_block_tma": 8, "implicit_gemm": 3}.get(name, 1)
    problem = ConvProblem(
        1, 2 * width, 6, 7, 2 * width, 5, 5, pad=(2, 2, 2, 2), groups=2, dtype="bf16", layout=layout, out_layout=layout
    )
    case, on = cases.Case(problem, layout, dy=layout), cases.machine(device, "few")
    given = cases.operands(case, device)
    strides = given.strides(problem) | {"dw": dense_strides(problem.w_shape, layout == "nchw")}
    module = REGISTRY[name]
    config = cases.config(module, problem, "wgrad", on, "few") | dict.fromkeys(module.DIVISION, 1)
    config |= {"LANE_BLOCKS": 2**20} if name == "row_march" else {}
    with cases.guarded():
        call = module.prepare(problem, "wgrad", config, on, strides)
        dw = call(given.dy, given.x)
    assert len(call.launches) == call.result.splits == 1
    assert dw.dtype == torch.bfloat16
    assert dw.stride() == strides["dw"]
    assert cases.error(dw, cases.references(problem, given)["wgrad"]) <= cases.bound("bf16", problem.out_pixels)


def test_planning_estimates_few_configurations(monkeypatch):
    """A new shape is planned while a caller waits: the number of estimates is bounded, whatever a machine's speed."""
    counted = []
    estimate = cost.estimate
    monkeypatch.setattr(cost, "estimate", lambda *args: counted.append(1) or estimate(*args))
    most = 0
    for layout in ("nhwc", "nchw"):
        for layer in layers.suite("bf16", layout):
            counted.clear()
            plan = dispatch.plan(layer.problem, devices.named("h100"))
            assert not counted  # nor is any pass planned before it is wanted
            _ = plan.fprop, plan.backward
            most = max(most, len(counted))
    assert 100 < most <= 1200


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_80", 128, 40_000, 4, 4),  # 65536 registers hold 4 times 128 threads of 128
        ("sm_80", 32, 80_000, 4, 2),  # 164 KiB of shared memory, of each program 1 KiB for CUDA
        ("sm_86", 32, 1000, 4, 12),  # 1536 threads
        ("h100", 300, 0, 8, 1),  # no thread has more than 255
        ("gfx942", 128, 0, 4, 4),  # 131072 registers, and a warp has 64 threads
        ("gfx1100", 90, 0, 4, 8),  # 98304 registers, 24 of a thread at a time
        ("h100", 255, 10**6, 8, 1),
    ],
)  # fmt: skip
def test_programs_of_a_multiprocessor(target, registers, shared, warps, programs):
    room = occupancy.room("row_march", "fprop", devices.named(target), "bf16")
    assert room.programs(registers, shared, warps) == programs


def test_what_was_compiled_goes_before_the_estimate():
    """A tile above the limit that was found sound fits, one below it that spills does not."""
    on, problem = devices.named("sm_90"), layers.suite("bf16", "nhwc")[0].problem
    name, pass_ = able(problem, "fprop", on)[0], "fprop"
    room = occupancy.Room(name, pass_, on, "bf16")
    held = REGISTRY[name].held(problem, pass_, candidates(name, problem, pass_, on)[0], on)
    assert room.fits(held)
    assert not room.fits(held, occupancy.Compiled(0, held.shared_bytes))
    assert not room.fits(held, occupancy.Compiled(32, on.shared_bytes + 1))
    too_much = held._replace(sums=1e9)
    assert not room.fits(too_much)
    assert room.fits(too_much, occupancy.Compiled(200, held.shared_bytes))
    brink = occupancy.Compiled(255, held.shared_bytes)  # where another Triton's may spill
    assert room.fits(held, brink)
    assert room.risk(held, brink) > room.risk(held, occupancy.Compiled(200, held.shared_bytes)) == 1
    few, many = (room.resident(held, occupancy.Compiled(registers, 1024)) for registers in (255, 32))
    assert few < many


def test_tables_hold_what_was_compiled():
    """Of each layer's tiles the sizes that its algorithm has, and registers that a thread can have; the plans' too."""
    kinds, compiled = occupancy.tables()
    assert {" ".join(layer.split()[:3]) for layer in compiled} >= {"wgmma row_block fprop", "mfma implicit_gemm wgrad"}
    for layer, rows in compiled.items():
        name = next(name for name in REGISTRY if f" {name} " in layer)
        for *sizes, registers, shared in rows:
            assert len(sizes) == len(REGISTRY[name].BLOCKS) + 2, layer
            assert 0 <= registers <= 512
            assert shared >= 0
    assert all(0.0 < kind.most <= 2.0 for kind in kinds.values() if kind.most)


@pytest.mark.parametrize("width", [2, 8, 64])
def test_planning_many_groups_takes_as_long_as_few(width):
    """In calls of Python functions, of which 100,000 groups want no more than 1,000."""
    target = devices.named("h100")

    def calls(groups):
        problem = ConvProblem(1, width * groups, 20, 20, width * groups, 3, 3, pad=(1, 1, 1, 1), groups=groups)
        made = []
        sys.setprofile(lambda frame, event, argument: made.append(None))
        try:
            for pass_ in PLANNED:
                dispatch.expected(problem, pass_, target)
        finally:
            sys.setprofile(None)
        return len(made)

    calls(999)  # what any first call does
    assert calls(100_000) <= 1.2 * calls(1_000)
