"""Forensic front ends: what high-pass filters leave of an image, as input channels beside RGB.

They are small differences of large numbers, so they are computed in fp32 also where the network computes in bf16.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Three high-pass kernels of the spatial rich model (Fridrich and Kodovsky, IEEE TIFS 2012), the ones that Zhou et al.
# (CVPR 2018) chose for manipulation detection: second order, square 5x5, and horizontal second derivative.
_SRM = (
    ([[0, 0, 0, 0, 0], [0, -1, 2, -1, 0], [0, 2, -4, 2, 0], [0, -1, 2, -1, 0], [0, 0, 0, 0, 0]], 4),
    ([[-1, 2, -2, 2, -1], [2, -6, 8, -6, 2], [-2, 8, -12, 8, -2], [2, -6, 8, -6, 2], [-1, 2, -2, 2, -1]], 12),
    ([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, -2, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], 2),
)
RESIDUAL_SCALE = 20.0  # residuals of photographs lie around a few grey levels; this brings them near unit variance
RESIDUAL_LIMIT = 3.0
SIXTEENTHS = 255 * 16  # of a grey level from black to white: 8-bit images have whole levels, blends of two have not


def _limited(residual: torch.Tensor) -> torch.Tensor:
    return (residual * RESIDUAL_SCALE).clamp(-RESIDUAL_LIMIT, RESIDUAL_LIMIT)


class _Filters(nn.Module):
    """What filters each colour with its share of 5x5 kernels, in fp32.

    Models whose state was saved as version 1 have learned from residuals in the precision of the network, and keep it.
    """

    _version = 2

    def filtered(self, x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """``(N, 3, H, W)`` and kernels ``(9, 1, 5, 5)`` to ``(N, 9, H, W)``, the borders reflected."""
        with nullcontext() if self._version == 1 else torch.autocast(x.device.type, enabled=False):
            return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernels.to(x.dtype), groups=3)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *rest: Any) -> None:
        self._version = local_metadata.get("version", 1)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class NoiseResidual(_Filters):
    """RGB ``(N, 3, H, W)`` in [0, 1] to SRM residuals ``(N, 9, H, W)`` in [-3, 3]; not trained.

    Whole kernels meet whole sixteenths of grey levels, so that sums are exact on any device; scales divide them at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        kernels = torch.tensor([kernel for kernel, _ in _SRM], dtype=torch.float32)
        scales = torch.tensor([scale for _, scale in _SRM], dtype=torch.float32)
        self.register_buffer("weight", kernels[:, None].repeat(3, 1, 1, 1), persistent=False)
        self.register_buffer("scale", scales.repeat(3).view(9, 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._version == 1:
            return _limited(self.filtered(x, self.weight / self.scale))
        sums = self.filtered((x * SIXTEENTHS).round(), self.weight)
        return _limited(sums / (SIXTEENTHS * self.scale.view(9, 1, 1)))


class NeighbourResidual(nn.Module):
    """RGB ``(N, 3, H, W)`` in [0, 1] to neighbouring-pixel relations ``(N, 3, H, W)`` in [-3, 3]; not trained.

    What an image differs by from its half, doubled by its nearest pixels (NPR: Tan et al., CVPR 2024): generators'
    upsampling relates neighbours in ways that cameras do not.  H and W must be even.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = x[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2)
        return _limited(x - doubled)


class ConstrainedConvolution(_Filters):
    """RGB ``(N, 3, H, W)`` in [0, 1] to learned prediction errors ``(N, 9, H, W)`` in [-3, 3].

    Each 5x5 filter predicts a pixel from its neighbours and takes the pixel away: its centre is -1 and the others sum
    to 1 (Bayar and Stamm, IEEE TIFS 2018).
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(9, 1, 5, 5))
        centre = torch.zeros(1, 1, 5, 5)
        centre[..., 2, 2] = 1
        self.register_buffer("centre", centre, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        around = self.weight * (1 - self.centre)
        total = around.sum((2, 3), keepdim=True)
        kernels = around / torch.where(total.abs() < 1e-3, torch.full_like(total, 1e-3), total) - self.centre
        return _limited(self.filtered(x, kernels))


# Per front end: what makes the channels beside RGB, and how many they are
FRONTENDS: dict[str, tuple[type[nn.Module], int]] = {
    "srm": (NoiseResidual, 9),
    "npr": (NeighbourResidual, 3),
    "bayar": (ConstrainedConvolution, 9),
}
