"""Predictions of trained models: probabilities from several native crops, full-size masks from overlapping tiles."""

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
from forensics_lib.device import DeviceMemoryError, Machine, choose_machine, memory_of
from forensics_lib.images.masks import written_mask
from forensics_lib.inference.probabilities import sigmoid
from forensics_lib.models.combined import CombinedModel, Output
from forensics_lib.params import Params
from forensics_lib.utils.progress import progress


def inference_settings(params: Params, task: str) -> dict[str, Any]:
    """The parameters of inference and this machine's precision, which are stored beside thresholds."""
    return {"inference": params.of_prediction(task), "precision": choose_machine(params).precision}


@dataclass
class Prediction:
    """The prediction for one image.

    ``prob`` is in [0, 1], or NaN: with the reason in ``error`` where the image could not be read, without one where the
    model is broken (see ``check_finite``).
    """

    index: int
    prob: float
    error: str | None = None
    mask: np.ndarray | None = None  # Task B: (H, W) float16 in [0, 1]
    margins: list[float] | None = None  # Task A: the logit margin of each of ``chosen_crops``


def predict_probabilities(
    model: CombinedModel,
    rows: pd.DataFrame,
    params: Params,
    machine: Machine,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    title: str = "probabilities",
) -> Iterator[Prediction]:
    """Task A: the probability of being synthetic, from up to ``crops_per_image`` native crops of each image.

    It is the sigmoid of the mean logit margin of the crops.  Crops of several images share a batch, and all batches have
    one size, so that the result of an image does not depend on what else is in its batch.

    Args:
        model: a model of Task A.
        rows: one row per image with its ``path``, or its ``content``.
        params: crop_size and crops_per_image are used.
        machine: from ``choose_machine``.
        change: applied to each image ``(H, W, 3)`` uint8 first.
        title: of the progress display.

    Returns:
        Iterator over the predictions, in row order.
    """
    model = model.to(machine.device).to(memory_format=torch.channels_last).eval()
    dataset = InferenceImages(rows, crop_size=params.crop_size, crops=params.crops_per_image, change=change)
    size = machine.images_at_once(params.crop_size**2)
    waiting: deque[tuple[Prediction, int, list[float]]] = deque()  # images in order: prediction, crops, margins so far
    crops: deque[tuple[list[float], torch.Tensor]] = deque()
    for sample in progress(stream(dataset, machine.workers), title, total=len(rows)):
        # copied, since each tensor of a loader process keeps a file open as long as it lives
        chosen = sample["crops"].clone() if "crops" in sample else ()
        margins: list[float] = []
        waiting.append((Prediction(sample["index"], float("nan"), sample.get("error")), len(chosen), margins))
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
        logits = output_in_parts(model, machine.to_device(batch)).logits.float()
    for (margins, _), margin in zip(crops, (logits[:, 1] - logits[:, 0]).tolist(), strict=False):
        margins.append(margin)


def output_in_parts(forward: Callable[[torch.Tensor], Output], images: torch.Tensor) -> Output:
    """Model output for a batch; in halves, and these in halves, where a GPU's memory does not suffice for it.

    Raises ``DeviceMemoryError`` where it does not suffice for one image.
    """
    try:
        return forward(images)
    except torch.OutOfMemoryError:
        if len(images) == 1:
            size = f"one image or tile of {images.shape[2]} x {images.shape[3]} pixels"
            raise DeviceMemoryError(
                f"{size} does not fit into {memory_of(images.device)}: halve tile_size, end other programs that use the GPU, "
                "or set device: cpu"
            ) from None
    if images.is_cuda:  # after the exception, which holds what it was raised over
        torch.cuda.empty_cache()
    logits, masks, features = zip(*(output_in_parts(forward, part) for part in images.tensor_split(2)), strict=True)
    return Output(torch.cat(logits), None if masks[0] is None else torch.cat(masks), torch.cat(features))


def _complete(waiting: deque[tuple[Prediction, int, list[float]]]) -> Iterator[Prediction]:
    """Take the first images from the queue whose crops all have their margins."""
    while waiting and len(waiting[0][2]) == waiting[0][1]:
        prediction, count, margins = waiting.popleft()
        yield replace(prediction, prob=sigmoid(float(np.mean(margins))), margins=margins) if count else prediction


def predict_masks(
    model: CombinedModel,
    rows: pd.DataFrame,
    params: Params,
    machine: Machine,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    title: str = "masks",
) -> Iterator[Prediction]:
    """Task B: the probability of being manipulated and the full-size mask of each image, by ``predict_mask``.

    Args:
        model: a model of Task B.
        rows: one row per image with its ``path``, or its ``content``.
        params: tile_size, mask_scales and mask_flips are used.
        machine: from ``choose_machine``.
        change: applied to each image ``(H, W, 3)`` uint8 first; the mask has the size of its result.
        title: of the progress display.

    Returns:
        Iterator over the predictions, in row order.
    """
    model = model.to(machine.device).to(memory_format=torch.channels_last).eval()
    for sample in progress(stream(InferenceImages(rows, change=change), machine.workers), title, total=len(rows)):
        if "error" in sample:
            yield Prediction(sample["index"], float("nan"), sample["error"])
        else:
            prob, mask = predict_mask(model, np.asarray(sample["image"]), params, machine)
            yield Prediction(sample["index"], prob if np.isfinite(mask).all() else float("nan"), mask=mask)


