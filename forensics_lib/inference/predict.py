"""Predictions of trained models: probabilities from several native crops, full-size masks from overlapping tiles."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from forensics_lib.data.datasets import InferenceImages, stream
from forensics_lib.device import DeviceMemoryError, Machine, choose_machine, lost_device_is_told, memory_of
from forensics_lib.images.copies import copied_parts
from forensics_lib.images.crops import at_scale, to_tensor
from forensics_lib.images.masks import written_mask
from forensics_lib.inference.probabilities import sigmoid
from forensics_lib.models.combined import CombinedModel, Output
from forensics_lib.params import Params
from forensics_lib.utils.progress import progress

BROUGHT = ("detector", "ensemble")  # parameters of runs that train no model of their own
ADDED = {"copy_move": False}  # parameters that earlier versions had not, as they predicted
COPIED = 0.95  # probability of parts that an image holds twice: of authentic photographs, 1 in 200 seems to
WAITING_PIXELS = 2**25  # of images whose tiles wait for others to fill a batch, at most: their masks take four bytes each


def inference_settings(params: Params, task: str) -> dict[str, Any]:
    """The parameters of inference and this machine's precision, which are stored beside thresholds."""
    return {"inference": _settings(params, task), "precision": choose_machine(params).precision}


def _settings(params: Params, task: str) -> dict[str, Any]:
    return params.of_prediction(task) | {name: value for name in BROUGHT if (value := getattr(params, name))}


