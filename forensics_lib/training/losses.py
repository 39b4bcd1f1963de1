"""What training minimises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup

from forensics_lib.params import Params

BORDER = 3  # pixels on either side of an edge
FOCAL_GAMMA = 2.0
FOCAL_SCALE = 4.0  # brings the focal loss of an undecided pixel back to its cross-entropy's size


def make_mixup(params: Params, task: str) -> Mixup | None:
    """Blends of two images with blended labels (Zhang et al. 2018; cutmix: Yun et al. 2019), for Task A."""
    if task == "B" or not (params.mixup or params.cutmix):
        return None
    return Mixup(params.mixup, params.cutmix, label_smoothing=params.label_smoothing, num_classes=2, mode="elem")


def mask_loss(
    logits: torch.Tensor,
    masks: torch.Tensor,
    kind: str = "bce_dice",
    boundary_weight: float = 0.0,
    authentic_weight: float = 1.0,
) -> torch.Tensor:
    """A loss of each pixel plus a loss of each region; ``(N, 1, H, W)`` logits and bool masks to a scalar.

    ``bce_dice``: cross-entropy and Dice (Milletari et al., 3DV 2016); ``focal_dice``: cross-entropy that counts what is
    already right less (Lin et al., ICCV 2017), and Dice; ``bce_lovasz``: cross-entropy and the Lovász hinge, a surrogate of
    IoU (Berman et al., CVPR 2018).  Losses of regions are taken over images that have manipulated pixels: on authentic
    ones the loss of pixels alone keeps the mask empty, and counts ``authentic_weight`` times.  Pixels within ``BORDER`` of
    a region's edge weigh ``1 + boundary_weight``.
    """
    target, marked = masks.float(), masks.flatten(1).any(1)
    pixels = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if kind == "focal_dice":
        pixels = pixels * FOCAL_SCALE * (1 - torch.exp(-pixels)) ** FOCAL_GAMMA
    pixels = pixels * torch.where(marked, 1.0, authentic_weight).view(-1, 1, 1, 1)
    if boundary_weight:
        weights = 1 + boundary_weight * near_border(target)
        loss = (pixels * weights).sum() / weights.sum()
    else:
        loss = pixels.mean()
    if not marked.any():
        return loss
    of_regions = _lovasz_hinge if kind == "bce_lovasz" else _dice
    return loss + of_regions(logits[marked].flatten(1), target[marked].flatten(1))


def near_border(target: torch.Tensor) -> torch.Tensor:
    """1 within ``BORDER`` pixels of a mask's edge, else 0; ``(N, 1, H, W)`` floats of 0 and 1 to the same."""
    size = 2 * BORDER + 1
    widest, narrowest = (F.max_pool2d(x, size, 1, BORDER) for x in (target, 1 - target))
    return widest * narrowest


def _dice(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 less the mean Dice coefficient of ``(N, P)`` logits and targets."""
    probs = logits.sigmoid()
    overlap = 2 * (probs * target).sum(1) / (probs.sum(1) + target.sum(1)).clamp_min(1e-6)
    return (1 - overlap).mean()


def _lovasz_hinge(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The Lovász extension of 1 - IoU at the hinge errors of ``(N, P)`` logits and targets, mean over N."""
    errors, order = (1 - logits * (2 * target - 1)).sort(1, descending=True)
    sorted_target = target.gather(1, order)
    positives = sorted_target.sum(1, keepdim=True)
    missed = positives - sorted_target.cumsum(1)
    union = positives + (1 - sorted_target).cumsum(1)
    jaccard = 1 - missed / union
    gradient = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)
    return (errors.relu() * gradient).sum(1).mean()
