"""What the processes of test_distributed.py run: python distributed_worker.py STORE RANK WORLD."""

import copy
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import groupconv


def same(out, ref):
    out = out.full_tensor() if isinstance(out, DTensor) else out
    assert (out.double() - ref.double()).norm() <= 1e-5 * ref.double().norm(), (out - ref).abs().max()


def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((4, 16, 7, 6), (16, 2, 3, 3), (16,))]


def sharded(mesh, x_placements, w_placements, backend):
    """Values and gradients of a convolution of DTensors against those of one process."""
    whole = [t.requires_grad_() for t in operands()]
    expected = F.conv2d(*whole, padding=1, groups=8)
    grads = torch.autograd.grad(expected.square().sum(), whole)
    placements = x_placements, w_placements, w_placements
    mine = [
        distribute_tensor(t.detach(), mesh, p).requires_grad_() for t, p in zip(operands(), placements, strict=True)
    ]
    with CommDebugMode() as communication:
        y = groupconv.triton_conv(*mine, padding=1, groups=8, backend=backend)
    assert communication.get_total_counts() == 0
    assert list(y.placements) == list(x_placements)
    same(y, expected)
    for out, ref in zip(torch.autograd.grad(y.square().sum(), mine), grads, strict=True):
        same(out, ref)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(4, 16, 3, groups=2), nn.Conv2d(16, 16, 3, padding=1, groups=8)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def fsdp(mesh, rank, world, order):
    """A step under FSDP2 of a model that was converted before, after, or that is enabled, against one process."""
    x = torch.randn(2 * world, 4, 7, 6, generator=torch.Generator().manual_seed(1))
    plain = Net()
    plain(x).square().mean().backward()
    model = Net()
    if order == "before":
        groupconv.convert(model)
    for part in (model.conv1, model.conv2, model):
        fully_shard(part, mesh=mesh)
    if order == "after":
        groupconv.convert(model)
    with groupconv.enable() if order == "enabled" else groupconv.disable():
        model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for out, ref in zip(model.parameters(), plain.parameters(), strict=True):
        same(out.grad, ref.grad)


def main(store, rank, world):
    rank, world = int(rank), int(world)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        line = init_device_mesh("cpu", (world,))
        for backend in ("triton", "auto"):
            sharded(line, [Shard(0)], [Replicate()], backend)
        sharded(line, [Shard(1)], [Shard(0)], "triton")
        sharded(line, [Replicate()], [Replicate()], "triton")
        if world == 4:
            square = init_device_mesh("cpu", (2, 2))
            sharded(square, [Shard(0), Shard(1)], [Replicate(), Shard(0)], "triton")
        x, w, _ = (distribute_tensor(t, line, [Shard(t.dim() - 1)]) for t in operands())
        with pytest.raises(NotImplementedError, match=r"DTensors that are sharded so are F\.conv2d's"):
            groupconv.triton_conv(x, w, padding=1, groups=8, backend="triton")
        for order in ("before", "after", "enabled"):
            fsdp(line, rank, world, order)
        parallel = nn.parallel.DistributedDataParallel(groupconv.convert(Net()))
        x = torch.randn(2 * world, 4, 7, 6, generator=torch.Generator().manual_seed(1))
        parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        plain = copy.deepcopy(Net())
        plain(x).square().mean().backward()
        for out, ref in zip(parallel.parameters(), plain.parameters(), strict=True):
            same(out.grad, ref.grad)
        print("done", rank)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
