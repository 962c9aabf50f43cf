"""Tunes and advises for a model of one's own: lists its grouped layers in a CSV, which both commands take.

    pip install 'groupconv[report]'
    python examples/own_model.py --batch 64

On a GPU it measures; without one the tuner goes by a pretended clock, to show its course, and advice is modelled.
Models of timm and torchvision need no list: `groupconv tune --model timm:NAME`, `groupconv advise --model timm:NAME`.
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import sys

import torch
from torch import nn

from groupconv import cli

COLUMNS = [
    "name", "N", "C_in", "H", "W", "C_out", "KH", "KW", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w",
    "groups",
]  # fmt: skip


class Model(nn.Module):
    """Put your own here."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 4, 3)
        self.depthwise = nn.Conv2d(width, width, 7, 1, 3, groups=width)
        self.grouped = nn.Conv2d(width, 2 * width, 3, 2, 1, groups=width // 8)

    def forward(self, x):
        return self.grouped(self.depthwise(self.stem(x)).relu()).relu().mean((2, 3))


def grouped_layers(model: nn.Module, *inputs: torch.Tensor) -> list[list]:
    """The rows of a list for --layers: each grouped nn.Conv2d that a call of the model reaches, each shape once."""
    rows: dict[tuple, str] = {}

    def record(name: str, layer: nn.Conv2d, x: torch.Tensor) -> None:
        pad = layer.padding if isinstance(layer.padding, tuple) else (layer.kernel_size[0] // 2,) * 2
        n, c_in, h, w = x.shape
        sizes = (*layer.kernel_size, *layer.stride, *pad, *layer.dilation, layer.groups)
        rows.setdefault((n, c_in, h, w, layer.out_channels, *sizes), name)

    hooks = [
        module.register_forward_pre_hook(lambda layer, args, name=name: record(name, layer, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1
    ]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [[name, *row] for row, name in rows.items()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--budget-seconds", default="120", help="of tuning")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("own_model"))
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    layers = args.out / "layers.csv"
    with torch.device("meta"):  # shapes are all that is read
        rows = grouped_layers(Model().eval(), torch.empty(args.batch, 3, args.size, args.size))
    with layers.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    print(f"{len(rows)} grouped layers in {layers}")

    tune = ["tune", "--layers", str(layers), "--budget-seconds", args.budget_seconds]
    if not torch.cuda.is_available():
        tune += ["--stub", "--out", str(args.out / "tuned")]
    status = cli.main(tune)
    return status or cli.main(["advise", "--layers", str(layers), "--out", str(args.out)])


if __name__ == "__main__":
    sys.exit(main())
