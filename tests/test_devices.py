"""Devices: names, slugs and what is planned for."""

import dataclasses
import types

import pytest
import torch

from groupconv import devices, explain
from groupconv.compiling import stub_driver

EVERY = tuple(devices.BY_SLUG.values())


# As drivers call them: names of one device, and others that begin alike.
SLUGS = {
    "NVIDIA H200": "nvidia_h200",
    "NVIDIA H200 NVL": "nvidia_h200_nvl",
    "NVIDIA A100-SXM4-80GB": "nvidia_a100_sxm",
    "NVIDIA A100-SXM4-40GB": "nvidia_a100_40gb",
    "NVIDIA A100-PCIE-40GB": "nvidia_a100_40gb",
    "NVIDIA A100 80GB PCIe": "nvidia_a100_pcie",
    "NVIDIA H100 80GB HBM3": "nvidia_h100_sxm",
    "NVIDIA GeForce RTX 4080": "nvidia_geforce_rtx_4080",
    "Tesla T4": "nvidia_t4",
    "AMD Instinct MI300X OAM": "amd_instinct_mi300x",
    "AMD Instinct MI250X/MI250": "amd_instinct_mi250x",
    "Some (Odd)  Name/7": "some_odd_name_7",
}


@pytest.mark.parametrize(("name", "slug"), SLUGS.items())
def test_slugs(name, slug):
    assert devices.slugify(name) == slug
    assert devices.slugify(slug) == slug


# As people call them: without maker or separators, by a family's best known member, by architecture.
SPOKEN = {
    "NVIDIA H200": "nvidia_h200", "A100": "nvidia_a100_sxm", "a100-80gb": "nvidia_a100_sxm",
    "A100 40GB": "nvidia_a100_40gb",
    "nvidia a100 pcie": "nvidia_a100_pcie", "H100 SXM5": "nvidia_h100_sxm", "H100PCIe": "nvidia_h100_pcie",
    "4090": "nvidia_geforce_rtx_4090", "rtx_5090": "nvidia_geforce_rtx_5090", "L4": "nvidia_l4", "L40S": "nvidia_l40s",
    "Tesla T4": "nvidia_t4", "MI300X": "amd_instinct_mi300x", "7900 XTX": "amd_radeon_rx_7900_xtx",
    "SM_89": "nvidia_l40s", "89": "nvidia_l40s", "8.9": "nvidia_l40s", "compute_89": "nvidia_l40s",
    "sm_90a": "nvidia_h200", "sm_120": "nvidia_geforce_rtx_5090", "gfx942:sramecc+:xnack-": "amd_instinct_mi300x",
}  # fmt: skip


@pytest.mark.parametrize(("name", "slug"), SPOKEN.items())
def test_names_that_people_say(name, slug):
    assert devices.named(name) is devices.BY_SLUG[slug]
    assert explain(torch.empty(2, 8, 6, 6), torch.empty(8, 2, 3, 3), groups=4, target=name).target.slug == slug


NEAR = {
    "H10O": ".* Did you mean .*nvidia_h100_sxm.*\\?",
    "RTX 4070": ".* Did you mean .*nvidia_geforce_rtx_4090.*\\?",
    "sm_98": ".* Did you mean .*sm_89.*\\?",
    "MI300": ".* Did you mean .*amd_instinct_mi300x.*\\?",
    "frobnicator": "it is one of .*, sm_90",
    "": "it is one of .*, sm_90",
}


@pytest.mark.parametrize(("name", "says"), NEAR.items())
def test_unknown_names_are_answered_with_those_near(name, says):
    with pytest.raises(ValueError, match=rf"^target '{name}' is not known; {says}$"):
        devices.named(name)


@pytest.mark.parametrize("target", [1, b"sm_90", torch.device("cuda")], ids=str)
def test_a_target_that_is_no_string(target):
    with pytest.raises(TypeError, match=r"^explain: target is .*, but must be a string or None$"):
        explain(torch.empty(2, 8, 6, 6), torch.empty(8, 2, 3, 3), groups=4, target=target)


