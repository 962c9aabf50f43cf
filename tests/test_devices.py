"""Devices: names, slugs and what is planned for."""

import dataclasses
import types

import pytest
import torch

from groupconv import devices, explain
from groupconv.compiling import stub_driver

EVERY = tuple(devices.BY_SLUG.values())


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia_h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm"),
        ("NVIDIA A100-SXM4-40GB", "nvidia_a100_40gb"),
        ("NVIDIA A100-PCIE-40GB", "nvidia_a100_40gb"),
        ("NVIDIA A100 80GB PCIe", "nvidia_a100_pcie"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_sxm"),
        ("NVIDIA H100 PCIe", "nvidia_h100_pcie"),
        ("NVIDIA H100 NVL", "nvidia_h100_nvl"),
        ("NVIDIA H200 NVL", "nvidia_h200_nvl"),
        ("NVIDIA A10", "nvidia_a10"),
        ("NVIDIA L4", "nvidia_l4"),
        ("NVIDIA GeForce RTX 4080", "nvidia_geforce_rtx_4080"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
        ("NVIDIA GeForce RTX 3090", "nvidia_geforce_rtx_3090"),
        ("Tesla T4", "nvidia_t4"),
        ("AMD Instinct MI300X OAM", "amd_instinct_mi300x"),
        ("AMD Instinct MI300A", "amd_instinct_mi300a"),
        ("AMD Instinct MI250X/MI250", "amd_instinct_mi250x"),
        ("Some (Odd)  Name/7", "some_odd_name_7"),
    ],
)
def test_slugs(name, slug):
    assert devices.slugify(name) == slug
    assert devices.slugify(slug) == slug


def test_targets_by_slug_name_and_architecture():
    h200 = devices.named("nvidia_h200")
    assert devices.named("NVIDIA H200") is h200
    assert devices.named("sm_90") is h200
    assert devices.named("gfx942").warp_size == 64
    assert devices.named("gfx1100").warp_size == 32
    with pytest.raises(ValueError, match="target 'sm_12' is not known; it is one of"):
        devices.named("sm_12")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("A100", "nvidia_a100_sxm"),
        ("a100-80gb", "nvidia_a100_sxm"),
        ("A100 40GB", "nvidia_a100_40gb"),
        ("nvidia a100 pcie", "nvidia_a100_pcie"),
        ("H100", "nvidia_h100_sxm"),
        ("H100 SXM5", "nvidia_h100_sxm"),
        ("H100PCIe", "nvidia_h100_pcie"),
        ("H100-NVL", "nvidia_h100_nvl"),
        ("H200", "nvidia_h200"),
        ("b200", "nvidia_b200"),
        ("RTX 4090", "nvidia_geforce_rtx_4090"),
        ("4090", "nvidia_geforce_rtx_4090"),
        ("GeForce RTX 3090", "nvidia_geforce_rtx_3090"),
        ("rtx_5090", "nvidia_geforce_rtx_5090"),
        ("L40S", "nvidia_l40s"),
        ("L4", "nvidia_l4"),
        ("A10", "nvidia_a10"),
        ("T4", "nvidia_t4"),
        ("Tesla T4", "nvidia_t4"),
        ("MI300X", "amd_instinct_mi300x"),
        ("mi250x", "amd_instinct_mi250x"),
        ("7900 XTX", "amd_radeon_rx_7900_xtx"),
        ("SM_89", "nvidia_l40s"),
        ("sm89", "nvidia_l40s"),
        ("89", "nvidia_l40s"),
        ("8.9", "nvidia_l40s"),
        ("compute_89", "nvidia_l40s"),
        ("sm_90a", "nvidia_h200"),
        ("sm_120", "nvidia_geforce_rtx_5090"),
        ("GFX942", "amd_instinct_mi300x"),
        ("gfx942:sramecc+:xnack-", "amd_instinct_mi300x"),
    ],
)
def test_names_that_people_say(name, slug):
    assert devices.named(name) is devices.BY_SLUG[slug]
    assert explain(torch.empty(2, 8, 6, 6), torch.empty(8, 2, 3, 3), groups=4, target=name).target.slug == slug


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("H10O", "nvidia_h100_sxm"),
        ("RTX 4070", "nvidia_geforce_rtx_4090"),
        ("sm_98", "sm_89"),
        ("MI300", "amd_instinct_mi300x"),
    ],
)
def test_near_names_are_suggested(name, near):
    with pytest.raises(ValueError, match=rf"target '{name}' is not known; .* Did you mean .*{near}.*\?$"):
        devices.named(name)


