"""Every check of the software GPU against a fault that is planted, or that Triton makes."""

import re

import pytest
import torch

import softgpu
from softgpu import kernels, machine_code
from softgpu.kernels import UNFENCED, nan

HALF = "{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 q, t, 32; @q bar.sync 0; }"


def without(pattern, count=0):
    return replaced(pattern, "", count)


def with_base_offset(name, text):
    """Descriptors of swizzled tiles say that the swizzle begins elsewhere."""
    text, found = re.subn(r"\b\d{19}\b", lambda number: str(int(number[0]) | 1 << 49), text)
    assert found
    return text


def replaced(pattern, by, count=0):
    def edit(name, text):
        text, found = re.subn(pattern, by, text, count=count)
        assert found, "the PTX has no such thing"
        return text

    return edit


@pytest.mark.parametrize(
    ("target", "edit", "kind"),
    [
        ("sm_80", without(r"cp\.async\.wait_group[^;]*;"), "in flight|never written"),
        ("sm_80", without(r"bar\.sync[^;]*;"), "race|overwrite"),
        ("sm_90", without(r"cp\.async\.wait_group[^;]*;"), "in flight|never written"),
        ("sm_90", without(r"bar\.sync[^;]*;"), "race|overwrite"),
        ("sm_90", without(r"wgmma\.wait_group[^;]*;"), "overwrite in flight|register in flight"),
        ("sm_90", None if UNFENCED else without(r"fence\.proxy\.async[^;]*;"), "proxy fence"),
        ("sm_90", with_base_offset, "wgmma"),
        ("sm_80", replaced(r"(cp\.async\.c[ag]\.shared\.global \[ %r\d+ \+ )0", r"\g<1>4"), "misaligned"),
        ("sm_80", replaced(r"(cp\.async\.c[ag]\.shared\.global \[ %r\d+ \+ )0", r"\g<1>65536"), "shared access out"),
        ("sm_80", replaced(r"(st\.global\S* \[ %rd\d+ \+ )0", r"\g<1>16777216"), "global access out of range"),
        ("sm_80", replaced(r"bar\.sync\s+0;", HALF, 1), "barrier|divergence|race|in flight"),
    ],
)
def test_faults_are_found(target, edit, kind):
    soft = () if kind == "proxy fence" else UNFENCED
    with softgpu.active(target, edit=edit, soft=soft), pytest.raises(softgpu.Fault) as caught:
        kernels.matmul(torch.float16, 64, 64, 160)
    assert re.search(kind, caught.value.kind), str(caught.value)
    assert caught.value.line > 0
    assert re.search(r"kernels\.py:\d+", caught.value.source)
    assert "matmul_kernel" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (
            without(r"waitLoop:(\s*\.loc[^\n]*)?\s*mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;"),
            "in flight",
        ),
        (replaced(r"(expect_tx[^;]*), (\d+);", r"\1, 64;"), "mbarrier"),
        (without(r"@%p\d+ cp\.async\.bulk\.tensor\.2d\.shared::c[^;]*;", 1), "mbarrier|never written"),
        (without(r"cp\.async\.bulk\.wait_group[^;]*;"), "overwrite in flight"),
        (without(r"bar\.sync[^;]*;"), "race|mbarrier|overwrite|proxy|in flight"),
    ],
)
def test_faults_of_descriptors(edit, kind):
    with softgpu.active("sm_90", edit=edit), pytest.raises(softgpu.Fault) as caught:
        kernels.descriptor_matmul(torch.float16, 128, 64, 128, 64, 64, 64, programs=1)
    assert caught.value.kind not in softgpu.TOLERATED
    assert re.search(kind, caught.value.kind), str(caught.value)


# --- Global memory ---------------------------------------------------------------------------------------------------


def test_store_past_the_end():
    x, memory = torch.randn(1024), nan(1024)
    with softgpu.active("sm_90"), pytest.raises(softgpu.Fault, match=r"out of range.*store"):
        kernels.copy_kernel[(4,)](x, memory[:1020], B=256)


def test_load_past_the_end():
    memory, z = torch.randn(1024), nan(1024)
    with softgpu.active("sm_90"), pytest.raises(softgpu.Fault, match=r"out of range.*load"):
        kernels.copy_kernel[(4,)](memory[:1016], z, B=256)


def rows(x, z, count=3):
    kernels.rows_kernel[(count,)](x, z, x.stride(0), z.stride(0), count, B=128, WIDE=False)


