"""Trains a small ResNeXt on scikit-learn's digits three times: with PyTorch's layers, converted, and enabled.

    pip install 'groupconv[examples]'
    python examples/train_digits.py

The loss curves are the same: to the bit on a CPU, where F.conv2d serves all three, and within rounding on a GPU. Writes
digits.csv and digits.png. With --device cuda, --dtype bf16 and a wider network the step times are worth a look.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import pathlib
import statistics
import time

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import groupconv

WAYS = ("plain", "converted", "enabled")


class Block(nn.Module):
    """ResNeXt's bottleneck: its 3x3 convolution has groups."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, groups=groups, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + x).relu()


def network(width: int, groups: int) -> nn.Module:
    """For images of 8 by 8 pixels."""
    blocks = [Block(width, groups) for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, batch: int, dtype: torch.dtype):
    """(losses, milliseconds) of each step."""
    device = images.device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    losses, times = [], []
    for _ in range(steps):
        some = torch.randint(len(images), (batch,), generator=order).to(device)
        began = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(model(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for a GPU
        times.append(1e3 * (time.perf_counter() - began))
    return losses, times


def draw(losses: dict[str, list[float]], times: dict[str, float], where: str) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for (way, values), style in zip(losses.items(), ("-", "--", ":"), strict=True):
        curves.plot(values, style, linewidth=2, label=way)
    curves.set_xlabel("step")
    curves.set_ylabel("loss")
    curves.legend(frameon=False)
    bars.bar(list(times), list(times.values()), color="0.6")
    bars.set_ylabel("median time of a step, ms")
    figure.suptitle(f"A small ResNeXt on scikit-learn's digits, {where}")
    return figure


def main(argv: list[str] | None = None) -> float:
    """Train all three ways; how far their losses are apart at most."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path())
    args = parser.parse_args(argv)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.5
    images = images.to(args.device, memory_format=torch.channels_last)
    labels = torch.tensor(digits.target).to(args.device)
    torch.manual_seed(0)
    model = network(args.width, args.groups).to(args.device, memory_format=torch.channels_last)

    losses, times = {}, {}
    for way in WAYS:
        mine = copy.deepcopy(model)
        if way == "converted":
            print(groupconv.summarize(groupconv.convert(mine)))
        with groupconv.enable() if way == "enabled" else contextlib.nullcontext():
            losses[way], steps = train(mine, images, labels, args.steps, args.batch, dtype)
        times[way] = statistics.median(steps[len(steps) // 3 :])  # the first compile kernels
        print(f"{way}: loss {losses[way][0]:.4f} to {losses[way][-1]:.4f}, {times[way]:.2f} ms a step (median)")

    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "digits.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("step", *losses))
        table.writerows(zip(range(args.steps), *losses.values(), strict=True))
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "on a CPU (F.conv2d serves)"
    draw(losses, times, f"{where}, {args.dtype}").savefig(args.out / "digits.png", dpi=150)
    apart = max(abs(a - b) for way in WAYS[1:] for a, b in zip(losses["plain"], losses[way], strict=True))
    print(f"the losses are at most {apart:.2g} apart; digits.csv and digits.png in {args.out}")
    return apart


if __name__ == "__main__":
    main()
