"""GPUs that the library knows: how they are called, what they can hold, and how fast they are."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to plan for. Rates are what a program reaches, not a datasheet's peak: `source` says how they are known.

    matrix_tflops: dense rate by ConvProblem.dtype; 0 where Triton has no matrix instructions for the dtype: none for
    fp16 or bf16 on sm_75 (Triton 3.6.0 and 3.7.1 compile such a dot to FMAs).
    """

    slug: str
    backend: str  # Triton's: "cuda" or "hip"
    arch: int | str  # 90, "gfx942"
    multiprocessors: int
    shared_bytes: int  # shared memory (LDS) that one program can have
    clock_ghz: float  # boost
    copy_gbps: float
    l2_gbps: float
    matrix_tflops: tuple[tuple[str, float], ...]
    source: str

    @property
    def arch_name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def warp_size(self) -> int:
        return 64 if self.backend == "hip" and not str(self.arch).startswith("gfx1") else 32

    @functools.cached_property
    def matrix_unit(self) -> str:
        """The instructions of a matrix product: "wgmma" and "tcgen05" take 64 rows at once and are twice as fast as
        "mma.sync", which those GPUs have too; "mfma" or "wmma" on AMD.
        """
        if self.backend == "hip":
            return "wmma" if str(self.arch).startswith("gfx1") else "mfma"
        return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(int(self.arch) // 10, "mma.sync")

    @property
    def has_warpgroups(self) -> bool:
        """Whether there are matrix instructions of a group of four warps."""
        return self.matrix_unit in ("wgmma", "tcgen05")

    @property
    def has_descriptors(self) -> bool:
        """Whether a load may bring a whole tile by a tensor descriptor (NVIDIA's TMA)."""
        return self.backend == "cuda" and int(self.arch) >= 90

    def matrix_rate(self, dtype: str) -> float:
        """TFLOP/s for a ConvProblem dtype."""
        if dtype == "bf16x3":
            return self.matrix_rate("bf16") / 3
        return dict(self.matrix_tflops)[dtype]

    def precision(self, dtype: str) -> str:
        """Triton's input_precision for a ConvProblem dtype."""
        if dtype == "bf16x3" and self.matrix_rate(dtype):
            return "bf16x3"
        tf32 = (self.backend == "cuda" and int(self.arch) >= 80) or self.arch == "gfx942"
        return "tf32" if dtype == "tf32" and tf32 else "ieee"


# A datasheet's peak that a good copy and a good matrix product reach. One H200 measured here: 0.90 and 0.80.
COPY_FRACTION, MATRIX_FRACTION = 0.90, 0.80


def _datasheet(slug, backend, arch, multiprocessors, shared_bytes, clock, gbps, l2_gbps, fp16, bf16, tf32, fp32):
    rates = {"fp16": fp16, "bf16": bf16, "tf32": tf32, "fp32": fp32}
    scaled = tuple((dtype, rate * MATRIX_FRACTION) for dtype, rate in rates.items())
    return Target(
        slug, backend, arch, multiprocessors, shared_bytes, clock,
        gbps * COPY_FRACTION, l2_gbps, scaled, "datasheet, derated",
    )  # fmt: skip


# One device for each architecture that Triton compiles for: the one planned for where only the architecture is named.
REPRESENTATIVES = (
    _datasheet("nvidia_t4", "cuda", 75, 40, 65536, 1.59, 320, 1000, 0, 0, 8.1, 8.1),
    _datasheet("nvidia_a100_sxm", "cuda", 80, 108, 166912, 1.41, 2039, 4000, 312, 312, 156, 19.5),
    _datasheet("nvidia_geforce_rtx_3090", "cuda", 86, 82, 101376, 1.7, 936, 2500, 71, 71, 35.6, 35.6),
    _datasheet("nvidia_l40s", "cuda", 89, 142, 101376, 2.52, 864, 4000, 362, 362, 183, 91.6),
    Target(
        "nvidia_h200", "cuda", 90, 132, 232448, 1.98, 4300, 5500,
        (("fp16", 790.0), ("bf16", 790.0), ("tf32", 395.0), ("fp32", 53.0)),
        "copy and bf16 rate measured, others derived",
    ),
    _datasheet("nvidia_b200", "cuda", 100, 148, 232448, 1.97, 8000, 10000, 2250, 2250, 1125, 75),
    _datasheet("nvidia_geforce_rtx_5090", "cuda", 120, 170, 101376, 2.41, 1792, 5000, 209, 209, 104.8, 104.8),
    _datasheet("amd_instinct_mi250x", "hip", "gfx90a", 110, 65536, 1.7, 1638, 3500, 191, 191, 47.9, 47.9),
    _datasheet("amd_instinct_mi300x", "hip", "gfx942", 304, 65536, 2.1, 5300, 10000, 1307, 1307, 653, 163),
    _datasheet("amd_instinct_mi355x", "hip", "gfx950", 256, 163840, 2.4, 8000, 12000, 2500, 2500, 157, 157),
    _datasheet("amd_radeon_rx_7900_xtx", "hip", "gfx1100", 96, 65536, 2.5, 960, 3500, 123, 123, 61, 61),
)  # fmt: skip
# More devices of those architectures. L2 rates are the representative's by multiprocessor and clock.
OTHERS = (
    _datasheet("nvidia_a100_pcie", "cuda", 80, 108, 166912, 1.41, 1935, 4000, 312, 312, 156, 19.5),
    _datasheet("nvidia_a100_40gb", "cuda", 80, 108, 166912, 1.41, 1555, 4000, 312, 312, 156, 19.5),
    _datasheet("nvidia_a10", "cuda", 86, 72, 101376, 1.695, 600, 2200, 125, 125, 62.5, 31.2),
    _datasheet("nvidia_l4", "cuda", 89, 58, 101376, 2.04, 300, 1300, 121, 121, 60, 30.3),
    _datasheet("nvidia_geforce_rtx_4080", "cuda", 89, 76, 101376, 2.505, 716.8, 2100, 97.5, 97.5, 48.7, 48.7),
    _datasheet("nvidia_geforce_rtx_4090", "cuda", 89, 128, 101376, 2.52, 1008, 3600, 165.2, 165.2, 82.6, 82.6),
    _datasheet("nvidia_h100_sxm", "cuda", 90, 132, 232448, 1.98, 3350, 5500, 989, 989, 494.5, 67),
    _datasheet("nvidia_h100_pcie", "cuda", 90, 114, 232448, 1.755, 2000, 4200, 756, 756, 378, 51),
    _datasheet("nvidia_h100_nvl", "cuda", 90, 132, 232448, 1.785, 3900, 5000, 835.5, 835.5, 417.5, 60),
    _datasheet("nvidia_h200_nvl", "cuda", 90, 132, 232448, 1.785, 4800, 5000, 835.5, 835.5, 417.5, 60),
    _datasheet("amd_instinct_mi300a", "hip", "gfx942", 228, 65536, 2.1, 5300, 7500, 980.6, 980.6, 490.3, 122.6),
)
BY_SLUG = {t.slug: t for t in (*REPRESENTATIVES, *OTHERS)}
BY_ARCH = {t.arch_name: t for t in REPRESENTATIVES}
DEFAULT = BY_SLUG["nvidia_h200"]


def kin(target: Target) -> list[str]:
    """The slugs of the other devices of a target's architecture."""
    arch = target.backend, target.arch
    return [
        other.slug for other in BY_SLUG.values() if (other.backend, other.arch) == arch and other.slug != target.slug
    ]


# A device's marketing name, reduced by `slugify`, to the slug of its configuration file: boards that differ only in
# what does not matter here share a file.
ALIASES = {
    "nvidia_a100_sxm4_40gb": "nvidia_a100_40gb",
    "nvidia_a100_sxm4_80gb": "nvidia_a100_sxm",
    "nvidia_a100_sxm_64gb": "nvidia_a100_sxm",
    "nvidia_a100_pcie_40gb": "nvidia_a100_40gb",
    "nvidia_a100_80gb_pcie": "nvidia_a100_pcie",
    "nvidia_h100_80gb_hbm3": "nvidia_h100_sxm",
    "tesla_t4": "nvidia_t4",
    "amd_instinct_mi300x_oam": "amd_instinct_mi300x",
    "amd_instinct_mi300x_vf": "amd_instinct_mi300x",
    "amd_instinct_mi250x_mi250": "amd_instinct_mi250x",
    "radeon_rx_7900_xtx": "amd_radeon_rx_7900_xtx",
}


def slugify(name: str) -> str:
    """The slug of a device name as torch reports it: "NVIDIA A100-SXM4-80GB" -> "nvidia_a100_sxm"."""
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return ALIASES.get(slug, slug)


# What people say, reduced by `_reduced`, where it is no slug or alias: the common board of a family.
FAMILIES = {
    "a100": "nvidia_a100_sxm",
    "a10080gb": "nvidia_a100_sxm",
    "a100sxm4": "nvidia_a100_sxm",
    "h100": "nvidia_h100_sxm",
    "h10080gb": "nvidia_h100_sxm",
    "h100sxm5": "nvidia_h100_sxm",
    "h200sxm": "nvidia_h200",
}
TOO_OLD = ("p100", "v100", "sm60", "sm61", "sm70", "sm72")


def _reduced(name: str) -> str:
    """A name without case, separators, makers and series: "RTX 4090" -> "4090", "sm_90a" and "9.0" -> "sm90"."""
    name = name.lower().split(":")[0]  # as in "gfx942:sramecc+:xnack-"
    words = re.sub(r"nvidia|amd|geforce|tesla|quadro|rtx|instinct|radeon|rx|[^a-z0-9]", "", name)
    arch = re.fullmatch(r"(?:sm|compute)?(\d{2}|1\d{2})[af]?", words)
    return f"sm{arch[1]}" if arch else words


@functools.cache
def _by_reduced_name() -> dict[str, Target]:
    slugs = ALIASES | {slug: slug for slug in BY_SLUG}
    targets = {_reduced(name): BY_SLUG[slug] for name, slug in slugs.items()}
    targets |= {name: BY_SLUG[slug] for name, slug in FAMILIES.items()}
    return targets | {_reduced(arch): target for arch, target in BY_ARCH.items()}


def named(target: str) -> Target:
    """The target called by a slug ("nvidia_h200"), device name ("NVIDIA H200", "h200", "RTX 4090") or architecture
    ("sm_90", "sm_90a", "90", "gfx942"), with or without maker and separators.

    Raises: ValueError for any other, with those that come near.
    """
    reduced = _reduced(target)
    known = _by_reduced_name()
    if reduced in known:
        return known[reduced]
    if reduced.startswith(TOO_OLD):
        raise ValueError(f"target {target!r} is not supported: NVIDIA GPUs are from sm_75 on")
    message = f"target {target!r} is not known; it is one of {', '.join(sorted(BY_SLUG) + sorted(BY_ARCH))}"
    near = dict.fromkeys(
        known[name].arch_name if name.startswith(("sm", "gfx")) else known[name].slug
        for name in difflib.get_close_matches(reduced, known)
    )
    raise ValueError(f"{message}. Did you mean {' or '.join(near)}?" if near else message)


def of_fields(fields: dict[str, Any]) -> Target:
    """The target of which JSON carried the fields."""
    rates = tuple((dtype, rate) for dtype, rate in fields["matrix_tflops"])
    return Target(**fields | {"matrix_tflops": rates})


@functools.cache
def of_device(index: int) -> Target:
    """The target of a GPU of this machine; rates of a device without an entry are scaled from its architecture's."""
    props = torch.cuda.get_device_properties(index)
    slug = slugify(props.name)
    like = BY_SLUG.get(slug)
    if like is not None:
        return dataclasses.replace(like, multiprocessors=props.multi_processor_count)
    arch: int | str
    if torch.version.hip:
        arch = props.gcnArchName.split(":")[0]
        like = BY_ARCH.get(arch, BY_ARCH["gfx942"])
    else:
        arch = props.major * 10 + props.minor
        like = BY_ARCH.get(f"sm_{arch}") or _nearest_cuda(arch)
    scale = props.multi_processor_count / like.multiprocessors
    return dataclasses.replace(
        like,
        slug=slug,
        arch=arch,
        multiprocessors=props.multi_processor_count,
        shared_bytes=getattr(props, "shared_memory_per_block_optin", like.shared_bytes) or like.shared_bytes,
        copy_gbps=_datasheet_gbps(props) or like.copy_gbps * scale,
        l2_gbps=like.l2_gbps * scale,
        matrix_tflops=tuple((dtype, rate * scale) for dtype, rate in like.matrix_tflops),
        source=f"scaled from {like.slug}",
    )


def _nearest_cuda(arch: int) -> Target:
    older = [t for t in REPRESENTATIVES if t.backend == "cuda" and int(t.arch) <= arch]
    return max(older, key=lambda t: int(t.arch), default=BY_ARCH["sm_75"])


def _datasheet_gbps(props) -> float:
    """Copy rate from the memory clock (kHz) and bus width (bits) that the driver reports, two transfers a clock."""
    clock, width = getattr(props, "memory_clock_rate", 0), getattr(props, "memory_bus_width", 0)
    return 2 * clock * width / 8 / 1e6 * COPY_FRACTION