@torch.inference_mode()
def predict_mask(model: CombinedModel, image: np.ndarray, params: Params, machine: Machine) -> tuple[float, np.ndarray]:
    """Task B's prediction for one image.

    An image of at most ``tile_size`` on both sides is processed whole, a larger one in overlapping tiles whose masks are
    blended with weights that fall off linearly in the overlap.  Masks of the mirrored image (``mask_flips``) and of other
    scales (``mask_scales``) are averaged.  The classifier then gets the whole mask and the mean features of all tiles.
    Beside the image the memory needed is one float32 mask for each scale but the first, one float16 mask, and a batch of
    tiles.

    Args:
        model: a model of Task B, on the machine's device and in evaluation mode.
        image: ``(H, W, 3)`` uint8 RGB.
        params: tile_size, mask_scales and mask_flips are used.
        machine: from ``choose_machine``.

    Returns:
        The probability of being manipulated (not calibrated), and the mask ``(H, W)`` float16 in [0, 1].
    """
    scales = used_scales(params, image.shape[:2])
    total, features = mask_at_scale(model, image, scales[0], params, machine)
    for scale in scales[1:]:
        mask, more_features = mask_at_scale(model, image, scale, params, machine)
        total += mask
        features += more_features
    total /= len(scales)
    np.clip(total, 0, 1, out=total)
    with machine.autocast():
        whole_mask = torch.from_numpy(total)[None, None].to(machine.device)
        logits = model.classify(torch.stack(features).mean(0, keepdim=True), whole_mask).float()
    return logits.softmax(1)[0, 1].item(), written_mask(total)


def used_scales(params: Params, shape: tuple[int, int]) -> list[float]:
    """The scales at which an image is looked at: of a pyramid, halves as long as the longer side has ``crop_size`` pixels."""
    if params.mask_scales != "pyramid":
        return params.mask_scales
    return [0.5**level for level in range(1 + max(0, int(np.log2(max(shape) / params.crop_size))))]


@torch.inference_mode()
def mask_at_scale(
    model: CombinedModel, image: np.ndarray, scale: float, params: Params, machine: Machine
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """The mask ``(H, W)`` float32 of an image that is processed at another scale, and the features of the tiles."""
    mask, features = _blended_mask(model, at_scale(image, scale), params, machine)
    if mask.shape != image.shape[:2]:
        mask = np.array(Image.fromarray(mask).resize(image.shape[1::-1], Image.Resampling.BILINEAR))
    return mask, features


def at_scale(image: np.ndarray, scale: float) -> np.ndarray:
    """An image ``(H, W, 3)`` uint8 as the model sees it at one of ``used_scales``."""
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in (image.shape[1], image.shape[0])]
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _blended_mask(
    model: CombinedModel, image: np.ndarray, params: Params, machine: Machine
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """The mask ``(H, W)`` float32 of an image from its tiles, and the features of these."""
    height, width = image.shape[:2]
    tile, overlap = params.tile_size, params.tile_overlap
    tile_h, tile_w = min(tile, height), min(tile, width)
    tops, lefts = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    weight_y, weight_x = _weights(tile_h, overlap), _weights(tile_w, overlap)
    total, features = np.zeros((height, width), np.float32), []
    places = [(top, left) for top in tops for left in lefts]
    per_batch = machine.images_at_once(tile_h * tile_w)
    for start in range(0, len(places), per_batch):
        batch = places[start : start + per_batch]
        tiles = np.stack([image[y : y + tile_h, x : x + tile_w] for y, x in batch]).transpose(0, 3, 1, 2)
        full = tiles.shape == (per_batch, 3, tile, tile)
        probs, of_tiles = _tile_probs(model, tiles, machine, params.mask_flips, full)
        features += of_tiles
        for (y, x), prob in zip(batch, probs, strict=True):
            total[y : y + tile_h, x : x + tile_w] += prob * (weight_y[:, None] * weight_x)
    total /= _weight_sum(tops, weight_y, height)[:, None]
    total /= _weight_sum(lefts, weight_x, width)
    return total, features


def _tile_probs(
    model: CombinedModel, tiles: np.ndarray, machine: Machine, flips: bool, full: bool
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Mask probabilities ``(N, H, W)`` of tiles ``(N, 3, H, W)`` uint8, and the features of each tile and view.

    A compiled model is compiled for ``full`` batches of whole tiles: others go through its plain ``forward``.
    """
    forward = model if full else model.forward
    images = machine.to_device(torch.from_numpy(np.ascontiguousarray(tiles)))
    views = (False, True) if flips else (False,)
    probs = torch.zeros(len(tiles), *tiles.shape[2:], device=machine.device)
    features: list[torch.Tensor] = []
    for flipped in views:
        with machine.autocast():
            output = output_in_parts(forward, images.flip(-1) if flipped else images)
        if output.mask_logits is None:
            raise ValueError("masks need a model of Task B")
        found = output.mask_logits.float().sigmoid()[:, 0]
        probs += (found.flip(-1) if flipped else found) / len(views)
        features += output.features.float().unbind()
    return probs.cpu().numpy(), features


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: evenly spaced, overlapping by at least ``overlap``, the last one ends at ``length``."""
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
