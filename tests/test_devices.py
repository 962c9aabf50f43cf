"""Devices: names, slugs and what is planned for."""

import dataclasses

import pytest

from groupconv import devices


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia_h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm"),
        ("NVIDIA A100-SXM4-40GB", "nvidia_a100_sxm"),
        ("NVIDIA A100 80GB PCIe", "nvidia_a100_pcie"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_sxm"),
        ("NVIDIA H100 PCIe", "nvidia_h100_pcie"),
        ("NVIDIA GeForce RTX 3090", "nvidia_geforce_rtx_3090"),
        ("Tesla T4", "nvidia_t4"),
        ("AMD Instinct MI300X OAM", "amd_instinct_mi300x"),
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


@pytest.mark.parametrize("target", devices.REPRESENTATIVES, ids=lambda t: t.slug)
def test_every_target_is_complete(target):
    assert {dtype for dtype, _ in target.matrix_tflops} == {"fp16", "bf16", "tf32", "fp32"}
    assert devices.named(target.arch_name) is target
    assert 0 < target.copy_gbps < target.l2_gbps
    assert target.precision("fp32") == "ieee"
    assert target.precision("bf16") == "ieee"


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
