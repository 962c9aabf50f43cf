"""The public calls: triton_conv and explain."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import batch_norm, devices, dispatch, eager, epilogue, equivalents, native, prepared, torch_private, trial
from .arguments import are_tensors, autocast, consistent, normalise

equivalents.register()


def triton_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    shuffle_groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Grouped 2-D convolution: F.conv2d, by Triton kernels where they are the better choice.

    Args:
        input: [N, C_in, H, W] or [C_in, H, W]; fp32, fp16 or bf16 for our kernels, anything F.conv2d takes otherwise.
            Contiguous, channels_last and sliced tensors are read where they lie.
        weight: [C_out, C_in / groups, KH, KW], of input's dtype and device.
        bias: [C_out] or None.
        stride, dilation: pixels, an int or (vertical, horizontal).
        padding: pixels of zeros on both sides, an int or (vertical, horizontal); on each side, (top, bottom, left,
            right); "valid" is 0, and "same" keeps H and W at stride 1, with an even kernel's odd pixel at the bottom
            and right.
        groups: channels are split into so many groups, each convolved with its own filters.
        activation: what the result goes through, as torch has it with its default parameters: "relu", "relu6",
            "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish" or "sigmoid".
        residual: added before the activation; of the convolution's shape, device and, but for autocast, dtype.
            Both are part of the convolution's kernel, on its fp32 sums, where a plan of ours makes the forward pass of
            plain tensors, and one operator with it in a graph compiled for a GPU; on trial, and where F.conv2d serves,
            torch's functions follow. For backward y is kept where the derivative can be had of it (relu, relu6,
            leaky_relu, sigmoid; torch's chain keeps as much), else what the activation was of, by one more store of
            the kernel.
        shuffle_groups: what nn.ChannelShuffle would be given, after the activation; it divides C_out. A pass of its
            own, by torch.
        backend: "auto" takes the planned choice for each pass, F.conv2d among them; "triton" runs our kernels or
            raises; "triton:ALGORITHM" pins one algorithm; "torch" is F.conv2d.

    Returns:
        [N, C_out, H_out, W_out] (or [C_out, H_out, W_out]) of input's dtype, with F.conv2d's memory format:
        channels_last if input or weight is. Differentiable twice and more.

    Raises:
        What F.conv2d raises for the same bad call. ValueError for a `backend` or an `activation` that is not one, for a
        `residual` unlike the result, and for `shuffle_groups` that do not divide it. NotImplementedError where
        `backend` asks for kernels that cannot run this call, saying why.

    Accuracy:
        fp32 accumulation, one rounding to the result's dtype. fp32 inputs follow
        torch.backends.cudnn.conv.fp32_precision (TF32 or IEEE), or `set_fp32_precision`. Results and gradients are
        bitwise repeatable on a device. ||error|| / ||result|| against float64: fp16 5e-4, bf16 4e-3, tf32 1e-3, fp32
        2^-23 * sqrt(terms), bf16x3 1e-5 more; where products cancel all over a result, of its terms' root of squares.

    Autocast, torch.compile and torch.func are followed; what torch.func transforms inside a compiled function is
    F.conv2d's. Tensor subclasses, modes and torch.fx meet triton_conv by __torch_function__; torch.jit traces, and what
    torch.onnx exports, hold F.conv2d. Source: own derivation, no code adapted.
    """
    followed = activation is not None or residual is not None or shuffle_groups != 1
    if has_torch_function_variadic(input, weight, bias, residual) and torch_private.overrides_are_on():
        try:
            return handle_torch_function(
                triton_conv, (input, weight, bias, residual), input, weight, bias, stride, padding, dilation, groups,
                activation=activation, residual=residual, shuffle_groups=shuffle_groups, backend=backend,
            )  # fmt: skip
        except TypeError as error:  # a type may know F.conv2d, but not us
            if backend != "auto" or not str(error).startswith("no implementation found for"):
                raise
            y = native.conv2d(input, weight, bias, stride, padding, dilation, groups)
            return epilogue.shuffled(epilogue.applied(y, activation, residual), shuffle_groups) if followed else y
    if followed:
        arguments = input, weight, bias, stride, padding, dilation, groups
        fused = epilogue.fused(*arguments, backend, activation, residual)
        if fused is None:
            fused = epilogue.applied(triton_conv(*arguments, backend=backend), activation, residual)
        return epilogue.shuffled(fused, shuffle_groups)
    check_backend(backend, "triton_conv")
    if torch_private.being_traced() is not None:
        if backend not in ("auto", "torch"):
            raise NotImplementedError(
                f"triton_conv: backend={backend!r} cannot run this convolution: torch.jit traces F.conv2d"
            )
        return native.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return eager.conv2d(input, weight, bias, stride, padding, dilation, groups, backend)


