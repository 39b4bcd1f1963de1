"""Noise residuals: high-pass filtered images as input channels beside RGB.

They are small differences of large numbers, so they are computed in fp32 also where the network computes in bf16.
"""

from __future__ import annotations

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
RESIDUAL_SCALE = 20.0  # brings residuals of photographs, a few grey levels, near unit variance
RESIDUAL_LIMIT = 3.0
SIXTEENTHS = 255 * 16  # of a grey level from black to white: 8-bit images have integer levels, blends of two have not


RESIDUAL_CHANNELS = 9  # three kernels for each of three colours


class NoiseResidual(nn.Module):
    """RGB ``(N, 3, H, W)`` in [0, 1] to SRM residuals ``(N, 9, H, W)`` in [-3, 3], in fp32; not trained.

    Integer kernels are applied to integer sixteenths of grey levels, so that sums are exact on any device; scales divide
    them at the end.  Models saved with version 1 of this module were trained on residuals in the network's precision, and
    keep it.
    """

    _version = 2
    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        kernels = torch.tensor([kernel for kernel, _ in _SRM], dtype=torch.float32)
        scales = torch.tensor([scale for _, scale in _SRM], dtype=torch.float32)
        self.register_buffer("weight", kernels[:, None].repeat(3, 1, 1, 1), persistent=False)
        self.register_buffer("scale", scales.repeat(3).view(9, 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._version == 1:
            residual = _filtered(x, self.weight / self.scale)
        else:
            with torch.autocast(x.device.type, enabled=False):
                sums = _filtered((x * SIXTEENTHS).round_(), self.weight)
            residual = sums.div_(SIXTEENTHS * self.scale.view(9, 1, 1))
        return residual.mul_(RESIDUAL_SCALE).clamp_(-RESIDUAL_LIMIT, RESIDUAL_LIMIT)  # in place: half the time

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *rest: Any) -> None:
        self._version = local_metadata.get("version", 1)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _filtered(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """``(N, 3, H, W)`` and kernels ``(9, 1, 5, 5)`` to ``(N, 9, H, W)``, reflection padded; sides under 3 repeat."""
    mode = "reflect" if min(x.shape[-2:]) > 2 else "replicate"
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode=mode), kernels.to(x.dtype), groups=3)
