"""Trained models on images: probabilities from several native crops, masks from overlapping tiles at the image's size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from forensics_lib.data.datasets import InferenceImages, stream
from forensics_lib.device import Machine, choose_machine
from forensics_lib.images.masks import written_mask
from forensics_lib.inference.probabilities import sigmoid
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params
from forensics_lib.utils.progress import progress


def inference_settings(params: Params, task: str) -> dict[str, Any]:
    """What predictions are made with, to be kept beside thresholds: parameters of inference, and this machine's precision."""
    return {"inference": params.of_prediction(task), "precision": choose_machine(params).precision}


@dataclass
class ProbPrediction:
    """Task A's answer for one image: ``prob`` in [0, 1]; NaN where it could not be read for the reason in ``error``.

    NaN without an error is a broken model's answer, see ``check_finite``; so it is in ``MaskPrediction``.
    """

    index: int
    prob: float
    error: str | None = None


def predict_probabilities(
    model: CombinedModel,
    rows: pd.DataFrame,
    params: Params,
    machine: Machine,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    title: str = "probabilities",
) -> Iterator[ProbPrediction]:
    """Task A: the probability of being synthetic for each row's ``path``, one after the other in row order.

    Each image gives up to ``crops_per_image`` native crops; its probability is the sigmoid of their mean logit margin.
    Crops of several images share a batch.  All batches are of one size, so that an image's result does not depend on what
    else is in its batch.  ``change`` is done to each image first.
    """
    model = model.to(machine.device, memory_format=torch.channels_last).eval()
    dataset = InferenceImages(rows, crop_size=params.crop_size, crops=params.crops_per_image, change=change)
    size = machine.images_at_once(params.crop_size**2)
    waiting: deque[tuple[ProbPrediction, int, list[float]]] = deque()  # images in order: answer, crops, margins so far
    crops: deque[tuple[list[float], torch.Tensor]] = deque()
    for sample in progress(stream(dataset, machine.workers), title, total=len(rows)):
        # copied, since each tensor of a loader process keeps a file open as long as it lives
        chosen, margins = sample["crops"].clone() if "crops" in sample else (), []
        waiting.append((ProbPrediction(sample["index"], float("nan"), sample.get("error")), len(chosen), margins))
        crops.extend((margins, crop) for crop in chosen)
        while len(crops) >= size:
            _score([crops.popleft() for _ in range(size)], model, machine, size)
        yield from _complete(waiting)
    if crops:
        _score(list(crops), model, machine, size)
    yield from _complete(waiting)


@torch.inference_mode()
def _score(crops: list[tuple[list[float], torch.Tensor]], model: CombinedModel, machine: Machine, size: int) -> None:
    """Add the logit margin of each crop to the list that it comes with."""
    batch = torch.stack([crop for _, crop in crops])
    batch = torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])
    with machine.autocast():
        logits = model(machine.to_device(batch)).logits.float()
    for (margins, _), margin in zip(crops, (logits[:, 1] - logits[:, 0]).tolist(), strict=False):
        margins.append(margin)


def _complete(waiting: deque[tuple[ProbPrediction, int, list[float]]]) -> Iterator[ProbPrediction]:
    """The first images of the queue whose crops all have their margins."""
    while waiting and len(waiting[0][2]) == waiting[0][1]:
        prediction, count, margins = waiting.popleft()
        yield replace(prediction, prob=sigmoid(np.mean(margins))) if count else prediction


@dataclass
class MaskPrediction:
    """Task B's answer for one image; ``mask`` (H, W) float16 in [0, 1], or ``error`` where it could not be read."""

    index: int
    prob: float
    mask: np.ndarray | None
    error: str | None = None


def predict_masks(
    model: CombinedModel,
    rows: pd.DataFrame,
    params: Params,
    machine: Machine,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    title: str = "masks",
) -> Iterator[MaskPrediction]:
    """Task B: probability and full-size mask of each row's ``path``, one after the other in row order.

    ``change`` is done to each image first.
    """
    model = model.to(machine.device, memory_format=torch.channels_last).eval()
    for sample in progress(stream(InferenceImages(rows, change=change), machine.workers), title, total=len(rows)):
        if "error" in sample:
            yield MaskPrediction(sample["index"], float("nan"), None, sample["error"])
        else:
            prob, mask = predict_mask(model, np.asarray(sample["image"]), params, machine)
            yield MaskPrediction(sample["index"], prob if np.isfinite(mask).all() else float("nan"), mask)


