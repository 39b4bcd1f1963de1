"""What training minimises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup

from forensics_lib.params import Params


def make_mixup(params: Params, task: str) -> Mixup | None:
    """Blends of two images with blended labels (Zhang et al. 2018; cutmix: Yun et al. 2019), for Task A."""
    if task == "B" or not (params.mixup or params.cutmix):
        return None
    return Mixup(params.mixup, params.cutmix, label_smoothing=params.label_smoothing, num_classes=2, mode="elem")


def mask_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy plus Dice (Milletari et al., 3DV 2016); ``(N, 1, H, W)`` logits and bool masks to a scalar.

    Dice is taken over images that have manipulated pixels: on authentic ones cross-entropy alone keeps the mask empty.
    """
    target = masks.float()
    loss = F.binary_cross_entropy_with_logits(logits, target)
    marked = masks.flatten(1).any(1)
    if marked.any():
        probs, target = logits[marked].sigmoid().flatten(1), target[marked].flatten(1)
        overlap = 2 * (probs * target).sum(1) / (probs.sum(1) + target.sum(1)).clamp_min(1e-6)
        loss = loss + (1 - overlap).mean()
    return loss