@pytest.mark.parametrize("name", ["V100", "Tesla V100-SXM2-16GB", "7.0"])
def test_older_devices_are_not_supported(name):
    with pytest.raises(ValueError, match=f"target '{name}' is not supported: NVIDIA GPUs are from sm_75 on"):
        explain(torch.empty(2, 8, 6, 6), torch.empty(8, 2, 3, 3), groups=4, target=name)


def test_every_target_is_complete():
    for target in EVERY:
        assert {dtype for dtype, _ in target.matrix_tflops} == {"fp16", "bf16", "tf32", "fp32"}
        assert devices.named(target.slug) is target
        assert devices.slugify(target.slug) == devices.slugify(target.slug.replace("_", " ").upper()) == target.slug
        assert 0 < target.copy_gbps < target.l2_gbps
        assert target.precision("fp32") == target.precision("bf16") == "ieee"
    assert len({stub_driver.StubDriver(target).number for target in EVERY}) == len(EVERY)
    assert set(devices.ALIASES.values()) | set(devices.FAMILIES.values()) <= set(devices.BY_SLUG)
    for alias, slug in devices.ALIASES.items():
        assert devices.slugify(alias) == slug
        assert devices.named(alias) is devices.BY_SLUG[slug]
    assert tuple(devices.BY_ARCH.values()) == devices.REPRESENTATIVES
    assert all(devices.named(target.arch_name) is target for target in devices.REPRESENTATIVES)


def test_other_devices_are_like_their_architectures_representative():
    """The same limits; L2 by multiprocessor and clock as the representative's, within a rounding of a tenth."""
    for target in devices.OTHERS:
        like = devices.BY_ARCH[target.arch_name]
        assert (target.backend, target.shared_bytes) == (like.backend, like.shared_bytes)
        scale = target.multiprocessors * target.clock_ghz / (like.multiprocessors * like.clock_ghz)
        assert target.l2_gbps == pytest.approx(like.l2_gbps * scale, rel=0.1)
        assert target.matrix_rate("bf16") <= 2 * target.matrix_rate("tf32") * 1.02


@pytest.mark.parametrize(
    ("name", "arch", "slug", "source"),
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), "nvidia_geforce_rtx_4090", "datasheet, derated"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "nvidia_h100_sxm", "datasheet, derated"),
        ("NVIDIA GeForce RTX 4070", (8, 9), "nvidia_geforce_rtx_4070", "scaled from nvidia_l40s"),
    ],
)
def test_device_of_this_machine(name, arch, slug, source, monkeypatch):
    """By its own entry where there is one, with the multiprocessors that it has; else by its architecture's."""
    properties = types.SimpleNamespace(name=name, multi_processor_count=46, major=arch[0], minor=arch[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    target = devices.of_device.__wrapped__(0)
    assert (target.slug, target.source, target.multiprocessors) == (slug, source, 46)
    if slug in devices.BY_SLUG:
        assert target.copy_gbps == devices.BY_SLUG[slug].copy_gbps


def test_what_matrix_units_have():
    """TF32 where the unit has it; groups of four warps where the instructions are of one, later minor versions too."""
    tf32 = [arch for arch in devices.BY_ARCH if devices.named(arch).precision("tf32") == "tf32"]
    assert not {"sm_75", "gfx90a", "gfx950", "gfx1100"} & set(tf32)
    assert {"sm_80", "sm_90", "gfx942"} <= set(tf32)
    units = {name: devices.named(name).matrix_unit for name in devices.BY_ARCH}
    assert (units["sm_90"], units["sm_100"], units["gfx942"], units["gfx1100"]) == ("wgmma", "tcgen05", "mfma", "wmma")
    assert units["sm_75"] == units["sm_89"] == units["sm_120"] == "mma.sync"
    assert [t.arch_name for t in devices.REPRESENTATIVES if t.has_warpgroups] == ["sm_90", "sm_100"]
    assert dataclasses.replace(devices.named("sm_100"), arch=103).has_warpgroups
