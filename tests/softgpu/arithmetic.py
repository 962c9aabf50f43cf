"""The C of PTX's plain arithmetic: a function for each form, which is an opcode with the widths of its registers.

A form's C is a statement that sets `d` from the operands `a`, `b`, `c`, `e`: unsigned integers of their registers'
widths (alu.h). What is not known here is None, and an error of the kernel that needs it.
"""

from __future__ import annotations

import dataclasses
import re

Form = tuple[str, tuple[int, ...]]  # opcode; bytes of the result's register and of the sources'

_UNSIGNED = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
_FROM_BITS = {"f32": "u2f({})", "f16": "h2f({})", "bf16": "b2f({})"}
_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_ROUNDED = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
_MODIFIERS = {
    "lo", "hi", "wide", "rn", "ftz", "approx", "full", "NaN", "wrap", "clamp", "l", "r", "and", "or", "xor", "rz",
    "rna", *_ROUNDED, "sat", "relu", "pred", *_COMPARE, "num", "nan", "equ", "neu", "ltu", "leu", "gtu", "geu",
    *_FROM_BITS,
    "f16x2", "bf16x2", "s16x2", "u16x2", "tf32", *(f"{k}{n}" for k in "bus" for n in (8, 16, 32, 64)),
}  # fmt: skip


def source(forms: list[Form]) -> str:
    """A C file with a function for each form: form0, form1, ..."""
    lines = ['#include "alu.h"']
    for i, (op, widths) in enumerate(forms):
        types = ", ".join(_UNSIGNED[width] for width in widths)
        call = f"ALU{len(widths) - 1}({types}, {statement(op, widths)})"
        lines.append(f"void form{i}(u8 *R, const i64 *A, const u32 *M, int NW) {{{call}}}")
    return "\n".join(lines) + "\n"


def statement(op: str, widths: tuple[int, ...]) -> str | None:
    """The C of a form; None if it is no arithmetic that is known."""
    dst, count = widths[0], len(widths) - 1
    if found := re.fullmatch(r"_pack(\d)", op):  # of mov.b32 %r, {%rs, %rs}
        n, each = int(found[1]), dst // int(found[1])
        return "d = " + " | ".join(f"(({_UNSIGNED[dst]}){name} << {8 * each * i})" for i, name in enumerate("abce"[:n]))
    parts = op.split(".")
    if set(parts[1:]) - _MODIFIERS:
        return None
    form = _Op(parts[0], tuple(parts[1:-1]), parts[-1], dst, count)
    if "relu" in form.mods and (form.kind != "s32" or form.name not in ("min", "max")):
        return None
    if ("sat" in form.mods and form.kind != "f32") or ("rz" in form.mods and form.name != "cvt"):
        return None
    for made in (_moved, _compared, _converted, _integer, _predicate, _pair_of_integers, _pair_of_floats, _floating):
        if (found := made(form)) is not None:
            return found
    return None


@dataclasses.dataclass(frozen=True)
class _Op:
    """An opcode in parts: mad.lo.s32 is "mad", ("lo",), "s32"."""

    name: str
    mods: tuple[str, ...]
    kind: str
    dst: int
    count: int  # of sources

    @property
    def bits(self) -> int:
        return int(re.sub(r"\D", "", self.kind))

    @property
    def plain(self) -> bool:
        return not self.mods


def _is_integer(kind: str) -> bool:
    return re.fullmatch(r"[bus](8|16|32|64)", kind) is not None


def _c_type(kind: str) -> str:
    return {"b": "u", "u": "u", "s": "i"}[kind[0]] + kind[1:]


def _moved(op: _Op) -> str | None:
    if op.name == "mov" and op.count == 1:
        return f"d = ({_UNSIGNED[op.dst]})a"
    if op.name == "selp":
        return f"d = ({_UNSIGNED[op.dst]})(c ? a : b)"
    return None


def _compared(op: _Op) -> str | None:
    if op.name != "setp":
        return None
    compare, *logic = op.mods[:2]
    if _is_integer(op.kind):
        if compare not in _COMPARE:
            return None
        t = _c_type(op.kind)
        value = f"((({t})a) {_COMPARE[compare]} (({t})b))"
    elif op.kind in _FROM_BITS:
        x, y = _value(op, "a"), _value(op, "b")
        unordered = f"({x} != {x} || {y} != {y})"
        if compare in ("num", "nan"):
            value = f"({'!' if compare == 'num' else ''}{unordered})"
        elif compare in ("eq", "lt", "le", "gt", "ge"):
            value = f"({x} {_COMPARE[compare]} {y})"
        elif compare == "ne":
            value = f"(!{unordered} && {x} != {y})"
        elif compare in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
            value = f"({unordered} || {x} {_COMPARE[compare[:2]]} {y})"
        else:
            return None
    else:
        return None
    if logic and logic[0] in _LOGIC:
        return f"d = ({value} {_LOGIC[logic[0]]} c) & 1"
    return f"d = {value}"


