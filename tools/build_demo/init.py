"""Initial weights with which group normalisation works in a narrow network.

With two or three channels a group (32 groups on 64 or 96 channels) normalisation removes the level of a flat image: of
a plain background only a sign would remain. Constants of opposite sign inside each group, large against the features,
keep the group's variance nearly fixed, so that the norm acts as a fixed scale: `(K + a, -K + b) -> +-(a - b) / 2`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CONSTANT = 4.0


def _offsets(channels: int, groups: int) -> Tensor:
    """(channels,) constants from -K to K inside each group, zero mean, root mean square K."""
    ramp = torch.linspace(-1, 1, channels // groups)
    return (CONSTANT * ramp / ramp.square().mean().sqrt()).repeat(groups)


@torch.no_grad()
def level_keeping_init(network: nn.Module, forward: Callable[[], object], groups: int = 32) -> None:
    """Sets the constants in every convolution before a norm, calibrated by one call of `forward`.

    Convolutions whose output is added to such a stream (`conv2`, but not shortcuts) and the last one do not change.

    Args:
        forward: Runs `network` on a calibration batch.
        groups: Of the norms.
    """
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.GroupNorm):
            offsets = _offsets(module.num_channels, groups)
            module.weight.fill_(CONSTANT)
            module.bias.copy_(-offsets)
        feeds_norm = name.endswith(("conv_in", "conv1", ".conv", "conv_shortcut"))
        if isinstance(module, nn.Conv2d) and feeds_norm and module.out_channels % groups == 0:
            handles.append(module.register_forward_hook(_calibrate(groups)))
    forward()
    for handle in handles:
        handle.remove()


def _calibrate(groups: int):
    """A forward hook that rescales a convolution to unit deviation over the batch, with the constants as means."""

    def hook(module: nn.Conv2d, inputs: tuple, output: Tensor) -> Tensor:
        mean = output.mean((0, 2, 3), keepdim=True)
        gain = 1 / (output - mean).square().mean().sqrt().clamp(min=1e-3)
        offsets = _offsets(module.out_channels, groups)
        module.bias.copy_(offsets - gain * (mean.flatten() - module.bias))
        module.weight *= gain
        return (output - mean) * gain + offsets[:, None, None]

    return hook


@torch.no_grad()
def add_border_markers(unet: nn.Module) -> None:
    """Writes channels for "not the first row" and "not the first column" into the residual streams of levels 2 and 3.

    A convolution can sense its position only from zero padding, and weakly: without these channels of -2 and 2, words
    of position had no effect after 2000 steps. They come from a constant channel at the padding of each downsampling
    convolution.
    """
    first, second, third = unet.down_blocks
    constant = 62
    _silence(unet.conv_in, constant, bias=1.0)
    _silence_residuals(first, [constant])
    _mark(first.downsamplers[0].conv, constant, [60, 61, 62])
    _silence_residuals(second, [93, 94, 95])
    shortcut = second.resnets[0].conv_shortcut
    for source, target in zip([60, 61, 62], [93, 94, 95], strict=True):
        _silence(shortcut, target)
        shortcut.weight[target, source] = 1
    _mark(second.downsamplers[0].conv, 95, [93, 94, 95])
    _silence_residuals(third, [93, 94, 95])


def _silence(module: nn.Module, channel: int, bias: float = 0.0) -> None:
    module.weight[channel] = 0
    module.bias[channel] = bias


def _silence_residuals(block: nn.Module, channels: list[int]) -> None:
    for channel in channels:
        _silence(block.resnets[0].conv2, channel)
        for attention in getattr(block, "attentions", []):
            _silence(attention.proj_out, channel)


def _mark(conv: nn.Conv2d, constant: int, channels: list[int]) -> None:
    """Sets three output channels from a constant input: -2 in the first row and 2 below, the same by column, and 1."""
    row, column, one = channels
    _silence(conv, row, bias=-2.0)
    conv.weight[row, constant, 0, 1] = 4
    _silence(conv, column, bias=-2.0)
    conv.weight[column, constant, 1, 0] = 4
    _silence(conv, one, bias=1.0)
