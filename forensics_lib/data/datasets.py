"""Datasets over a manifest: random native crops for training, whole images or chosen crops for inference.

An unreadable file does not stop an epoch: its sample carries the error, ``collate`` drops it, and the caller counts it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from forensics_lib.device import Machine
from forensics_lib.images.copies import copied_parts
from forensics_lib.images.crops import chosen_crops, fitted, pad_to, seen_whole, to_tensor, whole_crops
from forensics_lib.images.degradations import KERNELS, Encoding, degrade, recompress, resize
from forensics_lib.images.io import ImageError, decoded, open_image, pixels_in, read_image
from forensics_lib.images.masks import read_mask
from forensics_lib.params import Degradations, Params
from forensics_lib.synthesis.forgeries import pasted

SMALL = 0.05  # share of images that may be smaller than the squares from which crops are cut
# Places of crops of manipulated images, and their shares: at a manipulated pixel, at the region's border, or anywhere
PLACES, SHARES = ("region", "border", "anywhere"), (0.35, 0.35, 0.3)
GENERATED = 0.5  # Task B: share of pasted regions that come from synthetic images, where there are any
POLITE = 10  # by which the priority of loader processes is lowered beside a network on the same CPU
WORTH = 24  # images from which on a loader process pays: fewer are read before it has started
WHOLE = 0.5  # Task A: share of squares that have an image's whole shorter side, and are shrunk to a crop
OVERVIEW = 0.5  # Task B: share of squares of large images that are up to 4 times larger, and shrunk to the others' size


class Columns:
    """Columns of a table in Arrow buffers, which loader processes share; Python objects would be copied into each."""

    def __init__(self, table: pd.DataFrame, names: list[str]) -> None:
        self._columns = pa.Table.from_pandas(table[names], preserve_index=False).combine_chunks()

    def __len__(self) -> int:
        return len(self._columns)

    def row(self, index: int) -> dict[str, Any]:
        """One row as a dictionary, missing values as None."""
        return self._columns.slice(index, 1).to_pylist()[0]


Key = tuple[int, int, int]  # seed, index of an image, number of its draw in the epoch


class TrainingCrops(Dataset):
    """Random ``crop_size`` squares at native resolution, degraded and randomly mirrored.

    ``crops[seed, index, draw]`` is a sample of an image; these three numbers determine every random choice, so results do
    not depend on workers or order, and an image that is drawn several times in an epoch gives a new crop each time.

    Args:
        manifest: rows of usable images.
        crop_size: side of the crops, pixels.
        degradations: what happens to crops; see ``degrade``.
        masks: whether samples have the mask's crop; a spliced image's crop without a manipulated pixel is then authentic.
        equalize: whether all images get one compression history: other formats are first compressed as one of the JPEG
            files was, and the last compression has one distribution, with randomly placed blocks.
        paste: share of authentic crops that get a region from elsewhere in the image or from another authentic image,
            and count as spliced.
        donors: rows of synthetic images, from which a share ``GENERATED`` of these regions comes; None: there are none.
    """

    def __init__(
        self,
        manifest: pd.DataFrame,
        crop_size: int,
        degradations: Degradations,
        *,
        masks: bool,
        equalize: bool = False,
        paste: float = 0.0,
        donors: pd.DataFrame | None = None,
    ) -> None:
        self.rows = Columns(manifest, ["path", "label", "mask_path", "kind", "format"])
        self.crop_size, self.masks = crop_size, masks
        self.degradations, self.equalize, self.paste = degradations, equalize, paste
        self.donors = Columns(manifest.head(0) if donors is None else donors, ["path"])
        self.authentic = np.flatnonzero(manifest["label"].to_numpy() == 0)
        self.qualities = manifest["jpeg_quality"].dropna().to_numpy(float)  # of the JPEG files
        self.window = _window(manifest, crop_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        (_, index, _), rng = key, np.random.default_rng(key)
        row = self.rows.row(index)
        whole = self._seen_whole(rng)
        try:
            image, mask, _ = self._degraded(row, rng, whole)
        except ImageError as error:
            return {"index": index, "error": str(error)}
        image = seen_whole(image, self.crop_size) if whole else image
        image = pad_to(image, self.crop_size, self.crop_size)
        mask = None if mask is None else pad_to(mask, self.crop_size, self.crop_size)
        place = _place(image.shape[:2], mask, self.crop_size, rng)
        image, mask = image[place], None if mask is None else mask[place]
        if rng.random() < 0.5:
            image, mask = image[:, ::-1], None if mask is None else mask[:, ::-1]
        sample = {"index": index, "label": int(row["label"]), "image": to_tensor(image)}
        if mask is not None:
            sample["mask"] = torch.from_numpy(np.ascontiguousarray(mask))[None]
            if row["kind"] == "sp" or not row["label"]:
                sample["label"] = int(mask.any())
        return sample

    def source_facts(self, key: Key, file: pd.Series) -> dict[str, Any]:
        """The file facts that a sample would have if it were stored before cropping; empty for an unreadable file.

        ``file`` has the facts of the image's own file, which hold if no degradation compressed the sample.
        """
        row, rng = self.rows.row(key[1]), np.random.default_rng(key)
        try:
            image, _, encoding = self._degraded(row, rng, self._seen_whole(rng))
        except ImageError:
            return {}
        height, width = (min(side, self.crop_size) for side in image.shape[:2])  # a tensor shows at most this size
        if encoding is None:
            facts = file[["format", "jpeg_quality", "camera"]].to_dict()
            size, pixels = file["bytes"], file["width"] * file["height"]
        else:
            quality = float(encoding.quality) if encoding.format == "JPEG" else np.nan
            facts = {"format": encoding.format, "jpeg_quality": quality, "camera": False}
            size, pixels = encoding.bytes, image.shape[0] * image.shape[1]
        return facts | {"width": width, "height": height, "bytes": size * (width * height / pixels)}

    def _seen_whole(self, rng: np.random.Generator) -> bool:
        return not self.masks and rng.random() < WHOLE

    def _degraded(
        self, row: dict[str, Any], rng: np.random.Generator, whole: bool
    ) -> tuple[np.ndarray, np.ndarray | None, Encoding | None]:
        """A native square of an image, or one with its ``whole`` shorter side, degraded."""
        image, mask = self._square(row, rng, whole)
        if self.paste and not row["label"] and rng.random() < self.paste:
            image, mask = self._with_pasted_region(image, rng)
        if min(image.shape[:2]) > self.window:
            image, mask = resize(image, mask, self.window / min(image.shape[:2]), KERNELS[rng.integers(len(KERNELS))])
        if self.equalize and len(self.qualities) and row["format"] != "JPEG":
            quality = round(self.qualities[rng.integers(len(self.qualities))])
            image = recompress(image, "JPEG", int(np.clip(quality, 1, 100)), rng=rng)
        return degrade(image, mask, self.degradations, rng, equalize=self.equalize)

    def _square(self, row: dict[str, Any], rng: np.random.Generator, whole: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """A random square of an image, and of its mask if samples have masks."""
        with open_image(row["path"]) as opened:
            rgb, mask = decoded(opened), None
            size = (rgb.height, rgb.width)
            if self.masks:
                mask = read_mask(row["mask_path"], size) if row["label"] else np.zeros(size, bool)
            side = min(size) if whole else self.window
            if self.masks and min(size) >= 2 * self.crop_size and rng.random() < OVERVIEW:  # inference halves these too
                side *= np.exp(rng.uniform(0, np.log(np.clip(min(size) / side, 1, 4))))
            place = _place(size, mask, round(side), rng)
            return pixels_in(rgb, *place), None if mask is None else mask[place]

    def _with_pasted_region(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        donor, generated = None, len(self.donors) > 0 and rng.random() < GENERATED
        if generated:
            other = self.donors.row(int(rng.integers(len(self.donors))))
        elif rng.random() < 0.5:
            other = self.rows.row(int(self.authentic[rng.integers(len(self.authentic))]))
        else:
            other = None
        with suppress(ImageError):  # the region then comes from the image itself; the bad file's own sample reports it
            donor = None if other is None else fitted(read_image(other["path"]), image.shape[:2], rng)
        return pasted(image, donor, rng, as_it_is=generated and donor is not None)


def _window(manifest: pd.DataFrame, crop_size: int) -> int:
    """The side of the squares cut before degradation, the same for all images.

    Nearly every image has it, and it is at most what a crop needs when scaled by a half: if large images gave larger
    squares, padding after downscaling would reveal small images, and so, often, the class.
    """
    shorter = np.minimum(manifest["width"], manifest["height"]).dropna()
    common = int(np.quantile(shorter, SMALL)) if len(shorter) else 0
    return int(np.clip(common, crop_size, 2 * crop_size))


def _place(shape: tuple[int, int], mask: np.ndarray | None, size: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """The rows and columns of a random square of at most ``size``; with a mask that is not empty, placed by ``PLACES``."""
    limits = max(0, shape[0] - size), max(0, shape[1] - size)
    top, left = (int(rng.integers(limit + 1)) for limit in limits)
    place = "anywhere" if mask is None else rng.choice(PLACES, p=SHARES)
    if mask is not None and place != "anywhere":
        marked = np.flatnonzero(_border(mask) if place == "border" else mask)
        if len(marked):
            y, x = divmod(int(marked[rng.integers(len(marked))]), mask.shape[1])
            top, left = (
                int(np.clip(centre - rng.integers(size // 4, 3 * size // 4 + 1), 0, limit))
                for centre, limit in zip((y, x), limits, strict=True)
            )
    return slice(top, min(top + size, shape[0])), slice(left, min(left + size, shape[1]))


def _border(mask: np.ndarray) -> np.ndarray:
    """The pixels that differ from their neighbour below or to the right in being manipulated."""
    border = np.zeros_like(mask)
    border[:-1] |= mask[:-1] != mask[1:]
    border[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    return border


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the readable samples; ``errors`` lists (index, message) of the others."""
    good = [sample for sample in samples if "error" not in sample]
    batch: dict[str, Any] = {"errors": [(sample["index"], sample["error"]) for sample in samples if "error" in sample]}
    batch["index"] = [sample["index"] for sample in good]
    if good:
        batch["label"] = torch.tensor([sample["label"] for sample in good])
        for key in ("image", "mask"):
            if key in good[0]:
                batch[key] = torch.stack([sample[key] for sample in good])
    return batch