@pytest.mark.parametrize("name", ["frobnicator", ""])
def test_nothing_near_nothing_suggested(name):
    with pytest.raises(ValueError, match=f"target '{name}' is not known; it is one of .*, sm_90$"):
        devices.named(name)


@pytest.mark.parametrize("target", [1, b"sm_90", torch.device("cuda")], ids=str)
def test_a_target_that_is_no_string(target):
    with pytest.raises(TypeError, match=r"^explain: target is .*, but must be a string or None$"):
        explain(torch.empty(2, 8, 6, 6), torch.empty(8, 2, 3, 3), groups=4, target=target)


@pytest.mark.parametrize("name", ["V100", "Tesla V100-SXM2-16GB", "sm_70", "7.0", "P100"])
def test_older_devices_are_not_supported(name):
    with pytest.raises(ValueError, match=f"target '{name}' is not supported: NVIDIA GPUs are from sm_75 on"):
        explain(torch.empty(2, 8, 6, 6), torch.empty(8, 2, 3, 3), groups=4, target=name)


@pytest.mark.parametrize("target", EVERY, ids=lambda t: t.slug)
def test_every_target_is_complete(target):
    assert {dtype for dtype, _ in target.matrix_tflops} == {"fp16", "bf16", "tf32", "fp32"}
    assert devices.named(target.slug) is target
    assert devices.slugify(target.slug) == target.slug
    assert devices.slugify(target.slug.replace("_", " ").upper()) == target.slug
    assert 0 < target.copy_gbps < target.l2_gbps
    assert target.precision("fp32") == "ieee"
    assert target.precision("bf16") == "ieee"


def test_aliases_name_known_devices():
    assert set(devices.ALIASES.values()) | set(devices.FAMILIES.values()) <= set(devices.BY_SLUG)
    for alias, slug in devices.ALIASES.items():
        assert devices.slugify(alias) == slug
        assert devices.named(alias) is devices.BY_SLUG[slug]


def test_one_representative_an_architecture():
    assert tuple(devices.BY_ARCH.values()) == devices.REPRESENTATIVES
    assert len({target.arch for target in devices.REPRESENTATIVES}) == len(devices.REPRESENTATIVES)
    assert all(devices.named(target.arch_name) is target for target in devices.REPRESENTATIVES)


@pytest.mark.parametrize("target", devices.OTHERS, ids=lambda t: t.slug)
def test_other_devices_are_like_their_architectures_representative(target):
    """The same limits; L2 by multiprocessor and clock as the representative's, within a rounding of a tenth."""
    like = devices.BY_ARCH[target.arch_name]
    assert (target.backend, target.shared_bytes) == (like.backend, like.shared_bytes)
    scale = target.multiprocessors * target.clock_ghz / (like.multiprocessors * like.clock_ghz)
    assert target.l2_gbps == pytest.approx(like.l2_gbps * scale, rel=0.1)
    assert target.matrix_rate("bf16") <= 2 * target.matrix_rate("tf32") * 1.02


def test_every_target_has_a_number_of_its_own():
    assert len({stub_driver.StubDriver(target).number for target in EVERY}) == len(EVERY)


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


def test_tf32_only_where_the_matrix_unit_has_it():
    assert [devices.named(arch).precision("tf32") for arch in ("sm_75", "sm_80", "gfx90a", "gfx942", "gfx950")] == [
        "ieee", "tf32", "ieee", "tf32", "ieee"
    ]  # fmt: skip


def test_matrix_units():
    found = {name: devices.named(name).matrix_unit for name in devices.BY_ARCH}
    assert [name for name, unit in found.items() if unit == "mma.sync"] == [
        "sm_75",
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_120",
    ]
    assert (found["sm_90"], found["sm_100"], found["gfx942"], found["gfx1100"]) == ("wgmma", "tcgen05", "mfma", "wmma")
    assert [t.arch_name for t in devices.REPRESENTATIVES if t.has_warpgroups] == ["sm_90", "sm_100"]
    assert dataclasses.replace(devices.named("sm_100"), arch=103).has_warpgroups