@torch.inference_mode()
def predict_mask(model: CombinedModel, image: np.ndarray, params: Params, machine: Machine) -> tuple[float, np.ndarray]:
    """Probability of being manipulated, and mask ``(H, W)`` float16 in [0, 1], of one ``(H, W, 3)`` uint8 image.

    An image of at most ``tile_size`` on both sides goes through whole.  A larger one is cut into overlapping tiles whose
    masks are blended with weights that fall off linearly in the overlap.  With ``mask_flips`` the mirrored image is looked
    at too, with ``mask_scales`` the image at those scales, and masks are averaged.  The classifier then sees the whole
    mask and the mean features of all tiles.  Beside the image the memory needed is that of one float32 mask for each
    scale but the first, one float16 mask, and a batch of tiles.
    """
    height, width = image.shape[:2]
    features: list[torch.Tensor] = []
    total: np.ndarray | None = None
    for scale in params.mask_scales:
        mask = _blended_mask(model, _scaled(image, scale), params, machine, features)
        if mask.shape != (height, width):
            mask = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))
        total = mask if total is None else np.add(total, mask, out=total)
    total /= len(params.mask_scales)
    np.clip(total, 0, 1, out=total)
    with machine.autocast():
        whole_mask = torch.from_numpy(total)[None, None].to(machine.device)
        logits = model.classify(torch.stack(features).mean(0, keepdim=True), whole_mask).float()
    return logits.softmax(1)[0, 1].item(), written_mask(total)


def _scaled(image: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in (image.shape[1], image.shape[0])]
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _blended_mask(
    model: CombinedModel, image: np.ndarray, params: Params, machine: Machine, features: list[torch.Tensor]
) -> np.ndarray:
    """The mask ``(H, W)`` float32 of an image from its tiles, whose pooled features are added to ``features``."""
    height, width = image.shape[:2]
    tile = params.tile_size
    tile_h, tile_w = min(tile, height), min(tile, width)
    tops, lefts = (tile_starts(side, tile, params.tile_overlap) for side in (height, width))
    weight_y, weight_x = _weights(tile_h, params.tile_overlap), _weights(tile_w, params.tile_overlap)
    total = np.zeros((height, width), np.float32)
    places = [(top, left) for top in tops for left in lefts]
    views = 2 if params.mask_flips else 1
    per_batch = machine.images_at_once(tile_h * tile_w)
    for start in range(0, len(places), per_batch):
        batch = places[start : start + per_batch]
        tiles = np.stack([image[y : y + tile_h, x : x + tile_w] for y, x in batch]).transpose(0, 3, 1, 2)
        tensor = machine.to_device(torch.from_numpy(np.ascontiguousarray(tiles)))
        probs = torch.zeros(len(batch), tile_h, tile_w, device=machine.device)
        for flipped in (False, True)[:views]:
            with machine.autocast():
                # a compiled model is compiled for full batches of whole tiles, other shapes run as they are
                run = model if tensor.shape == (per_batch, 3, tile, tile) else model.forward
                output = run(tensor.flip(-1) if flipped else tensor)
            found = output.mask_logits.float().sigmoid()[:, 0]
            probs += (found.flip(-1) if flipped else found) / views
            features += output.features.float().unbind()
        for (y, x), prob in zip(batch, probs.cpu().numpy(), strict=True):
            total[y : y + tile_h, x : x + tile_w] += prob * (weight_y[:, None] * weight_x)
    total /= _weight_sum(tops, weight_y, height)[:, None]
    total /= _weight_sum(lefts, weight_x, width)
    return total


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of a side begin: evenly spaced, overlapping by at least ``overlap``, the last ends at ``length``."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _weights(length: int, overlap: int) -> np.ndarray:
    """1 inside, falling linearly to nearly 0 over ``overlap`` pixels at both ends; ``(length,)`` float32."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
    return np.minimum(distance / (min(overlap, length // 2) + 1), 1).astype(np.float32)


def _weight_sum(starts: list[int], weights: np.ndarray, length: int) -> np.ndarray:
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + len(weights)] += weights
    return total
