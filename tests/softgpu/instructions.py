"""How each PTX instruction is lowered: what is no plain arithmetic, by the first word of its opcode."""

from __future__ import annotations

import re

from .lowering import Lowering, immediate, vector
from .parser import WIDTH, Statement, Unsupported, split_operands

# What changes neither numbers nor what the checks know.
_IGNORED = re.compile(
    r"fence\.(?!proxy\.async)|membar|prefetch|applypriority|discard|createpolicy|griddepcontrol|setmaxnreg|nanosleep"
)
_MEMORY_MODIFIER = re.compile(
    r"(global|shared(::cta)?|param|v[248]|ca|cg|cs|lu|cv|wb|wt|nc|relaxed|acquire|release|volatile|weak|gpu|cta|sys"
    r"|L1::\w+|L2::\w+|[busf](8|16|32|64)|bf16)$"
)


def lower_statement(low: Lowering, s: Statement) -> None:
    """Add a statement's row to the program."""
    if _IGNORED.match(s.op):
        low.emit(s, "NOP")
        return
    head, *mods = s.op.split(".")
    _BY_HEAD.get(head, _arithmetic)(low, s, head, mods)


def _number(text: str) -> int:
    value = immediate(text)
    if value is None:
        raise Unsupported(f"{text} is no number")
    return value


