"""Single PTX instructions against NumPy, what is counted of them, and what is refused."""

import numpy as np
import pytest
import torch

import softgpu
from softgpu import machine
from softgpu.machine import View

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
	.param .u64 a,
	.param .u64 b,
	.param .u64 c,
	.param .u64 d
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<20>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<20>;
	ld.param.b64 %rd1, [a];
	ld.param.b64 %rd2, [b];
	ld.param.b64 %rd3, [c];
	ld.param.b64 %rd4, [d];
	mov.u32 %r1, %tid.x;
"""


def run_ptx(body, *arrays, threads=64):
    loaded = machine.Loaded(HEAD.format(threads=threads) + body + "\n\tret;\n}\n", threads)
    addresses = [a.ctypes.data for a in arrays] + [0] * (4 - len(arrays))
    views = [View(a.ctypes.data, a.shape, a.strides, a.itemsize, i) for i, a in enumerate(arrays)]
    return softgpu.launch(loaded, "k", (1, 1, 1), addresses, views, shared_bytes=4096)


def results_of(instruction, *sources):
    """%r10 of 64 threads, after an instruction on their 32-bit sources %r2, %r3, %r4."""
    loads = "".join(
        f"\tmad.wide.s32 %rd{12 + i}, %r1, 4, %rd{1 + i};\n\tld.global.b32 %r{2 + i}, [%rd{12 + i}];\n"
        for i in range(len(sources))
    )
    result = np.zeros(64, np.uint32)
    unused = (np.zeros(1, np.uint32) for _ in range(3 - len(sources)))
    store = "\tmad.wide.s32 %rd15, %r1, 4, %rd4;\n\tst.global.b32 [%rd15], %r10;\n"
    run_ptx(f"{loads}\t{instruction}\n{store}", *sources, *unused, result)
    return result


rng = np.random.default_rng(0)
_SPECIAL = np.array([0, 1, 2**31, 2**32 - 1, 31, 32, 7, 2**31 - 1], np.uint32)
A, B, C = (np.roll(np.concatenate([_SPECIAL, rng.integers(0, 2**32, 56, np.uint32)]), shift) for shift in (0, 3, 0))
SHORT = rng.integers(0, 40, 64).astype(np.uint32)
_FLOATS = np.array([0, -0.0, 1, -1, np.inf, 1e-40, 3e38, 0.1], np.float32)
F, G, H = (np.roll(np.concatenate([_FLOATS, rng.standard_normal(56).astype(np.float32)]), shift) for shift in (0, 5, 0))
NORMAL = rng.standard_normal(64).astype(np.float32)


def u64(x):
    return x.astype(np.uint64)


def s64(x):
    return x.view(np.int32).astype(np.int64)


def low(x):
    return (np.asarray(x).astype(np.uint64) & 0xFFFFFFFF).astype(np.uint32)


@pytest.mark.parametrize(
    ("instruction", "sources", "expected"),
    [
        ("add.s32 %r10, %r2, %r3;", (A, B), low(u64(A) + u64(B))),
        ("sub.s32 %r10, %r2, 5;", (A,), low(s64(A) - 5)),
        ("mul.lo.s32 %r10, %r2, %r3;", (A, B), low(s64(A) * s64(B))),
        ("mul.hi.s32 %r10, %r2, %r3;", (A, B), low((s64(A) * s64(B)) >> 32)),
        ("mul.hi.u32 %r10, %r2, %r3;", (A, B), low((u64(A) * u64(B)) >> np.uint64(32))),
        ("mad.lo.s32 %r10, %r2, %r3, %r4;", (A, B, C), low(s64(A) * s64(B) + s64(C))),
        ("shl.b32 %r10, %r2, %r3;", (A, SHORT), low(np.where(SHORT >= 32, 0, u64(A) << u64(SHORT)))),
        ("shr.u32 %r10, %r2, %r3;", (A, SHORT), low(u64(A) >> u64(SHORT))),
        ("shr.s32 %r10, %r2, %r3;", (A, SHORT), low(s64(A) >> np.minimum(SHORT, 31).astype(np.int64))),
        ("bfe.u32 %r10, %r2, 5, 9;", (A,), (A >> np.uint32(5)) & np.uint32(511)),
        ("bfe.s32 %r10, %r2, 3, 1;", (A,), low(-((s64(A) >> 3) & 1))),
        ("lop3.b32 %r10, %r2, %r3, %r4, 0xE8;", (A, B, C), (A & B) | (A & C) | (B & C)),
        ("prmt.b32 %r10, %r2, %r3, 0x5410;", (A, B), (A & np.uint32(0xFFFF)) | (B << np.uint32(16))),
        ("shf.l.wrap.b32 %r10, %r2, %r3, 7;", (A, B), (B << np.uint32(7)) | (A >> np.uint32(25))),
        ("min.s32 %r10, %r2, %r3;", (A, B), np.minimum(A.view(np.int32), B.view(np.int32)).view(np.uint32)),
        ("max.u32 %r10, %r2, %r3;", (A, B), np.maximum(A, B)),
        (
            "min.relu.s32 %r10, %r2, %r3;", (A, B),
            np.maximum(np.minimum(A.view(np.int32), B.view(np.int32)), 0).view(np.uint32),
        ),
        (
            "max.relu.s32 %r10, %r2, %r3;", (A, B),
            np.maximum(np.maximum(A.view(np.int32), B.view(np.int32)), 0).view(np.uint32),
        ),
        ("rem.s32 %r10, %r2, 7;", (A,), low(np.fmod(s64(A), 7))),
        ("div.s32 %r10, %r2, 7;", (A,), low((np.abs(s64(A)) // 7) * np.sign(s64(A)))),
        ("xor.b32 %r10, %r2, %r3;", (A, B), A ^ B),
        ("{ .reg .pred q; setp.lt.s32 q, %r2, %r3; selp.b32 %r10, 1, 2, q; }", (A, B),
         np.where(A.view(np.int32) < B.view(np.int32), 1, 2).astype(np.uint32)),
        ("cvt.s32.s8 %r10, %r2;", (A,), A.view(np.int8).reshape(-1, 4)[:, 0].astype(np.int32).view(np.uint32)),
        ("{ cvt.u16.u32 %rs1, %r2; cvt.u32.u16 %r10, %rs1; }", (A,), A & np.uint32(0xFFFF)),
        ("add.s16x2 %r10, %r2, %r3;", (A, B), (A.view(np.uint16) + B.view(np.uint16)).view(np.uint32)),
        ("popc.b32 %r10, %r2;", (A,), np.array([int(v).bit_count() for v in A], np.uint32)),
        ("add.f32 %r10, %r2, %r3;", (F, G), (F + G).view(np.uint32)),
        ("mul.f32 %r10, %r2, %r3;", (F, G), (F * G).view(np.uint32)),
        ("cvt.rni.f32.f32 %r10, %r2;", (F,), np.rint(F).view(np.uint32)),
        ("cvt.rna.tf32.f32 %r10, %r2;", (NORMAL,), (NORMAL.view(np.uint32) + np.uint32(4096)) & np.uint32(0xFFFFE000)),
        ("{ mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r10, {%rs2, %rs1}; }", (A,),
         (A << np.uint32(16)) | (A >> np.uint32(16))),
        ("{ cvt.u16.u32 %rs1, %r2; cvt.f32.f16 %r10, %rs1; }", (A,),
         A.view(np.float16)[::2].astype(np.float32).view(np.uint32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_instruction(instruction, sources, expected):
    with np.errstate(all="ignore"):
        found = results_of(instruction, *sources)
    nan = np.isnan(expected.view(np.float32)) & (".f32" in instruction)
    np.testing.assert_array_equal(found[~nan], expected[~nan])


@pytest.mark.parametrize(("op", "type_"), [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_conversion_of_pairs(op, type_):
    for scale in (1, 1e-5, 1e5):  # to subnormal numbers and infinities of fp16, too
        with np.errstate(over="ignore"):
            f, g = F * np.float32(scale), G * np.float32(scale)
        found = results_of(f"cvt.rn.{op}.f32 %r10, %r2, %r3;", f, g).view(np.uint16).reshape(64, 2)
        for half, source in ((0, g), (1, f)):
            expected = torch.from_numpy(source).to(type_).view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(found[:, half], expected)


def test_fma_is_fused():
    found = results_of("fma.rn.f32 %r10, %r2, %r3, %r4;", F, G, H).view(np.float32)
    with np.errstate(all="ignore"):
        expected = (F.astype(np.longdouble) * G.astype(np.longdouble) + H.astype(np.longdouble)).astype(np.float32)
    good = ~np.isnan(expected)
    np.testing.assert_array_equal(found[good], expected[good])


@pytest.mark.parametrize(
    "instruction",
    [
        "addd.s32 %r10, %r2, %r2;",
        "add.cc.s32 %r10, %r2, %r2;",
        "mov.b32 %r10, %smid;",
        "ld.b32 %r10, [%rd1];",
        "bar.arrive 0, 32;",
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%r1}, {%r1}, {%r1}, {%r1};",
    ],
)
def test_what_is_unknown_is_refused_by_line(instruction):
    with pytest.raises(softgpu.Unsupported, match="PTX line 22"):
        run_ptx(instruction)


def test_divergence_and_loops():
    body = """
	mov.b32 %r5, 0;
	mov.b32 %r6, 0;