def drawing_strata(rows: pd.DataFrame, task: str, params: Params) -> tuple[np.ndarray, dict[Any, float]]:
    """For ``epoch_order``: the stratum of each image, and the shares of strata that are not drawn equally often.

    With ``balance: source`` the sources of a class are its strata.  In Task B half of the manipulated images drawn are fully
    regenerated, whatever their number.
    """
    strata = rows["source"].astype(str) if params.balance == "source" else pd.Series("", rows.index)
    if task == "A":
        return strata.to_numpy(), {}
    regenerated = rows["kind"].eq("fr")
    strata = strata.where(rows["label"].eq(0), strata + np.where(regenerated, "/fr", "/sp"))
    shares: dict[Any, float] = {}
    for kind in ("/fr", "/sp"):
        members = [name for name in strata.unique() if name.endswith(kind)]
        shares |= {name: 0.5 / len(members) for name in members}
    return strata.to_numpy(), shares


def epoch_order(
    labels: np.ndarray, seed: int, epoch: int, strata: np.ndarray | None = None, shares: dict[Any, float] | None = None
) -> np.ndarray:
    """The indices of one epoch: as many as there are images, both classes equally often, shuffled.

    With ``strata`` ``(N,)`` the strata of a class are drawn equally often too, or by their ``shares`` of the class.  Images
    of a small class or stratum repeat; of a large one each epoch takes another random part.
    """
    rng = np.random.default_rng([seed, epoch])
    strata = np.zeros(len(labels), int) if strata is None else strata
    shares, half, parts = shares or {}, -(-len(labels) // 2), []
    for label in (0, 1):
        names = pd.unique(strata[labels == label])
        weights = np.array([shares.get(name, 1 / len(names)) for name in names])
        weights = weights if weights.any() else np.ones(len(names))
        drawn = []
        for name, weight in zip(names, weights / weights.sum(), strict=True):
            members = np.flatnonzero((labels == label) & (strata == name))
            count = int(np.ceil(half * weight - 1e-9))
            repeated = [rng.permutation(members) for _ in range(-(-count // len(members)))]
            drawn.append(rng.permutation(np.concatenate(repeated)[:count]) if repeated else members[:0])
        parts.append(rng.permutation(np.concatenate(drawn))[:half])
    return rng.permutation(np.concatenate(parts))[: len(labels)]


def numbered_draws(order: np.ndarray) -> np.ndarray:
    """An epoch's ``order`` of images, each with the number of its draw from 0 on: ``(N, 2)``."""
    return np.column_stack([order, pd.Series(order).groupby(order).cumcount()])


class TrainingBatches:
    """Batches of crops, epoch after epoch, from loader processes that live until ``close``.

    Starting them anew would cost a second per epoch: memory that the model updates after a fork has to be copied.  This is
    also the loader's batch sampler: iterating gives the keys of each batch's crops.
    """

    def __init__(self, crops: TrainingCrops, workers: int, *, on_cpu: bool = True, pinned: bool = False) -> None:
        self._seed, self._draws = 0, list[np.ndarray]()
        self.loader = DataLoader(
            crops,
            batch_sampler=self,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            worker_init_fn=partial(begin_loading, on_cpu=on_cpu),
            pin_memory=pinned,  # copies to a GPU then go on beside its work
            generator=torch.Generator(),  # starting draws a number, which must not come from training's generator
        )

    def epoch(self, seed: int, draws: list[np.ndarray]) -> DataLoader:
        """The batches of the next epoch, given as rows of ``numbered_draws``; they may be empty.  Ends the previous epoch."""
        self._seed, self._draws = seed, draws
        return self.loader

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self._draws:
            yield [(self._seed, index, draw) for index, draw in batch.tolist()]

    def __len__(self) -> int:
        return len(self._draws)

    def close(self) -> None:
        """End the loader processes."""
        if isinstance(self.loader._iterator, _MultiProcessingDataLoaderIter):
            self.loader._iterator._shutdown_workers()


def begin_loading(_: int, *, on_cpu: bool) -> None:
    """For loader processes, at their start.

    They leave the process group: interrupting a notebook signals all of it, but a training stops after a batch; a loader
    process exits by itself when its parent has gone.  Beside a network on the same CPU they have a lower priority: it would
    else wait in every operation for the one of its threads that shares a core with them.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    if on_cpu and hasattr(os, "nice"):
        os.nice(POLITE)


Change = Callable[[np.ndarray], np.ndarray]  # of an image, to an image


class InferenceImages(Dataset):
    """Images for inference: samples have the index, and an ``(H, W, 3)`` uint8 image, its crops, or an error.

    Crops are ``chosen_crops`` and, with ``whole``, ``whole_crops``.  With ``copies`` an image without crops has its ``copied``
    parts beside it, ``(H, W)`` bool.
    ``change`` is applied to each image first, for robustness measurements.  If the manifest has a column ``content``, its
    bytes, if any, replace the file at ``path``.
    """

    def __init__(
        self,
        manifest: pd.DataFrame,
        crop_size: int | None = None,
        crops: int = 1,
        change: Change | None = None,
        *,
        whole: bool = False,
        copies: bool = False,
    ) -> None:
        self.rows = Columns(manifest, ["path", "content"] if "content" in manifest else ["path"])
        self.crop_size, self.crops, self.change, self.whole, self.copies = crop_size, crops, change, whole, copies

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image, or with ``crop_size`` its ``crops`` ``(K, 3, S, S)`` uint8, the first ``native`` of them not shrunk."""
        try:
            row = self.rows.row(index)
            content = row.get("content")
            image = read_image(row["path"] if content is None else content)
            image = image if self.change is None else self.change(image)
        except ImageError as error:
            return {"index": index, "error": str(error)}
        if self.crop_size is None:
            return {"index": index, "image": image} | ({"copied": copied_parts(image)} if self.copies else {})
        native = chosen_crops(image, self.crop_size, self.crops)
        crops = native + (whole_crops(image, self.crop_size) if self.whole else [])
        return {"index": index, "crops": torch.stack([to_tensor(crop) for crop in crops]), "native": len(native)}


def stream(dataset: InferenceImages, machine: Machine) -> Iterator[dict[str, Any]]:
    """The samples in order, prefetched by at most the machine's ``workers`` processes, each with ``WORTH`` images or more."""
    workers, begin = min(machine.workers, len(dataset) // WORTH), partial(begin_loading, on_cpu=machine.device.type == "cpu")
    yield from DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=begin)
