"""Training losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mask_loss(logits: torch.Tensor, masks: torch.Tensor, authentic_weight: float = 1.0) -> torch.Tensor:
    """Binary cross-entropy of pixels plus Dice loss of regions (Milletari et al., 3DV 2016).

    Logits ``(N, 1, H, W)`` float, masks of this shape bool, True where manipulated.  The Dice loss is averaged over images that
    have manipulated pixels: on authentic ones the cross-entropy, times ``authentic_weight``, alone keeps the mask empty.
    No value is read, for which a GPU would have to be waited for.
    """
    target, manipulated = masks.float(), masks.flatten(1).any(1)
    pixels = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = (pixels * torch.where(manipulated, 1.0, authentic_weight).view(-1, 1, 1, 1)).mean()
    probs, target = logits.flatten(1).sigmoid(), target.flatten(1)
    dice = 2 * (probs * target).sum(1) / (probs.sum(1) + target.sum(1)).clamp_min(1e-6)
    return loss + (manipulated * (1 - dice)).sum() / manipulated.sum().clamp_min(1)
