"""Training losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mask_loss(logits: torch.Tensor, masks: torch.Tensor, authentic_weight: float = 1.0) -> torch.Tensor:
    """Binary cross-entropy of pixels plus Dice loss of regions (Milletari et al., 3DV 2016).

    The Dice loss is averaged over images that have manipulated pixels: on authentic ones the cross-entropy alone keeps the
    mask empty.

    Args:
        logits: mask logits, ``(N, 1, H, W)`` float.
        masks: true masks, ``(N, 1, H, W)`` bool, True where manipulated.
        authentic_weight: factor of the cross-entropy of authentic images.

    Returns:
        The loss, a scalar.
    """
    target, manipulated = masks.float(), masks.flatten(1).any(1)
    pixels = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = (pixels * torch.where(manipulated, 1.0, authentic_weight).view(-1, 1, 1, 1)).mean()
    if not manipulated.any():
        return loss
    return loss + _dice_loss(logits[manipulated].flatten(1), target[manipulated].flatten(1))


def _dice_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 minus the mean Dice coefficient of ``(N, P)`` logits and targets."""
    probs = logits.sigmoid()
    overlap = 2 * (probs * target).sum(1) / (probs.sum(1) + target.sum(1)).clamp_min(1e-6)
    return (1 - overlap).mean()