$loop:
	setp.ge.s32 %p1, %r6, %r1;
	@%p1 bra $done;
	add.s32 %r5, %r5, %r6;
	add.s32 %r6, %r6, 1;
	bra.uni $loop;
$done:
	mad.wide.s32 %rd5, %r1, 4, %rd1;
	st.global.b32 [%rd5], %r5;
"""
    out = np.zeros(64, np.uint32)
    run_ptx(body, out)
    np.testing.assert_array_equal(out, [i * (i - 1) // 2 for i in range(64)])


def test_parts_of_a_warp_meet_again_wherever_their_code_lies():
    """One side of the branch is behind the end, as compilers put what is seldom taken."""
    body = """
	mov.b32 %r5, 1;
	setp.lt.s32 %p1, %r1, 5;
	@%p1 bra $seldom;
$together:
	mov.b32 %r6, 0;
	bar.warp.sync -1;
	shfl.sync.idx.b32 %r6, %r5, 0, 31, -1;
	mad.wide.s32 %rd5, %r1, 4, %rd1;
	st.global.b32 [%rd5], %r6;
	ret;
$seldom:
	mov.b32 %r5, 2;
	bra.uni $together;
"""
    out = np.zeros(32, np.uint32)
    run_ptx(body, out, threads=32)
    np.testing.assert_array_equal(out, [2] * 32)


def test_movmatrix():
    """As the PTX ISA's figure of fragments has it: a thread has elements 2 i and 2 i + 1 of row thread / 4."""
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8) * 257
    out = matrix.view(np.uint32).ravel().copy()
    body = """
	mad.wide.s32 %rd5, %r1, 4, %rd1;
	ld.global.b32 %r5, [%rd5];
	movmatrix.sync.aligned.m8n8.trans.b16 %r6, %r5;
	st.global.b32 [%rd5], %r6;
"""
    run_ptx(body, out, threads=32)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), matrix.T)
    with pytest.raises(softgpu.Fault, match="movmatrix"):
        run_ptx("\tsetp.lt.s32 %p1, %r1, 5;\n\t@%p1 movmatrix.sync.aligned.m8n8.trans.b16 %r6, %r1;", threads=32)