def _converted(op: _Op) -> str | None:
    if op.name != "cvt":
        return None
    *mods, to, of = (*op.mods, op.kind)
    unsigned = _UNSIGNED[op.dst]
    if op.count == 2:
        if of != "f32" or to not in ("bf16x2", "f16x2"):
            return None
        f = {"bf16x2": "f2b", "f16x2": "f2h"}[to] + ("_rz" if "rz" in mods else "")
        return f"d = (u32){f}(u2f(a)) << 16 | (u32){f}(u2f(b))"
    if _is_integer(of):
        value = f"(({_c_type(of)})a)"
        if _is_integer(to):
            return None if "sat" in mods else f"d = ({unsigned})({_c_type(to)})({value})"
        if to not in _FROM_BITS or set(mods) - {"rn"}:
            return None
        return {"f32": f"d = f2u((f32){value})", "f16": f"d = d2h((f64){value})", "bf16": f"d = d2b((f64){value})"}[to]
    if of not in _FROM_BITS:
        return None
    value = _FROM_BITS[of].format("a")
    whole = next((m for m in mods if m in _ROUNDED), None)
    if whole:
        value = f"{_ROUNDED[whole]}((f64){value})"
    if _is_integer(to):
        if whole is None:
            return None
        bits, signed = int(to[1:]), to[0] == "s"
        least, most = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
        return f"d = ({unsigned})({_c_type(to)})satcvt({value}, {least!r}, {most!r}, {int(signed)})"
    if to == "tf32" and of == "f32":
        return "d = tf32_rna(u2f(a))" if "rna" in mods else "d = tf32_rn(u2f(a))" if "rn" in mods else None
    if to == "f32":
        return None if "rz" in mods or "sat" in mods else f"d = f2u((f32){value})"
    if to in ("f16", "bf16") and "sat" not in mods:
        return f"d = {'f2h' if to == 'f16' else 'f2b'}{'_rz' if 'rz' in mods else ''}((f32){value})"
    return None


def _integer(op: _Op) -> str | None:
    if not _is_integer(op.kind):
        return None
    t, bits, mods, dst = _c_type(op.kind), op.bits, set(op.mods), _UNSIGNED[op.dst]
    u, signed = f"u{bits}", t[0] == "i"
    wide = f"{t[0]}{2 * bits}" if bits < 64 else ("i128" if signed else "u128")
    a, b = (f"(({t}){v})" for v in "ab")
    product = f"(({wide}){a} * ({wide}){b})"
    if op.name in ("mul", "mad"):
        plus = "" if op.name == "mul" else f" + ({u})c"
        if mods == {"lo"}:
            return f"d = ({u})((u64)({u})a * (u64)({u})b{plus})"
        if mods == {"hi"}:
            return f"d = ({u})(({u})({product} >> {bits}){plus})"
        if mods == {"wide"}:
            return f"d = ({dst})((u64){product}{' + (u64)c' if plus else ''})"
        return None
    if op.name in ("div", "rem") and op.plain:
        sign = "/" if op.name == "div" else "%"
        if signed:  # the least number over -1 is itself
            least = f"({t})(0 - (u64){a})" if op.name == "div" else "0"
            return f"d = ({u})({b} == 0 ? ({t})-1 : {b} == -1 ? {least} : ({t})({a} {sign} {b}))"
        return f"d = ({u})({b} == 0 ? ({t})-1 : ({t})({a} {sign} {b}))"
    if op.name == "shf" and bits == 32:
        amount = "(c & 31)" if "wrap" in mods else "(c > 32 ? 32 : c)"
        pair = "((u64)b << 32 | a)"
        return f"d = (u32)(({pair} << {amount}) >> 32)" if "l" in mods else f"d = (u32)({pair} >> {amount})"
    if mods == {"relu"}:
        chosen = f"({a} {'<' if op.name == 'min' else '>'} {b} ? {a} : {b})"
        return f"d = {chosen} < 0 ? 0 : {chosen}"
    if not op.plain:
        return None
    past = f"(u32)b >= {bits}"
    extract = f"bfe{'s' if signed else 'u'}{'64' if bits == 64 else ''}"
    return {
        "add": f"d = ({u})(({u})a + ({u})b)",
        "sub": f"d = ({u})(({u})a - ({u})b)",
        "neg": f"d = ({u})(0 - ({u})a)",
        "abs": f"d = ({u})({a} < 0 ? 0 - ({u})a : ({u})a)",
        "min": f"d = ({u})({a} < {b} ? {a} : {b})",
        "max": f"d = ({u})({a} > {b} ? {a} : {b})",
        "and": f"d = ({u})(a & b)",
        "or": f"d = ({u})(a | b)",
        "xor": f"d = ({u})(a ^ b)",
        "not": f"d = ({u})~a",
        "shl": f"d = {past} ? 0 : ({u})(({u})a << (u32)b)",
        "shr": f"d = ({u})({a} >> ({past} ? {bits - 1} : (u32)b))" if signed else f"d = {past} ? 0 : ({u})({a} >> b)",
        "bfe": f"d = {extract}(a, b, c)" if bits >= 32 else None,
        "bfi": "d = bfi32(a, b, c, e)" if bits == 32 else None,
        "popc": f"d = __builtin_popcountll(({u})a)",
        "clz": f"d = ({u})a ? __builtin_clzll(({u})a) - {64 - bits} : {bits}",
        "brev": "d = brev32(a)" if bits == 32 else None,
        "prmt": "d = prmt(a, b, c)" if bits == 32 else None,
        "lop3": "d = lop3(a, b, c, e)",
        "slct": "d = (i32)c >= 0 ? a : b" if op.kind == "s32" else None,
    }.get(op.name)