def check_backend(backend: str, function: str) -> None:
    """ValueError for one that there is not."""
    if backend not in dispatch.BACKENDS:
        raise ValueError(f"{function}: backend is {backend!r}, but must be one of {', '.join(dispatch.BACKENDS)}")


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """activation(F.batch_norm(F.conv2d(...), ...)), where passes over the convolution's result cost most.

    Batch norm and activation of a dense result on a GPU are two passes over it in training, one else; their
    gradients are two more. Kept for them are the result and two numbers a channel, nothing of the activation. Anything
    else (other layouts, fp64, torch.compile, tensor subclasses, a second derivative) is computed by torch's functions.

    Args: as triton_conv and F.batch_norm have them: running_mean, running_var, bn_weight, bn_bias [C_out], of any
        floating dtype, or None; the running ones are updated in place if `training`. momentum: what a running
        statistic moves by; eps: added to the variance.

    Returns:
        [N, C_out, H_out, W_out], of the convolution's dtype and layout.

    Raises: what triton_conv and F.batch_norm do; ValueError for an `activation` that is not one, and for 3-D input.

    Accuracy: the convolution is rounded to its dtype, and its statistics are those of what was rounded, as torch has
    it; all else is in fp32, with one rounding. Relative error of the variance: 2^-23 times the pixels that a program
    sums in one place (some hundreds), whatever the mean is. Bitwise repeatable on a device. Source: own derivation.
    """
    tensors = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias)
    if has_torch_function_variadic(*tensors) and torch_private.overrides_are_on():
        return handle_torch_function(
            conv_bn_act, tensors, input, weight, bias, stride, padding, dilation, groups, running_mean=running_mean,
            running_var=running_var, bn_weight=bn_weight, bn_bias=bn_bias, training=training, momentum=momentum,
            eps=eps, activation=activation, backend=backend,
        )  # fmt: skip
    epilogue.check_activation(activation, "conv_bn_act")
    y = triton_conv(input, weight, bias, stride, padding, dilation, groups, backend=backend)
    if y.dim() != 4:
        raise ValueError(f"conv_bn_act: expected 4D input (got {y.dim()}D input)")
    return batch_norm.apply(
        y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, activation
    )  # fmt: skip


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    shuffle_groups: int = 1,
    backend: str = "auto",
    target: str | None = None,
) -> dispatch.Plan:
    """How triton_conv would run a call: the plan of each pass, where it came from and why, and what it must cost.

    Args: as triton_conv. Tensors may be fake or meta ones; only shapes, strides, dtypes and devices are read.
        target: a device ("NVIDIA H200", "h200", "RTX 4090") or architecture ("sm_90", "gfx942") to plan for, with or
            without maker and separators. By default the tensors' GPU, or nvidia_h200 where there is none.

    Returns:
        A Plan: `fprop`, `dgrad` and `wgrad` with algorithm, configuration, source, reason, FLOPs, bytes and floor.
        print() shows it, and how far trials are (`set_trials`).

    Raises: what triton_conv raises for the same call; ValueError for an unknown target, TypeError for one that is no
        string. Source: own derivation.
    """
    tensors = input, weight, bias, residual
    if has_torch_function_variadic(*tensors) and torch_private.overrides_are_on():
        return handle_torch_function(
            explain, tensors, input, weight, bias, stride, padding, dilation, groups, activation=activation,
            residual=residual, shuffle_groups=shuffle_groups, backend=backend, target=target,
        )  # fmt: skip
    check_backend(backend, "explain")
    if not isinstance(target, (str, type(None))):
        raise TypeError(f"explain: target is {target!r}, but must be a string or None")
    if not are_tensors(input, weight, bias):
        native.conv2d(input, weight, bias, stride, padding, dilation, groups)  # raises
    x, w, b = autocast(input, weight, bias)
    x = x.unsqueeze(0) if x.dim() == 3 else x
    args = normalise(x.shape, w.shape, stride, padding, dilation, groups)
    if args is None or not consistent(x, w, b):
        native.conv2d(input, weight, bias, stride, padding, dilation, groups)
        raise NotImplementedError("explain: F.conv2d takes this call, but no plan describes it")
    # A named target is planned for wherever the tensors are.
    why_not = prepared.refusal(x, backend) if target is None else prepared.unsupported(x)
    plan = dispatch.plan(
        prepared.make_problem(x, w, b is not None, args),
        devices.named(target) if target is not None else prepared.target_of(x.device),
        backend,
        why_not,
    )
    if target is None and x.device.type == "cuda":
        plan.notes.update(trial.notes(plan))
    if activation is not None or residual is not None or shuffle_groups != 1:
        told = epilogue.told(plan, input, w, b, activation, residual, shuffle_groups)
        if "fprop" in plan.notes and not trial.why_off():
            told = f"torch's functions follow so long, and afterwards: {told}"
        plan.notes["fprop"] = "; ".join([*filter(None, [plan.notes.get("fprop")]), told])
    return plan
