"""The parts of the model that compute in fp32 while the rest computes in bf16."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn


def in_fp32(x: torch.Tensor) -> AbstractContextManager:
    """No mixed precision on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False)


class LastInFp32(nn.Conv2d):
    """A 1x1 convolution to one channel, in fp32.

    As a sum: a matrix product's rounding depends on the number of threads, on some CPUs.
    """

    bias: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with in_fp32(x):
            return (x.float() * self.weight).sum(1, keepdim=True) + self.bias


class _DepthwiseInFp32(nn.Conv2d):
    """A depthwise convolution that learns in fp32 on a CPU: its backward pass in bf16 takes two to four times as long."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
            return super().forward(x)
        with in_fp32(x):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))


def train_depthwise_in_fp32(model: nn.Module) -> None:
    """Let the depthwise convolutions of a model learn in fp32 on a CPU.

    Each gets a subclass of its own class, as ``torch.nn.utils.parametrize`` gives: timm's convolutions pad in their own
    ways, and the names of the parameters stay.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            kind = type(module)
            module.__class__ = type(kind.__name__, (_DepthwiseInFp32, kind), {})