def _arithmetic(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    count = len(s.operands) - 1
    width = WIDTH.get(mods[-1] if mods else "", 4)
    widths = [width] * count
    if head in ("shl", "shr"):
        widths[1] = 4
    elif head in ("bfe", "bfi"):
        widths[-1] = widths[-2] = 4
    elif head == "mad" and "wide" in mods:
        widths[2] = 2 * width
    elif head == "selp" or (head == "setp" and count == 3):
        widths[2] = 1
    elif head == "lop3":
        widths = [4] * count
    if s.operands[0].startswith("{") or "|" in s.operands[0]:
        raise Unsupported("several results")
    sources = [low.source(text, s.scope, width) for text, width in zip(s.operands[1:], widths, strict=True)]
    low.arithmetic(s, s.op, low.register(s.operands[0], s.scope), sources)


def _move(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    width = WIDTH[mods[-1]]
    to, of = s.operands
    if to.startswith("{"):
        names = vector(to)
        offset, width = low.source(of, s.scope, width)
        for i, name in enumerate(names):
            if name != "_":
                shift = low.constant(8 * width // len(names) * i, 4)
                low.arithmetic(s, f"shr.u{8 * width}", low.register(name, s.scope), [(offset, width), (shift, 4)])
        return
    result = low.register(to, s.scope)
    if of.startswith("{"):
        names = vector(of)
        sources = [low.source(name, s.scope, width // len(names)) for name in names]
        low.arithmetic(s, f"_pack{len(names)}", result, sources)
    elif of in low.params:
        low.emit(s, "PARAMADDR", [result[0], low.params[of]], [result[0]], values=(result[1],))
    else:
        op = f"mov.b{8 * result[1]}" if result[1] > 1 else "mov.pred"
        low.arithmetic(s, op, result, [low.source(of, s.scope, result[1])])


def _to_address_space(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    if not {"param", "global"} & set(mods):
        raise Unsupported("generic addresses")
    low.arithmetic(s, "mov.b64", low.register(s.operands[0], s.scope), [low.source(s.operands[1], s.scope, 8)])


def _branch(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    low.branches.append((len(low.rows), s.operands[0], s.scope))
    low.emit(s, "BRA")


def _return(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    low.emit(s, "RET")


def _fence(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    low.emit(s, "FENCEPROXY")  # the others are ignored


def _barrier(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    if s.op == "bar.warp.sync":
        mask = low.source(s.operands[0], s.scope)[0]
        low.emit(s, "WARPSYNC", [mask], (), [mask])
        return
    if [m for m in mods if m not in ("cta", "aligned")] != ["sync"]:
        raise Unsupported(s.op)
    number, count = _number(s.operands[0]), _number(s.operands[1]) if len(s.operands) > 1 else 0
    low.emit(s, "BAR", values=(number, count, 0, int(head == "bar" or "aligned" in mods)))


def _memory(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    for modifier in mods:
        if not _MEMORY_MODIFIER.match(modifier):
            raise Unsupported(f"modifier {modifier}")
    space = next((m.split("::")[0] for m in mods if m.startswith(("global", "shared", "param"))), None)
    if space is None:
        raise Unsupported("generic addresses")
    store, kind = head == "st", mods[-1]
    size, count = WIDTH[kind], next((int(m[1:]) for m in mods if re.fullmatch(r"v[248]", m)), 1)
    operands = s.operands[: 2 if any(m.startswith("L2::cache_hint") for m in mods) else None]
    where, data = operands if store else reversed(operands)
    names = vector(data)
    assert len(names) == count
    if store:
        registers = [low.source(name, s.scope, size) for name in names]
    else:
        registers = [low.register(name, s.scope) for name in names]
    offsets = [offset for offset, _ in registers]
    (width,) = {width for _, width in registers}
    signed = int(kind[0] == "s")
    if space == "param":
        name, _, added = where.strip("[] ").partition("+")
        offset = low.params[name.strip()] + (_number(added) if added else 0)
        low.emit(s, "LDPARAM", [offset, *offsets], offsets, values=(size, count, width, signed))
        return
    shared = space == "shared"
    address = low.address(where, s.scope, 4 if shared else 8)
    (low.shared_widths if shared else low.global_widths).append(size)
    around_l1 = int(any(m in ("cg", "cv", "relaxed", "acquire", "volatile", "L1::no_allocate") for m in mods))
    low.emit(
        s, f"{'ST' if store else 'LD'}{'S' if shared else 'G'}", [*address, *offsets],
        () if store else offsets, [address[0], *(offsets if store else ())], (size, count, width, signed, around_l1),
    )  # fmt: skip


def _copy_async(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    what = ".".join(mods[1:])
    if what == "commit_group":
        low.emit(s, "CPCOMMIT")
    elif what == "wait_group":
        low.emit(s, "CPWAIT", values=(_number(s.operands[0]),))
    elif what == "wait_all":
        low.emit(s, "CPWAITALL")
    elif what == "bulk.commit_group":
        low.emit(s, "BULKCOMMIT")
    elif what in ("bulk.wait_group", "bulk.wait_group.read"):
        low.emit(s, "BULKWAIT", values=(_number(s.operands[0]), int(what.endswith(".read"))))
    elif what.startswith("bulk.tensor."):
        _tensor_copy(low, s)
    elif mods[1] in ("ca", "cg"):
        size = _number(s.operands[2])
        to, of = low.address(s.operands[0], s.scope, 4), low.address(s.operands[1], s.scope, 8)
        rest = s.operands[3 : -1 if "L2::cache_hint" in what else None]
        limit, limited = -1, 0
        if rest:
            limit, width = low.source(rest[0], s.scope)
            limited = 2 if width == 1 else 1  # a predicate that says to ignore the source, or its bytes
        low.shared_widths.append(size)
        low.global_widths.append(2)
        reads = [to[0], of[0]] + ([limit] if limited else [])
        low.emit(s, "CPASYNC", [*to, *of, limit], (), reads, (size, int(mods[1] == "cg"), limited))
    else:
        raise Unsupported(s.op)


def _tensor_copy(low: Lowering, s: Statement) -> None:
    rank = int(re.search(r"\.(\d)d\.", s.op)[1])
    if re.search(r"\.im2col|\.reduce|multicast|\.gather|\.scatter", s.op):
        raise Unsupported(s.op)

    def map_and_coordinates(text):
        found = re.fullmatch(r"\[\s*([%\w]+)\s*,\s*\{(.*)\}\s*\]", text.strip())
        coordinates = [low.source(c, s.scope)[0] for c in split_operands(found[2])]
        assert len(coordinates) == rank
        return [low.register(found[1], s.scope)[0], *coordinates]

    if ".global.shared" in s.op:
        tensor, memory = map_and_coordinates(s.operands[0]), low.address(s.operands[1], s.scope, 4)
        low.emit(s, "TMASTORE", [*memory, *tensor], (), [memory[0], *tensor], (rank,))
        return
    if "complete_tx::bytes" not in s.op:
        raise Unsupported(s.op)
    memory, tensor = low.address(s.operands[0], s.scope, 4), map_and_coordinates(s.operands[1])
    barrier = low.address(s.operands[2], s.scope, 4)
    operands = [*memory, tensor[0], *barrier, *tensor[1:]]
    low.emit(s, "TMALOAD", operands, (), [memory[0], barrier[0], *tensor], (rank,))


def _matrix_of_warp(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    """ldmatrix and stmatrix."""
    count = next(int(m[1:]) for m in mods if re.fullmatch(r"x[124]", m))
    if set(mods) - {"sync", "aligned", f"x{count}", "trans", "shared", "shared::cta"} != {"m8n8", "b16"}:
        raise Unsupported(s.op)
    store = head == "stmatrix"
    where, data = s.operands if store else reversed(s.operands)
    address = low.address(where, s.scope, 4)
    registers = [low.register(name, s.scope)[0] for name in vector(data)]
    assert len(registers) == count
    low.emit(
        s, head.upper(), [*address, *registers], () if store else registers,
        [address[0], *(registers if store else ())], (count, int("trans" in mods)),
    )  # fmt: skip


_FACTORS = {"f16": 0, "bf16": 1, "tf32": 2}  # types of factors, as core.c numbers them


def _mma(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    shape = next(m for m in mods if re.fullmatch(r"m\d+n\d+k\d+", m))
    m, n, k = map(int, re.findall(r"\d+", shape))
    result, of_a, of_b, added = mods[-4:]
    if mods[:-4] != ["sync", "aligned", shape, "row", "col"] or (m, n) != (16, 8):
        raise Unsupported(s.op)
    if of_a != of_b or of_a not in _FACTORS or result != added or result not in ("f32", "f16"):
        raise Unsupported(s.op)
    if k not in ((4, 8) if of_a == "tf32" else (8, 16)):
        raise Unsupported(s.op)
    d, a, b, c = (low.sources(text, s.scope) for text in s.operands)
    low.emit(s, "MMA", [*d, *a, *b, *c], d, [*a, *b, *c], (_FACTORS[of_a], k, int(result == "f16")))


def _wgmma(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    if mods[0] == "fence":
        low.emit(s, "WGFENCE")
        return
    if mods[0] == "commit_group":
        low.emit(s, "WGCOMMIT")
        return
    if mods[0] == "wait_group":
        low.emit(s, "WGWAIT", values=(_number(s.operands[0]),))
        return
    shape = next(m for m in mods if re.fullmatch(r"m64n\d+k\d+", m))
    _, n, k = map(int, re.findall(r"\d+", shape))
    result, of_a, of_b = mods[-3:]
    if mods[:-3] != ["mma_async", "sync", "aligned", shape] or of_a != of_b or of_a not in _FACTORS:
        raise Unsupported(s.op)
    if result not in ("f32", "f16") or k != (8 if of_a == "tf32" else 16):
        raise Unsupported(s.op)
    sums = low.sources(s.operands[0], s.scope)
    assert len(sums) == (n // 2 if result == "f32" else n // 4)
    from_registers = s.operands[1].startswith("{")
    a = low.sources(s.operands[1], s.scope)
    assert len(a) == (4 if from_registers else 1)
    b, use_sums = low.register(s.operands[2], s.scope)[0], low.source(s.operands[3], s.scope, 1)[0]
    signs = [_number(text) for text in s.operands[4:6]]
    transposed = [_number(text) for text in s.operands[6:]]
    assert len(transposed) == (0 if of_a == "tf32" else 1 if from_registers else 2)
    transpose_a, transpose_b = ([0, 0] + transposed)[-2:]
    low.wgmma_registers.update(sums, a if from_registers else ())
    low.emit(
        s, "WGMMA", [*sums, *a, b, use_sums, *signs], (), [b, use_sums],  # it checks its other registers itself
        (_FACTORS[of_a], n, int(from_registers), transpose_a | transpose_b << 1, int(result == "f16")),
    )  # fmt: skip


def _shuffle(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    results = [low.register(name, s.scope)[0] for name in s.operands[0].split("|")]
    sources = [low.source(text, s.scope)[0] for text in s.operands[1:5]]
    mode = {"up": 0, "down": 1, "bfly": 2, "idx": 3}[mods[1]]
    low.emit(s, "SHFL", [results[0], *sources, *results[1:]], results, sources, (mode, len(results) - 1))


def _transpose(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    if mods != ["sync", "aligned", "m8n8", "trans", "b16"]:
        raise Unsupported(s.op)
    result, source = (low.register(name, s.scope)[0] for name in s.operands)
    low.emit(s, "MOVMATRIX", [result, source], [result], [source])


def _elect(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    lane, elected = s.operands[0].split("|")
    if immediate(s.operands[1]) not in (-1, 0xFFFFFFFF):
        raise Unsupported("a mask")
    results = [low.register(name, s.scope)[0] for name in (elected, lane) if name != "_"]
    low.emit(s, "ELECT", (results + [-1])[:2], results)


def _vote(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    result, asked = low.register(s.operands[0], s.scope)[0], low.register(s.operands[1].lstrip("!"), s.scope)[0]
    kind, negated = {"all": 0, "any": 1, "uni": 2, "ballot": 3}[mods[1]], int(s.operands[1].startswith("!"))
    low.emit(s, "VOTE", [result, asked, low.source(s.operands[2], s.scope)[0]], [result], [asked], (kind, negated))


def _reduce(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    kind = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5}[mods[1]]
    result, of = low.register(s.operands[0], s.scope)[0], low.source(s.operands[1], s.scope)[0]
    low.emit(s, "REDUX", [result, of], [result], [of], (kind, int(mods[-1] == "s32")))


def _active_mask(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    result = low.register(s.operands[0], s.scope)[0]
    low.emit(s, "ACTIVEMASK", [result], [result])


def _atomic(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    kinds = {"add": 0, "exch": 1, "cas": 2, "min": 3, "max": 4, "and": 5, "or": 6, "xor": 7}
    types = {"u32": 0, "b32": 0, "s32": 1, "u64": 2, "b64": 2, "f32": 3, "s64": 4}
    kind, shared = next(m for m in mods if m in kinds), any(m.startswith("shared") for m in mods)
    if mods[-1] == "f32" and kind not in ("add", "exch"):
        raise Unsupported(s.op)
    if not shared and "global" not in mods:
        raise Unsupported("generic addresses")
    operands = list(s.operands)
    result = operands.pop(0) if head == "atom" else "_"
    results = [] if result == "_" else [low.register(result, s.scope)[0]]
    address = low.address(operands[0], s.scope, 4 if shared else 8)
    values = [low.source(text, s.scope, WIDTH[mods[-1]])[0] for text in operands[1:]]
    low.emit(
        s, "ATOM", [*(results or [-1]), *address, *values], results, [address[0], *values],
        (kinds[kind], types[mods[-1]], int(shared)),
    )  # fmt: skip


def _mbarrier(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    kind, operands = mods[0], list(s.operands)
    waits = kind in ("try_wait", "test_wait") and "parity" in mods
    if waits:
        result = low.register(operands.pop(0), s.scope)[0]
    elif kind == "arrive" and operands.pop(0) != "_":
        raise Unsupported("an mbarrier's state")
    address = low.address(operands[0], s.scope, 4)
    values = [low.source(text, s.scope)[0] for text in operands[1:2]]
    reads = [address[0], *values]
    if waits:
        low.emit(s, "MBWAIT", [result, *address, *values], [result], reads)
    elif kind == "init":
        low.shared_widths.append(8)
        low.emit(s, "MBINIT", [*address, *values], (), reads)
    elif kind == "inval":
        low.emit(s, "MBINVAL", address, (), reads)
    elif kind == "expect_tx" or (kind == "arrive" and "expect_tx" in mods):
        low.emit(s, "MBEXPECT", [*address, *values], (), reads, (int(kind == "arrive"),))
    elif kind == "arrive":
        low.emit(s, "MBARRIVE", [*address, *(values or [-1])], (), reads, (1,))
    else:
        raise Unsupported(s.op)


def _copy(low: Lowering, s: Statement, head: str, mods: list[str]) -> None:
    if mods[:1] != ["async"]:
        raise Unsupported(s.op)
    _copy_async(low, s, head, mods)


_BY_HEAD = {
    "bra": _branch, "ret": _return, "exit": _return, "fence": _fence, "bar": _barrier, "barrier": _barrier,
    "ld": _memory, "st": _memory, "cp": _copy, "ldmatrix": _matrix_of_warp, "stmatrix": _matrix_of_warp,
    "mma": _mma, "wgmma": _wgmma, "shfl": _shuffle, "movmatrix": _transpose, "elect": _elect, "vote": _vote,
    "redux": _reduce,
    "activemask": _active_mask, "atom": _atomic, "red": _atomic, "mbarrier": _mbarrier, "cvta": _to_address_space,
    "mov": _move,
}  # fmt: skip
