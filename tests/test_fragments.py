"""The kernels in Gluon, which no interpreter runs: as compiled, on the software GPU, against float64.

Runs with TRITON_INTERPRET=0 (`make test-compiled`).
"""

import dataclasses
import re

import cases
import compiled_code
import pytest
import reliability
import softgpu
import torch

from groupconv import devices
from groupconv.activations import ACTIVATIONS
from groupconv.algorithms import (
    candidates,
    depthwise_mma,
    depthwise_mma_nchw,
    divided,
    group_mma,
    lack,
    possible,
    tiling,
)
from groupconv.compiling import compiler, resources
from groupconv.perf_reports import layers
from groupconv.problem import PASSES, PLANNED, ConvProblem

pytestmark = pytest.mark.skipif(
    softgpu.compiler() is None, reason="no C compiler: neither $CC nor cc nor gcc; the software GPU is in C"
)
NAME = depthwise_mma.NAME
NAMES = NAME, depthwise_mma_nchw.NAME, group_mma.NAME


def layer(channels=24, kernel=(3, 3), hw=(9, 17), batch=2, width=1, layout="nhwc", **changes) -> ConvProblem:
    given = {
        "pad": (kernel[0] // 2,) * 2 + (kernel[1] // 2,) * 2,
        "dtype": "bf16",
        "groups": channels // width,
    } | changes
    c_out = given.pop("c_out", channels)
    return ConvProblem(batch, channels, *hw, c_out, *kernel, layout=layout, out_layout=layout, **given)


def rows(channels=24, *args, **changes) -> ConvProblem:
    return layer(channels, *args, layout="nchw", **changes)


def tile(v=4, channels=16, lanes=16, warps=4, stages=4, **changes) -> dict[str, int]:
    return {
        "BLOCK_V": v, "BLOCK_C": channels, "BLOCK_M": lanes, "BLOCK_H": 1024, "BLOCK_T": 16, "BLOCK_U": 1,
        "num_warps": warps, "num_stages": stages, "SPLITS": 1,
    } | changes  # fmt: skip


def of_rows(channels=2, lanes=32, warps=4, ahead=4, **changes) -> dict[str, int]:
    return {
        "BLOCK_C": channels, "BLOCK_M": lanes, "BLOCK_W": 8, "BLOCK_H": 1024, "BLOCK_T": 16,
        "num_warps": warps, "num_stages": ahead, "SPLITS": 1,
    } | changes  # fmt: skip


def of_groups(width, eights=4, inner=1, across=4, lanes=16, warps=None, stages=4, **changes) -> dict[str, int]:
    return {
        "BLOCK_J": eights, "BLOCK_I": inner, "BLOCK_C": width * inner * across, "BLOCK_M": lanes, "BLOCK_H": 1024,
        "BLOCK_U": 1, "num_warps": warps or across * lanes // 16, "num_stages": stages, "SPLITS": 1,
    } | changes  # fmt: skip


# What the problem is, how x and dy lie, the tile.
CASES = {
    "7x7": (layer(32, (7, 7), (14, 14)), "nhwc", tile()),
    "7x7 of a map as narrow": (layer(16, (7, 7), (7, 7), batch=17), "nhwc", tile(BLOCK_U=3, BLOCK_T=4, SPLITS=2)),
    "more lanes than there are": (layer(48, (5, 5), (6, 20), batch=1), "nhwc", tile(lanes=32, warps=8, stages=2)),
    "two tiles of lanes a warp": (layer(16, (3, 3), (9, 30), batch=3), "nhwc", tile(lanes=32, BLOCK_U=4, SPLITS=2)),
    "8 channels a thread": (layer(64, (3, 3), (11, 9)), "nhwc", tile(8, 32)),
    "2 channels a thread": (layer(40, (9, 9), (10, 12)), "nhwc", tile(2, 16, warps=8, BLOCK_H=4, SPLITS=3)),
    "64 channels": (layer(72, (2, 3), (5, 9)), "nhwc", tile(8, 64, warps=8, stages=2)),
    "stride 2": (layer(24, (5, 5), (13, 22), stride=(2, 2)), "nhwc", tile(BLOCK_U=2, BLOCK_H=4)),
    "stride 2, 3x3, same": (layer(24, stride=(2, 2), hw=(12, 18), pad=(0, 1, 0, 1)), "nhwc", tile(BLOCK_T=4)),
    "strides 3 and 2": (layer(16, (4, 3), (14, 33), stride=(3, 2), pad=(1, 2, 0, 1)), "nhwc", tile(stages=2)),
    "dilation": (layer(16, (3, 5), (12, 19), dilation=(2, 3), pad=(2, 2, 6, 6)), "nhwc", tile(BLOCK_U=4)),
    "rows of a stride, columns of a dilation": (
        layer(16, (3, 3), (9, 21), stride=(2, 1), dilation=(1, 2), pad=(1, 1, 2, 2)), "nhwc", tile(),
    ),
    "11x1": (layer(24, (11, 1), (14, 14), dtype="fp16"), "nhwc", tile(2, 16, warps=8)),
    "1x11": (layer(24, (1, 11), (6, 30), dtype="fp16"), "nhwc", tile(SPLITS=2)),
    "all of the padding's": (layer(8, (7, 7), (1, 2), pad=(6, 6, 6, 6)), "nhwc", tile()),
    "1x19 on a narrow map": (layer(16, (1, 19), (4, 7)), "nhwc", tile()),
    "60 channels": (layer(60, hw=(6, 14)), "nhwc", tile(BLOCK_H=4)),
    "12 channels": (layer(12, (5, 5), (6, 14)), "nhwc", tile()),
    "12 of 28 channels": (layer(12, hw=(6, 14)), "nhwc-padded", tile()),
    "an odd pixel stride": (layer(16, (7, 7), (6, 14)), "nhwc-slice", tile()),
    "groups of 2": (layer(40, hw=(6, 14), width=2), "nhwc", of_groups(2, 2, 2, BLOCK_U=3)),
    "groups of 4": (layer(40, hw=(6, 14), width=4, bias=True), "nhwc", of_groups(4, BLOCK_U=4, SPLITS=2)),
    "groups of 4, two a warp": (layer(48, (5, 5), (6, 14), width=4), "nhwc", of_groups(4, 4, 2, 2, SPLITS=2)),
    "groups of 8": (layer(40, hw=(6, 14), width=8), "nhwc-padded", of_groups(8, BLOCK_H=4)),
    "groups of 8, many lanes": (layer(16, hw=(7, 9), batch=3, width=8), "nhwc", of_groups(8, 8, 1, 2, 32, BLOCK_U=2)),
    "groups of 16": (layer(32, hw=(6, 14), width=16, dtype="fp16"), "nhwc", of_groups(16, 4, 1, 2, BLOCK_U=2)),
    "groups of 16, two a warp": (layer(64, hw=(5, 7), width=16), "nhwc", of_groups(16, 2, 2, 2, 32, BLOCK_H=4)),
    "groups, stride 2": (layer(32, hw=(9, 11), width=4, stride=(2, 2)), "nhwc", of_groups(4, 2, 1, 4, BLOCK_U=2)),
    "groups, strides 1 and 2": (
        layer(32, hw=(7, 13), width=8, stride=(1, 2), pad=(1, 0, 2, 0)), "nhwc", of_groups(8, 2, 1, 2),
    ),
    "groups, dilation": (
        layer(48, (2, 5), (7, 9), width=4, dilation=(2, 2), pad=(1, 2, 0, 6)), "nhwc", of_groups(4, BLOCK_U=3),
    ),
    "groups, 1x1": (layer(32, (1, 1), (5, 6), width=16), "nhwc", of_groups(16, 4, 1, 2)),
    "groups, 1x1, a column a lane": (layer(32, (1, 1), (5, 6), width=16), "nhwc", of_groups(16, 2, 1, 2, BLOCK_U=3)),
    "groups, an odd pixel stride": (layer(16, hw=(5, 6), width=2), "nhwc-slice", of_groups(2, 2, 1, 8)),
    "groups, 20 channels": (layer(20, hw=(5, 6), width=4), "nhwc", of_groups(4)),
    "rows": (rows(5, (3, 3), (12, 24)), "nchw", of_rows()),
    "rows of 14": (rows(5, (7, 7), (14, 14)), "nchw", of_rows(1, 64, BLOCK_H=8)),
    "rows of 14, whole": (rows(5, (7, 7), (14, 14)), "nchw", of_rows(1, 64, BLOCK_W=16)),
    "rows of 12, whole": (rows(5, (3, 5), (7, 12), batch=9), "nchw", of_rows(4, 32, 8, BLOCK_W=16, BLOCK_H=4)),
    "rows of 9, whole": (rows(3, hw=(9, 9), batch=5, bias=True), "nchw", of_rows(ahead=2, BLOCK_W=16, SPLITS=2)),
    "rows of 14, whole, stride 2": (
        rows(5, (5, 5), (28, 28), stride=(2, 2)), "nchw", of_rows(ahead=2, BLOCK_W=16, BLOCK_T=2),
    ),
    "rows of 16 of 40": (rows(2, (3, 3), (6, 40)), "nchw", of_rows(BLOCK_W=16)),
    "rows of 7": (rows(9, hw=(7, 7), batch=19), "nchw", of_rows(1, 64, ahead=8)),
    "rows of 33, far apart": (rows(3, (5, 5), (9, 33), dilation=(4, 4), pad=(8, 8, 8, 8)), "nchw", of_rows(4, 16)),
    "rows, two tiles of lanes a warp": (rows(6, (5, 5), (9, 30), batch=3), "nchw", of_rows(2, 64, SPLITS=3)),
    "rows, stride 2": (rows(6, (5, 5), (13, 24), stride=(2, 2)), "nchw", of_rows(ahead=2, BLOCK_H=4, BLOCK_T=2)),
    "rows, stride 2, same": (rows(6, stride=(2, 2), hw=(12, 16), pad=(0, 1, 0, 1)), "nchw", of_rows(ahead=1)),
    "rows, strides 3 and 2": (
        rows(3, (4, 3), (14, 33), stride=(3, 2), pad=(1, 2, 0, 1)), "nchw", of_rows(ahead=3, BLOCK_T=4, SPLITS=2),
    ),
    "rows, strides 1 and 4": (rows(3, hw=(7, 33), stride=(1, 4)), "nchw", of_rows(8, 16, 8)),
    "rows, a dilation": (rows(4, (3, 5), (12, 20), dilation=(2, 3), pad=(2, 2, 6, 6)), "nchw", of_rows(BLOCK_T=2)),
    "rows, 11x11": (rows(3, (11, 11), (14, 28), dtype="fp16"), "nchw", of_rows(1, 16, 1, 2)),
    "rows, 11x1": (rows(3, (11, 1), (14, 14), dtype="fp16"), "nchw", of_rows(SPLITS=2)),
    "rows, 1x31": (rows(3, (1, 31), (4, 40)), "nchw", of_rows(ahead=2)),
    "rows, 2x27, whole": (rows(4, (2, 27), (9, 14)), "nchw", of_rows(BLOCK_W=16)),
    "rows, 1x37 on a narrow map": (rows(4, (1, 37), (4, 7)), "nchw", of_rows(4, 16)),
    "rows, 3x19 on a narrow map": (rows(4, (3, 19), (5, 8), dilation=(1, 2), pad=(1, 1, 18, 18)), "nchw", of_rows()),
    "rows, 1x17": (rows(3, (1, 17), (6, 40), dtype="fp16"), "nchw", of_rows(ahead=8)),
    "rows, all of the padding's": (rows(2, (7, 7), (1, 2), pad=(6, 6, 6, 6)), "nchw", of_rows()),
    "rows, a channel multiplier": (rows(3, hw=(6, 16), c_out=9), "nchw", of_rows()),
    "rows between others": (rows(3, (3, 3), (7, 24)), "batches", of_rows(SPLITS=2)),
    "channels between others": (rows(4, (3, 3), (7, 24)), "slice", of_rows(4, 32, 8)),
    "rows of 24 two apart": (rows(3, (3, 3), (7, 24)), "rows+2", of_rows()),
    "rows of 24 one apart": (rows(3, (3, 3), (7, 24)), "rows+1", of_rows()),
    "columns as rows": (rows(4, (3, 3), (7, 24)), "turned", of_rows(ahead=3)),
}  # fmt: skip


def algorithm(problem: ConvProblem):
    if problem.cin_g > 1:
        return group_mma
    return depthwise_mma if problem.layout == "nhwc" else depthwise_mma_nchw


def run(problem: ConvProblem, pass_: str, view: str, config: dict, target: str, **options):
    """One pass, its results guarded: (result, operands, the software GPU's session, the prepared call)."""
    given = cases.operands(cases.Case(problem, x=view, dy=view))
    call = algorithm(problem).prepare(problem, pass_, config, devices.named(target), given.strides(problem))
    with softgpu.active(target, **options) as session, cases.guarded():
        out = call(*given.of(pass_))
    return out, given, session, call


UNSERVED = {
    ("groups, stride 2", "dgrad"),
    ("groups, strides 1 and 2", "dgrad"),
    ("rows, a channel multiplier", "dgrad"),
}


WHOLE = {"SPLITS": 1, "BLOCK_U": 1, "BLOCK_T": 16}  # of passes that are not divided


@pytest.mark.parametrize("pass_", PLANNED)
@pytest.mark.parametrize("name", CASES)
def test_numbers(name, pass_):
    """No fault, and the numbers of float64; half of the cases on sm_80, half with late reads."""
    problem, view, config = CASES[name]
    number = list(CASES).index(name) + PLANNED.index(pass_)
    target = compiled_code.TARGETS[number % 2]
    fused = problem.layout == "nchw" and problem.stride == (1, 1) and problem.c_in == problem.c_out
    if (name, pass_) in UNSERVED or (pass_ == "backward" and not fused):
        assert algorithm(problem).supports(problem, pass_, devices.named(target)) is not None
        return
    assert algorithm(problem).supports(problem, pass_, devices.named(target)) is None
    if pass_ not in ("wgrad", "backward"):
        config = config | {name: most for name, most in WHOLE.items() if name in config}
    else:  # all warps have channels of their own
        own = config.get("BLOCK_V", config.get("BLOCK_I", 1) * problem.cin_g)
        config = config | {"num_warps": config["BLOCK_C"] // own}
    out, given, session, _ = run(problem, pass_, view, config, target, late=number // 2 % 2 == 0)
    expected = cases.references(problem, given)
    for each, found in zip(cases.PRODUCES.get(pass_, (pass_,)), out if pass_ == "backward" else (out,), strict=True):
        assert cases.error(found, expected[each]) <= cases.bound(problem.dtype, cases.terms(problem, each))
    assert not any(result.findings for result in session.results)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_what_follows(activation):
    """Bias, a residual and every activation, and what the activation is of."""
    for width, layout, config in ((1, "nhwc", tile()), (4, "nhwc", of_groups(4)), (1, "nchw", of_rows())):
        problem = layer(
            24, hw=(5, 9), width=width, layout=layout, bias=True, activation=activation, residual=True, keeps=True
        )
        errors, _ = compiled_code.run_pass(problem, "fprop", algorithm(problem).NAME, config, "sm_90")
        assert set(errors) == {"fprop", "kept"}
        assert max(errors.values()) <= 1


def test_an_activation_alone():
    """Which is applied before results move."""
    problem = layer(24, hw=(5, 9), activation="relu")
    out, given, _, _ = run(problem, "fprop", "nhwc", tile(), "sm_90")
    assert cases.error(out, cases.references(problem, given)["fprop"].relu()) <= cases.bound("bf16", 9)


@pytest.mark.parametrize(("pass_", "unaligned"), [("fprop", "x"), ("dgrad", "dy"), ("wgrad", "x"), ("wgrad", "dy")])
def test_tensors_that_begin_anywhere(pass_, unaligned):
    """Copied an element at a time, and so before a step and not ahead of it, is what begins between 16 bytes; and rows
    are loaded so.
    """
    problem, found = layer(16), []
    for which in ((), (unaligned,)):
        job = compiler.Job(NAME, pass_, tile(), problem, "sm_90", unaligned=which)
        found.append(compiler.launched(job)[0].compiled.asm["ptx"])
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", found[0])
    assert "cp.async.c" not in found[1].replace("cp.async.commit", "")
    for which, words in (((), True), ((unaligned,), False)):
        job = compiler.Job(
            depthwise_mma_nchw.NAME, pass_, of_rows(4, 64), rows(16, hw=(9, 16)), "sm_90", unaligned=which
        )
        ptx = compiler.launched(job)[0].compiled.asm["ptx"]
        loads = set(re.findall(r"ld\.global\.(\S+)", ptx[ptx.index("mma.sync") :]))
        assert ("b16" not in loads) == words, loads


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("start", [1, 2, 8])
def test_numbers_of_tensors_that_begin_anywhere(start, layout):
    problem = layer(16, hw=(5, 12), layout=layout)
    given = cases.operands(cases.Case(problem))
    memory = torch.full((given.x.numel() + start,), float("nan"), dtype=given.x.dtype)
    x = memory[start:].as_strided(given.x.shape, given.x.stride()).copy_(given.x)
    with softgpu.active("sm_90"), cases.guarded():
        config = tile() if layout == "nhwc" else of_rows()
        call = algorithm(problem).prepare(problem, "fprop", config, devices.named("sm_90"), given.strides(problem))
        out = call(x, given.w, None)
    assert cases.error(out, cases.references(problem, given)["fprop"]) <= cases.bound("bf16", 9)


@pytest.mark.parametrize(
    ("layout", "pass_"),
    [("nchw", "fprop"), ("nchw", "wgrad"), ("nchw", "backward"), ("nhwc", "dgrad"), ("nhwc", "wgrad")],
)
def test_columns_past_two_to_the_31(layout, pass_):
    """Of what is read, columns lie so far apart that those of one window do not fit 32 bits."""
    problem, on = layer(16, (3, 13), (4, 18), batch=1, layout=layout), devices.named("sm_90")
    config = of_rows(4, 16) if layout == "nchw" else tile()
    given, far = cases.operands(cases.Case(problem)), 2**27
    moved = "dy" if pass_ in ("dgrad", "backward") else "x"
    values = getattr(given, moved)
    c, h, w = values.shape[1:]
    storage = torch.empty((w - 1) * far + c * h, dtype=values.dtype)  # of which few pages are touched
    apart = (c * h, 1, c, far) if problem.layout == "nhwc" else (c * h, h, 1, far)
    given = dataclasses.replace(given, **{moved: storage.as_strided(values.shape, apart).copy_(values)})
    strides = given.strides(problem) | {moved: apart}
    with softgpu.active("sm_90"), cases.guarded():
        out = algorithm(problem).prepare(problem, pass_, config, on, strides)(*given.of(pass_))
    expected = cases.references(problem, given)
    for each, found in zip(cases.PRODUCES.get(pass_, (pass_,)), out if pass_ == "backward" else (out,), strict=True):
        assert cases.error(found, expected[each]) <= cases.bound(problem.dtype, cases.terms(problem, each))


def test_operands_go_from_memory_to_fragments():
    """wgrad stores nothing to shared memory, and fprop only its results; a thread reads all its channels at once."""
    for v, width in ((2, "v2.b16"), (4, "v4.b16"), (8, "v4.b32")):
        for pass_ in PASSES:
            job = compiler.Job(NAME, pass_, tile(v, 8 * v, warps=8), layer(64, hw=(9, 9)), "sm_90")
            ptx = compiler.launched(job)[0].compiled.asm["ptx"]
            assert ptx.count("mma.sync.aligned.m16n8k16") >= 3 * v
            assert "ldmatrix" not in ptx
            assert (ptx.count("st.shared") == 0) == (pass_ == "wgrad")
            assert f"ld.shared.{width} " in ptx.replace("\t", " ")


@pytest.mark.parametrize("width", group_mma.GROUPS)
def test_operands_of_groups_go_from_memory_to_fragments(width):
    for pass_ in PASSES:
        config = of_groups(width, 4, 1, 8 if width < 8 else 2)
        job = compiler.Job(group_mma.NAME, pass_, config, layer(64, hw=(9, 9), width=width), "sm_90")
        ptx = compiler.launched(job)[0].compiled.asm["ptx"]
        assert (len(re.findall(r"st(matrix\S*)?\.shared", ptx)) == 0) == (pass_ == "wgrad")


@pytest.mark.parametrize(("width", "vector"), [(7, "b16"), (14, "b32"), (28, "v2.b32")])
@pytest.mark.parametrize("pass_", PLANNED)
def test_rows_go_from_memory_to_fragments(pass_, width, vector):
    """In the loop nothing is in shared memory, and words are as wide as rows allow."""
    job = compiler.Job(depthwise_mma_nchw.NAME, pass_, of_rows(4, 64), rows(8, hw=(12, width)), "sm_90")
    ptx = compiler.launched(job)[0].compiled.asm["ptx"]
    assert "shared" not in ptx[: ptx.rindex("mma.sync")].replace(".extern .shared", "")
    assert f"ld.global.{vector} " in ptx[ptx.index("mma.sync") :].replace("\t", " ")
    assert ("movmatrix" in ptx) == (pass_ in ("wgrad", "backward"))


@pytest.mark.parametrize(("v", "conflicts"), [(2, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("pass_", PASSES)
def test_bank_conflicts(pass_, v, conflicts):
    """Copies have none, and reads as many as there are such parts in 16 bytes."""
    problem = layer(64, hw=(9, 9), batch=4)
    _, _, session, _ = run(problem, pass_, "nhwc", tile(v, 8 * v, warps=8), "sm_90")
    counts = softgpu.totals(session.results[0])
    assert counts["wavefronts cp.async"] == counts["ideal cp.async"]
    if pass_ == "wgrad":
        assert counts["wavefronts ld.shared"] <= 1.05 * conflicts * counts["ideal ld.shared"]


@pytest.mark.parametrize(("layout", "config"), [("nhwc", tile()), ("nchw", of_rows())])
@pytest.mark.parametrize("pass_", ["fprop", "dgrad"])
def test_an_image_is_the_same_at_every_place_of_a_batch(pass_, layout, config):
    problem = layer(24, (5, 5), (7, 11), batch=5, layout=layout)
    given = cases.operands(cases.Case(problem))
    one = given.x if pass_ == "fprop" else given.dy
    one[1:] = one[:1]
    with softgpu.active("sm_90"):
        call = algorithm(problem).prepare(problem, pass_, config, devices.named("sm_90"), given.strides(problem))
        result = call(*given.of(pass_))
    assert torch.equal(result, result[:1].expand_as(result))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_nan_is_what_it_does(name):
    with softgpu.active("sm_90"):
        row = reliability.spread_row(name)
        assert reliability.spread_row(name, float("inf")) == row
    assert row in reliability.DOCUMENT.read_text().splitlines()


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize(
    ("row", "layout", "config"),
    [
        ("convnext_tiny.s0", "nhwc", tile()),
        ("convnext_tiny.s0", "nchw", of_rows(4, 16)),
        ("resnext50_32x4d.s1", "nhwc", of_groups(4, 2, 2)),
    ],
)
def test_compiles_without_spills(row, layout, config, target):
    """For GPUs that the software GPU does not know, too."""
    (problem,) = (layer.problem for layer in layers.suite("bf16", layout) if layer.name == row)
    module, on = algorithm(problem), devices.named(target)
    for pass_ in PLANNED if layout == "nchw" else PASSES:
        chosen = divided(module.NAME, problem, pass_, config, on)[0]
        found = resources.of(compiler.launched(compiler.Job(module.NAME, pass_, chosen, problem, target))[0].compiled)
        assert found.spill_bytes == 0
        assert found.shared_bytes == module.held(problem, pass_, chosen, on).shared_bytes


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"channels": 4}, "fewer than 8 channels"),
        ({"channels": 58}, "no multiple of 4"),
        ({"dtype": "fp32"}, "fp16 and bf16"),
        ({"layout": "nchw"}, "channels_last"),
        ({"groups": 12}, "depthwise"),
        ({"stride": (2, 2), "dilation": (2, 1)}, "a stride and a dilation"),
        ({"kernel": (31, 31), "hw": (56, 56)}, "meet more than 32"),
    ],
)
def test_what_it_does_not_serve(changes, why):
    shape = {name: changes[name] for name in ("channels", "kernel", "hw") if name in changes}
    others = {name: value for name, value in changes.items() if name not in shape}
    problem = dataclasses.replace(layer(**shape), **others)
    assert why in lack(NAME, problem, "fprop", devices.named("sm_90"))
    assert lack(NAME, layer(), "fprop", devices.named("sm_75")) is not None
    assert lack(NAME, layer(), "fprop", devices.named("gfx942")) is not None


@pytest.mark.parametrize(
    ("problem", "pass_", "why"),
    [
        (rows(5), "wgrad", None),
        (rows(5, c_out=10), "dgrad", "a channel multiplier"),
        (rows(5, stride=(1, 2)), "backward", "no strides"),
        (layer(), "fprop", "contiguous maps"),
        (rows(6, width=2), "fprop", "depthwise"),
        (rows(6, stride=(1, 3)), "dgrad", "column strides"),
        (rows(5, (1, 61), (56, 70)), "fprop", "meet more than 64"),
        (rows(5, (31, 31), (56, 56)), "fprop", "no tile fits"),
        (rows(5, (31, 31), (56, 56)), "wgrad", None),
    ],
)
def test_what_rows_do_not_serve(problem, pass_, why):
    found = lack(depthwise_mma_nchw.NAME, problem, pass_, devices.named("sm_90"))
    assert found == why or why in found


@pytest.mark.parametrize(
    ("name", "layout", "least"),
    [(NAME, "nhwc", 50), (depthwise_mma_nchw.NAME, "nchw", 80), (group_mma.NAME, "nhwc", 20)],
)
def test_plans_are_possible(name, layout, least):
    """Every layer of the suite that is served has tiles that fit, each with divisions that make programs."""
    on, served = devices.named("h200"), 0
    for row in layers.suite("bf16", layout):
        for pass_ in PLANNED:
            if lack(name, row.problem, pass_, on) is not None:
                continue
            served += 1
            for chosen in candidates(name, row.problem, pass_, on):
                assert possible(name, row.problem, pass_, chosen, on)
                for config in divided(name, row.problem, pass_, chosen, on):
                    assert tiling(name, row.problem, pass_, config, on).programs > 0
    assert served >= least