def _predicate(op: _Op) -> str | None:
    if op.kind != "pred":
        return None
    return "d = !a" if op.name == "not" else f"d = (a {_LOGIC[op.name]} b) & 1" if op.name in _LOGIC else None


def _pair_of_integers(op: _Op) -> str | None:
    if op.kind not in ("s16x2", "u16x2") or op.name not in ("add", "min", "max") or not op.plain:
        return None
    t = "i16" if op.kind[0] == "s" else "u16"

    def half(shift):
        x, y = (f"(({t})({v} >> {shift}))" for v in "ab")
        value = f"{x} + {y}" if op.name == "add" else f"({x} {'<' if op.name == 'min' else '>'} {y} ? {x} : {y})"
        return f"(u32)(u16)({value})"

    return f"d = {half(0)} | {half(16)} << 16"


def _pair_of_floats(op: _Op) -> str | None:
    if op.kind not in ("f16x2", "bf16x2"):
        return None
    into, back = ("h2f", "d2h") if op.kind == "f16x2" else ("b2f", "d2b")

    def half(shift):
        a, b, c = (f"(f64){into}((u16)({name} >> {shift}))" for name in "abc")
        value = {
            "add": f"{a} + {b}", "sub": f"{a} - {b}", "mul": f"{a} * {b}", "fma": f"{a} * {b} + {c}", "neg": f"-{a}",
            "abs": f"fabs({a})", "min": f"(f64){_least_or_most(op)}((f32){a}, (f32){b})",
            "max": f"(f64){_least_or_most(op)}((f32){a}, (f32){b})",
        }.get(op.name)  # fmt: skip
        return None if value is None else f"(u32){back}({value})"

    return None if half(0) is None else f"d = {half(0)} | {half(16)} << 16"


def _least_or_most(op: _Op) -> str:
    return f"f{op.name}{'n' if 'NaN' in op.mods else 'x'}"


def _value(op: _Op, name: str) -> str:
    value = _FROM_BITS[op.kind].format(name)
    return f"ftz({value})" if "ftz" in op.mods and op.kind == "f32" else value


def _floating(op: _Op) -> str | None:
    if op.kind not in _FROM_BITS:
        return None
    if op.name == "neg":
        return "d = a ^ 0x80000000u" if op.kind == "f32" else "d = a ^ 0x8000"
    if op.name == "abs":
        return "d = a & 0x7fffffffu" if op.kind == "f32" else "d = a & 0x7fff"
    x, y, z = (_value(op, name) for name in "abc")
    if op.kind != "f32":
        x, y, z = f"(f64){x}", f"(f64){y}", f"(f64){z}"
    value = {
        "add": f"{x} + {y}", "sub": f"{x} - {y}", "mul": f"{x} * {y}", "fma": f"{x} * {y} + {z}",
        "min": f"{_least_or_most(op)}((f32){x}, (f32){y})", "max": f"{_least_or_most(op)}((f32){x}, (f32){y})",
    }.get(op.name)  # fmt: skip
    if op.kind != "f32":
        return None if value is None else f"d = d2{'h' if op.kind == 'f16' else 'b'}({value})"
    if op.name == "fma":
        value = f"fmaf({x}, {y}, {z})"
    if op.name in ("add", "sub", "mul", "fma"):
        value = f"canon({value})"
    value = value or {
        "div": f"{x} / {y}", "rcp": f"1.0f / {x}", "sqrt": f"sqrtf({x})", "rsqrt": f"(f32)(1.0 / sqrt((f64){x}))",
        "ex2": f"(f32)exp2((f64){x})", "lg2": f"(f32)log2((f64){x})",
    }.get(op.name)  # fmt: skip
    if value is None:
        return None
    value = f"(f32)({value})"
    if "sat" in op.mods:
        value = f"fminx(fmaxx({value}, 0.0f), 1.0f)"
    return f"d = f2u({f'ftz({value})' if 'ftz' in op.mods else value})"