def test_views_with_gaps():
    """A view's rows may be read and written, and what lies between and around them may not."""
    memory = torch.randn(5, 256)
    x, out = memory[1:4, 64:192], nan(5, 256)
    z = out[1:4, 64:192]
    with softgpu.active("sm_90"):
        rows(x, z)
    assert torch.equal(z, x)
    assert out.isnan().sum() == out.numel() - z.numel()
    for given in ((memory[1:4, 64:191], z), (x, out[1:4, 64:191])):
        with softgpu.active("sm_90"), pytest.raises(softgpu.Fault) as caught:
            rows(*given)
        assert caught.value.kind == "gap between elements"
    with softgpu.active("sm_90"), pytest.raises(softgpu.Fault, match="global access out of range"):
        rows(x[:2], out[1:4, 64:192], count=3)


def test_a_gap_that_another_view_fills():
    memory, z = torch.randn(4, 256), nan(4, 256)
    left, right = memory[:, :128], memory[:, 128:]
    with softgpu.active("sm_90"):
        kernels.add_kernel[(1,)](left, right, z, 896, B=1024)  # which takes them for dense
    assert not z.flatten()[:896].isnan().any()


def test_programs_that_write_the_same():
    x, z = torch.randn(256), nan(256)
    with softgpu.active("sm_90"):
        kernels.same_kernel[(1,)](x, z, B=256)
    with softgpu.active("sm_90"), pytest.raises(softgpu.Fault, match="CTAs 0 and 1 write"):
        kernels.same_kernel[(2,)](x, z, B=256)


def test_programs_that_read_what_others_write():
    x = torch.randn(512)
    with softgpu.active("sm_90"), pytest.raises(softgpu.Fault, match="global race"):
        kernels.same_kernel[(2,)](x, x, B=256)


# --- Registers in flight ---------------------------------------------------------------------------------------------

SERIALISED = """
        /*0100*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0110*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0120*/                   MOV R5, R24 ;
        /*0130*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""


@pytest.mark.parametrize(
    ("pattern", "by", "serialised"),
    [
        ("", "", True),
        (r"DEPBAR.LE gsb0, 0x0", "ARRIVE", False),
        (r"gsb0, 0x0", "gsb0, 0x1", False),
        (r"MOV R5, R24", "@P0 BRA `(.L_x_0)", True),
        (r"0110\*/ +WARPGROUP.DEPBAR.LE gsb0, 0x0", "0110*/  @P0 BRA `(.L_x_0)", False),
    ],
)
def test_serialised_products_are_told_by_their_waits(pattern, by, serialised):
    code = re.sub(pattern, by, SERIALISED, count=1) if pattern else SERIALISED
    found = machine_code.of_text(code)
    assert found.products == 2
    assert found.serialised is serialised


FENCED = """
        /*0100*/                   IMAD.MOV.U32 R27, RZ, RZ, R25 ;
        /*0110*/                   WARPGROUP.ARRIVE ;
        /*0120*/                   MOV R4, R40 ;
        /*0130*/                   HGMMA.64x16x8.F32.TF32 R24, gdesc[UR4], R24 ;
        /*0140*/                   HGMMA.64x16x8.F32.TF32 R24, R8, gdesc[UR4], R24, gsb0 ;
"""


@pytest.mark.parametrize(
    ("pattern", "by", "fenced"),
    [
        ("", "", True),
        ("WARPGROUP.ARRIVE", "NOP", False),
        ("MOV R4,", "MOV R31,", False),
        ("MOV R4,", "MOV R32,", True),
        ("MOV R4,", "LDS.128 R22,", False),
        ("MOV R4,", "MOV R8,", False),
        (r" +/\*0120", ".L_x_0:\n        /*0120", False),
    ],
)
def test_products_are_fenced_where_nothing_writes_their_registers_after_the_arrival(pattern, by, fenced):
    code = re.sub(pattern, by, FENCED, count=1) if pattern else FENCED
    assert machine_code.of_text(code).fenced is fenced


def test_registers_in_flight_are_tolerated_only_where_products_are_serialised():
    fine, pipelined = machine_code.WarpGroupCode(2, 2, 2), machine_code.WarpGroupCode(2, 1, 1)

    def judged(code, kind="register in flight", **options):
        result = type("Result", (), {"findings": [softgpu.Fault(kind, kind)]})()
        softgpu.Session(**options).judge(result, code)
        return [fault.kind for fault in result.faults]

    assert judged(fine) == []
    fenced = machine_code.WarpGroupCode(2, 1, 1, fenced=True)
    assert judged(fenced, "wgmma") == []
    assert judged(fenced, soft=softgpu.SOFT) == ["register in flight"]
    assert judged(pipelined, soft=softgpu.SOFT) == judged(None, soft=softgpu.SOFT) == ["register in flight"]
    for code, kind in ((pipelined, "register in flight"), (None, "wgmma"), (fine, "shared race")):
        with pytest.raises(softgpu.Fault, match=kind):
            judged(code, kind)