def counted(result, op, counter):
    row = next(i for i, s in enumerate(result.loaded.program.statements) if s.op == op)
    return result.counters[row, machine.COUNTERS.index(counter)]


@pytest.mark.parametrize(("step", "waves"), [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_bank_conflicts(step, waves):
    body = f"""
	and.b32 %r5, %r1, 31;
	mul.lo.s32 %r5, %r5, {step};
	mov.b32 %r6, global_smem;
	add.s32 %r5, %r5, %r6;
	st.shared.b32 [%r5], 7;
"""
    assert counted(run_ptx(body, threads=32), "st.shared.b32", "wavefronts") == waves


@pytest.mark.parametrize(("step", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors(step, sectors):
    x = np.zeros(2048 + 8, np.uint32)
    x = x[(-x.ctypes.data // 4) % 8 :][:2048]
    result = run_ptx(f"\tmad.wide.s32 %rd5, %r1, {step}, %rd1;\n\tld.global.b32 %r5, [%rd5];", x, threads=32)
    assert counted(result, "ld.global.b32", "sectors") == sectors
    assert result.read_bytes == 32 * sectors


# --- Faults of shared memory and barriers ----------------------------------------------------------------------------


def test_reads_of_what_nobody_wrote():
    body = "\tmov.b32 %r5, global_smem;\n\tst.shared.b32 [%r5], 1;\n\tld.shared.b32 %r6, [%r5+8];"
    with pytest.raises(softgpu.Fault, match="never written"):
        run_ptx(body, threads=32)


def test_races_between_lanes():
    share = """
	shl.b32 %r5, %r1, 2;
	xor.b32 %r6, %r5, 4;
	mov.b32 %r7, global_smem;
	add.s32 %r5, %r5, %r7;
	add.s32 %r6, %r6, %r7;
	st.shared.b32 [%r5], %r1;
	{}
	ld.shared.b32 %r8, [%r6];
"""
    run_ptx(share.format("bar.warp.sync -1;"))
    with pytest.raises(softgpu.Fault, match="race"):
        run_ptx(share.format(""))


def test_barriers_that_some_do_not_reach():
    body = "\tsetp.lt.s32 %p1, %r1, 32;\n\t@%p1 bra $skip;\n\tbar.sync 0;\n$skip:"
    with pytest.raises(softgpu.Fault, match="not reached by all"):
        run_ptx(body)
