"""Forensic front ends: what high-pass filters leave of an image, as input channels beside RGB."""

from __future__ import annotations

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


def _limited(residual: torch.Tensor) -> torch.Tensor:
    return (residual * RESIDUAL_SCALE).clamp(-RESIDUAL_LIMIT, RESIDUAL_LIMIT)


def _filtered(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Each colour through its share of the 5x5 ``kernels``, the borders reflected."""
    return _limited(F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernels.to(x.dtype), groups=3))


class NoiseResidual(nn.Module):
    """RGB ``(N, 3, H, W)`` in [0, 1] to SRM residuals ``(N, 9, H, W)`` in [-3, 3]; not trained."""

    def __init__(self) -> None:
        super().__init__()
        kernels = torch.tensor([[[value / scale for value in row] for row in kernel] for kernel, scale in _SRM])
        self.register_buffer("weight", kernels[:, None].repeat(3, 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _filtered(x, self.weight)


class NeighbourResidual(nn.Module):
    """RGB ``(N, 3, H, W)`` in [0, 1] to neighbouring-pixel relations ``(N, 3, H, W)`` in [-3, 3]; not trained.

    What an image differs by from its half, doubled by its nearest pixels (NPR: Tan et al., CVPR 2024): generators'
    upsampling relates neighbours in ways that cameras do not.  H and W must be even.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = x[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2)
        return _limited(x - doubled)


class ConstrainedConvolution(nn.Module):
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
        return _filtered(x, kernels)


# Per front end: what makes the channels beside RGB, and how many they are
FRONTENDS: dict[str, tuple[type[nn.Module], int]] = {
    "srm": (NoiseResidual, 9),
    "npr": (NeighbourResidual, 3),
    "bayar": (ConstrainedConvolution, 9),
}