def other_settings(chosen: dict[str, Any], params: Params, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of inference that differ: as thresholds were ``chosen`` with, and as they are; empty where none does."""
    there = dict.fromkeys(BROUGHT) | ADDED | chosen
    wanted = dict.fromkeys(BROUGHT) | _settings(params, task)
    wanted |= {"tile_overlap": params.tile_overlap}  # which earlier versions could change
    here = {name: value for name, value in wanted.items() if name in there and there[name] != value}
    return {name: there[name] for name in here}, here


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
    whole_margins: list[float] | None = None  # and of ``whole_crops``, if there are any and the model sees images whole


def predict_probabilities(
    model: CombinedModel,
    rows: pd.DataFrame,
    params: Params,
    machine: Machine,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    title: str = "probabilities",
) -> Iterator[Prediction]:
    """Task A: the probability of being synthetic, from up to ``crops_per_image`` native crops of each image.

    It is the sigmoid of the mean logit margin of the crops; of a model that was trained on images seen whole, of the mean of
    this one and that of ``whole_crops``.  Crops of several images share a batch, and all batches have
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
    crops: dict[str, Any] = {"crop_size": params.crop_size, "crops": params.crops_per_image, "whole": model.sees_whole}
    dataset = InferenceImages(rows, change=change, **crops)
    batches = _Batches(partial(_margins, model, machine), machine.images_at_once(params.crop_size**2))
    waiting: deque[_Waiting] = deque()  # images in order
    for sample in progress(stream(dataset, machine), title, total=len(rows)):
        # copied, since each tensor of a loader process keeps a file open as long as it lives
        chosen = sample["crops"].clone() if "crops" in sample else ()
        image = _Waiting(Prediction(sample["index"], float("nan"), sample.get("error")), len(chosen), sample.get("native", 0))
        waiting.append(image)
        for crop in chosen:
            batches.add(crop, image.margins.append)
        yield from _complete(waiting)
    batches.flush()
    yield from _complete(waiting)


@dataclass
class _Waiting:
    """An image whose crops go through the model."""

    prediction: Prediction
    crops: int
    native: int  # of the crops, the first ones
    margins: list[float] = field(default_factory=list)  # so far

    def answer(self) -> Prediction:
        native, whole = self.margins[: self.native], self.margins[self.native :]
        if not native:
            return self.prediction
        margin = float(np.mean([np.mean(view) for view in (native, whole) if view]))
        return replace(self.prediction, prob=sigmoid(margin), margins=native, whole_margins=whole or None)


class _Batches:
    """Images of one size, of any files, that wait until they fill a batch, each with a function that takes its answer.

    All batches have ``size`` images, the last one padded with black ones, so that an answer does not depend on what shares
    its batch; ``answers`` gives one for each image of a batch ``(N, 3, H, W)`` uint8.
    """

    def __init__(self, answers: Callable[[torch.Tensor], list[Any]], size: int) -> None:
        self._answers, self._size = answers, size
        self._waiting: list[tuple[torch.Tensor, Callable[[Any], None]]] = []

    def add(self, image: torch.Tensor, take: Callable[[Any], None]) -> None:
        """Let an image wait for a full batch, which it may be the last one of."""
        self._waiting.append((image, take))
        if len(self._waiting) == self._size:
            self.flush()

    @lost_device_is_told()
    def flush(self) -> None:
        """Pass all that wait, as one batch."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            batch = torch.stack([image for image, _ in waiting])
            batch = torch.cat([batch, batch.new_zeros(self._size - len(batch), *batch.shape[1:])])
            for (_, take), answer in zip(waiting, self._answers(batch), strict=False):
                take(answer)


@torch.inference_mode()
def _margins(model: CombinedModel, machine: Machine, crops: torch.Tensor) -> list[float]:
    """The logit margin of each crop."""
    with machine.autocast():
        logits = output_in_parts(model, machine.to_device(crops)).logits.float()
    return (logits[:, 1] - logits[:, 0]).tolist()


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


def _complete(waiting: deque[_Waiting]) -> Iterator[Prediction]:
    """Take the first images from the queue whose crops all have their margins."""
    while waiting and len(waiting[0].margins) == waiting[0].crops:
        yield waiting.popleft().answer()


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
        params: tile_size, mask_scales, mask_flips and copy_move are used.
        machine: from ``choose_machine``.
        change: applied to each image ``(H, W, 3)`` uint8 first; the mask has the size of its result.
        title: of the progress display.

    Returns:
        Iterator over the predictions, in row order.
    """
    model = model.to(machine.device).to(memory_format=torch.channels_last).eval()
    tiles = _Tiles(model, params, machine)
    waiting: deque[tuple[Prediction, _TiledImage | None]] = deque()  # images in order
    images = InferenceImages(rows, change=change, copies=params.copy_move)
    for sample in progress(stream(images, machine), title, total=len(rows)):
        prediction = Prediction(sample["index"], float("nan"), sample.get("error"))
        copied = np.asarray(sample["copied"]) if "copied" in sample else None
        waiting.append((prediction, None if "error" in sample else tiles.of(np.asarray(sample["image"]), copied)))
        if sum(image.pixels for _, image in waiting if image) > WAITING_PIXELS:
            tiles.flush()
        yield from _complete_masks(waiting, tiles)
    tiles.flush()
    yield from _complete_masks(waiting, tiles)


def _complete_masks(waiting: deque[tuple[Prediction, _TiledImage | None]], tiles: _Tiles) -> Iterator[Prediction]:
    """Take the first images from the queue whose tiles have all been through the model."""
    while waiting and (waiting[0][1] is None or waiting[0][1].complete):
        yield _with_mask(*waiting.popleft(), tiles)  # of whose memory nothing is held here any longer


def _with_mask(prediction: Prediction, image: _TiledImage | None, tiles: _Tiles) -> Prediction:
    if image is None:
        return prediction
    prob, mask = tiles.result(image)
    return replace(prediction, prob=prob if np.isfinite(mask).all() else float("nan"), mask=mask)


def predict_mask(model: CombinedModel, image: np.ndarray, params: Params, machine: Machine) -> tuple[float, np.ndarray]:
    """Task B's prediction for one image.

    An image of at most ``tile_size`` on both sides is processed whole, a larger one in overlapping tiles whose masks are
    blended with weights that fall off linearly in the overlap.  Masks of the mirrored image (``mask_flips``) and of other
    scales (``mask_scales``) are averaged.  The classifier then gets the whole mask, and of earlier checkpoints the mean
    features of all tiles.  With ``copy_move``, parts that the image holds twice, and the image that does, are manipulated with
    a probability of at least ``COPIED``.  Beside the image the memory needed is two float32 masks, a smaller one for each
    further scale, and a batch of tiles.

    Args:
        model: a model of Task B, on the machine's device and in evaluation mode.
        image: ``(H, W, 3)`` uint8 RGB.
        params: tile_size, mask_scales, mask_flips and copy_move are used.
        machine: from ``choose_machine``.

    Returns:
        The probability of being manipulated (not calibrated), and the mask ``(H, W)`` float16 in [0, 1].
    """
    tiles = _Tiles(model, params, machine)
    tiled = tiles.of(image, copied_parts(image) if params.copy_move else None)
    tiles.flush()
    return tiles.result(tiled)


class _Tiles:
    """Passes the tiles of images through a model of Task B.

    Tiles of ``tile_size`` on both sides share batches, whatever their image and scale; smaller ones go image by image.
    """

    def __init__(self, model: CombinedModel, params: Params, machine: Machine) -> None:
        self._model, self._params, self._machine = model, params, machine
        self._whole = _Batches(partial(self._answers, model), machine.images_at_once(params.tile_size**2))
        self.flush = self._whole.flush

    def of(self, image: np.ndarray, copied: np.ndarray | None) -> _TiledImage:
        """Cut an image ``(H, W, 3)`` uint8 into tiles, at all scales; whole tiles wait for a full batch, or for ``flush``.

        ``copied`` are its ``copied_parts``, where they count.
        """
        masks = []
        for scale in used_scales(self._params, image.shape[:2]):
            scaled = at_scale(image, scale)
            mask = _BlendedMask(scaled.shape[:2], self._params.tile_size, self._params.tile_overlap)
            height, width = mask.tile
            whole = height == width == self._params.tile_size
            most = min(len(mask.places), self._machine.images_at_once(height * width))
            # a compiled model is compiled for batches of whole tiles: others go through its plain forward
            batches = self._whole if whole else _Batches(partial(self._answers, self._model.forward), most)
            for y, x in mask.places:
                batches.add(to_tensor(scaled[y : y + height, x : x + width]), partial(mask.add, y, x))
            if not whole:
                batches.flush()
            masks.append(mask)
        return _TiledImage(image.shape[:2], masks, copied)

    @torch.inference_mode()
    def _answers(self, forward: Callable[[torch.Tensor], Output], tiles: torch.Tensor) -> list[tuple[np.ndarray, torch.Tensor]]:
        """For each tile its mask ``(H, W)``, the mean of its views, and the features of these ``(views, C)``."""
        images = self._machine.to_device(tiles)
        masks, features = [], []
        for flipped in (False, True) if self._params.mask_flips else (False,):
            with self._machine.autocast():
                output = output_in_parts(forward, images.flip(-1) if flipped else images)
            if output.mask_logits is None:
                raise ValueError("masks need a model of Task B")
            probs = output.mask_logits.float().sigmoid()[:, 0]
            masks.append(probs.flip(-1) if flipped else probs)
            features.append(output.features.float())
        return list(zip(torch.stack(masks).mean(0).cpu().numpy(), torch.stack(features, 1), strict=True))

    @lost_device_is_told()
    @torch.inference_mode()
    def result(self, image: _TiledImage) -> tuple[float, np.ndarray]:
        """The probability of a complete image, and its mask ``(H, W)`` float16."""
        total = image.masks[0].scaled_to(image.shape)
        for mask in image.masks[1:]:
            total += mask.scaled_to(image.shape)
        total /= len(image.masks)
        np.clip(total, 0, 1, out=total)
        features = torch.cat([views for mask in image.masks for views in mask.features]).mean(0, keepdim=True)
        with self._machine.autocast():
            whole_mask = torch.from_numpy(total)[None, None].to(self._machine.device)
            logits = self._model.classify(features, whole_mask).float()
        prob = sigmoid((logits[0, 1] - logits[0, 0]).item())
        if image.copied is not None and image.copied.any():
            prob, total[image.copied] = max(prob, COPIED), np.maximum(total[image.copied], COPIED)
        return prob, written_mask(total)


class _BlendedMask:
    """The mask of an image at one scale: a weighted sum of its tiles' masks."""

    def __init__(self, shape: tuple[int, int], tile_size: int, overlap: int) -> None:
        self.tile = min(tile_size, shape[0]), min(tile_size, shape[1])
        self._starts = [tile_starts(length, tile_size, overlap) for length in shape]
        self.places = list(product(*self._starts))  # upper left corners of the tiles
        self._weights = [_weights(length, overlap) for length in self.tile]
        self.total = np.zeros(shape, np.float32)
        self.features: list[torch.Tensor] = []  # of each tile so far, (views, C)

    def add(self, y: int, x: int, answer: tuple[np.ndarray, torch.Tensor]) -> None:
        """Add the mask of the tile at a place, and keep its features."""
        mask, features = answer
        self.total[y : y + self.tile[0], x : x + self.tile[1]] += mask * (self._weights[0][:, None] * self._weights[1])
        self.features.append(features)

    def scaled_to(self, shape: tuple[int, int]) -> np.ndarray:
        """The complete mask ``(H, W)`` float32, at the image's size; called once."""
        self.total /= _weight_sum(self._starts[0], self._weights[0], self.total.shape[0])[:, None]
        self.total /= _weight_sum(self._starts[1], self._weights[1], self.total.shape[1])
        if self.total.shape == shape:
            return self.total
        return np.array(Image.fromarray(self.total).resize(shape[::-1], Image.Resampling.BILINEAR))


@dataclass
class _TiledImage:
    """An image whose tiles go through the model."""

    shape: tuple[int, int]
    masks: list[_BlendedMask]  # one for each scale
    copied: np.ndarray | None  # (H, W) bool

    @property
    def complete(self) -> bool:
        return all(len(mask.features) == len(mask.places) for mask in self.masks)

    @property
    def pixels(self) -> int:
        return sum(mask.total.size for mask in self.masks)


def used_scales(params: Params, shape: tuple[int, int]) -> list[float]:
    """The scales at which an image is looked at: of a pyramid, halves down to the one nearest to a crop."""
    if params.mask_scales != "pyramid":
        return params.mask_scales
    return [0.5**level for level in range(1 + max(0, round(np.log2(max(shape) / params.crop_size))))]


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
