"""Forward passes for torch.nn's convolutions, as `kernels.kernelize` puts them into layers that there are.

Grouped layers padded with zeros are convolved by this library. All others go on as before, and so do layers whose class
has a forward or a convolution of its own: `kernels.replace_kernel_forward_from_hub(nn.Conv2d, "Conv2d")` reaches every
subclass.
"""

from torch import Tensor, nn

from .library.api import triton_conv
from .library.kinds import conv1d, conv_transpose1d, conv_transpose2d


def _is_ours(layer: nn.Module, native: type, *methods: str) -> bool:
    """Whether a layer is grouped, and does with its attributes what torch.nn's does."""
    mine = type(layer)
    native_still = all(getattr(mine, name) is getattr(native, name) for name in methods)
    return native_still and layer.groups > 1 and layer.padding_mode == "zeros"


class Conv1d(nn.Module):
    """nn.Conv1d's forward."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        if not _is_ours(self, nn.Conv1d, "forward", "_conv_forward"):
            return type(self).forward(self, input)
        return conv1d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(nn.Module):
    """nn.Conv2d's forward."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        if not _is_ours(self, nn.Conv2d, "forward", "_conv_forward"):
            return type(self).forward(self, input)
        return triton_conv(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvTranspose1d(nn.Module):
    """nn.ConvTranspose1d's forward."""

    can_torch_compile = True

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or not _is_ours(self, nn.ConvTranspose1d, "forward"):
            return type(self).forward(self, input, output_size)
        more = self.output_padding, self.groups, self.dilation
        return conv_transpose1d(input, self.weight, self.bias, self.stride, self.padding, *more)


class ConvTranspose2d(nn.Module):
    """nn.ConvTranspose2d's forward."""

    can_torch_compile = True

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or not _is_ours(self, nn.ConvTranspose2d, "forward"):
            return type(self).forward(self, input, output_size)
        more = self.output_padding, self.groups, self.dilation
        return conv_transpose2d(input, self.weight, self.bias, self.stride, self.padding, *more)
