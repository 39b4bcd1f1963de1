"""Images from a manifest to tensors: random native crops for training, whole images or chosen crops for inference.

A file that fails does not stop an epoch: its sample carries the error, ``collate`` drops it, and the caller counts it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from forensics_lib.images.crops import chosen_crops, fitted, pad_to, to_tensor
from forensics_lib.images.degradations import Encoding, degrade, recompress
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.images.masks import read_mask
from forensics_lib.params import Degradations, Params
from forensics_lib.synthesis.forgeries import pasted

SMALL = 0.05  # share of the images that may be smaller than the squares that crops are taken from
# Where crops of manipulated images are placed: around a manipulated pixel, around one of the border, or anywhere
PLACES, SHARES = ("region", "border", "anywhere"), (0.35, 0.35, 0.3)


class Columns:
    """Columns of a table in arrow's buffers, which loader processes share; Python objects would be copied into each."""

    def __init__(self, table: pd.DataFrame, names: list[str]) -> None:
        self._columns = {name: _shared(table[name]) for name in names}

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def row(self, index: int) -> dict[str, Any]:
        """One row as a dictionary, missing values as None."""
        return {name: column[index].as_py() for name, column in self._columns.items()}


def _shared(values: pd.Series) -> pa.Array:
    array = pa.array(values, from_pandas=True)
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


class TrainingCrops(Dataset):
    """One random ``crop_size`` square of each image at native resolution, degraded and perhaps mirrored.

    ``crops[seed, index, draw]`` is a sample of an image; every random choice follows from these three, so results do not
    depend on workers or order, another epoch is another seed, and an image that an epoch draws several times gives another
    crop each time.  With ``equalize`` all images get one history of compressions: one that is no JPEG is first compressed
    as one of the JPEG files were, and every crop ends in one distribution of compressions, whose blocks begin anywhere.
    With ``masks``, samples carry the mask's crop, and a spliced image's crop without a manipulated pixel counts as
    authentic.  ``paste`` is the share of authentic crops that get a region from elsewhere in the image or from another
    authentic one, and count as spliced.
    """

    def __init__(
        self,
        manifest: pd.DataFrame,
        crop_size: int,
        *,
        masks: bool,
        degradations: Degradations,
        equalize: bool = False,
        paste: float = 0.0,
    ) -> None:
        self.rows = Columns(manifest, ["path", "label", "mask_path", "kind", "format"])
        self.crop_size, self.masks = crop_size, masks
        self.degradations, self.equalize, self.paste = degradations, equalize, paste
        self.authentic = np.flatnonzero(manifest["label"].to_numpy() == 0)
        self.qualities = manifest["jpeg_quality"].dropna().to_numpy(float)  # of the JPEG files
        self.window = _window(manifest, crop_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        (_, index, _), rng = key, np.random.default_rng(key)
        row = self.rows.row(index)
        try:
            image, mask, _ = self._degraded(row, rng)
        except ImageError as error:
            return {"index": index, "error": str(error)}
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

    def source_facts(self, key: tuple[int, int, int], file: pd.Series) -> dict[str, Any]:
        """What the file facts of a sample's source would be, were it stored; empty where its file cannot be read.

        ``file`` holds the facts of the image's own file, which its source keeps where it was not compressed again.
        """
        row, rng = self.rows.row(key[1]), np.random.default_rng(key)
        try:
            image, _, encoding = self._degraded(row, rng)
        except ImageError:
            return {}
        height, width = (min(side, self.crop_size) for side in image.shape[:2])  # a tensor shows no more of the size
        facts: dict[str, Any] = {"width": width, "height": height}
        if encoding is None:
            share = width * height / (file["width"] * file["height"])
            return (
                facts | {name: file[name] for name in ("format", "jpeg_quality", "camera")} | {"bytes": file["bytes"] * share}
            )
        share = width * height / (image.shape[0] * image.shape[1])
        quality = float(encoding.quality) if encoding.format == "JPEG" else np.nan
        return facts | {"format": encoding.format, "jpeg_quality": quality, "camera": False, "bytes": encoding.bytes * share}

    def _degraded(self, row: dict[str, Any], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None, Encoding | None]:
        """A native square of an image, degraded."""
        image, mask = self._square(row, rng)
        if self.paste and not row["label"] and rng.random() < self.paste:
            image, mask = self._with_pasted_region(image, rng)
        if self.equalize and len(self.qualities) and row["format"] != "JPEG":
            quality = round(self.qualities[rng.integers(len(self.qualities))])
            image = recompress(image, "JPEG", int(np.clip(quality, 1, 100)), rng=rng)
        return degrade(image, mask, self.degradations, rng, equalize=self.equalize)

    def _square(self, row: dict[str, Any], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """A random square of an image, and of its mask where samples carry masks."""
        masks: list[np.ndarray] = []

        def chosen(height: int, width: int) -> tuple[slice, slice]:
            mask = self._mask(row, (height, width))
            place = _place((height, width), mask, self.window, rng)
            if mask is not None:
                masks.append(mask[place])
            return place

        return read_image(row["path"], chosen), masks[0] if masks else None

    def _with_pasted_region(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        donor = None
        if rng.random() < 0.5:
            with suppress(ImageError):  # the image itself then gives the region; its own sample reports the bad file
                other = read_image(self.rows.row(int(self.authentic[rng.integers(len(self.authentic))]))["path"])
                donor = fitted(other, image.shape[:2], rng)
        return pasted(image, donor, rng)

    def _mask(self, row: dict[str, Any], size: tuple[int, int]) -> np.ndarray | None:
        if not self.masks:
            return None
        return read_mask(row["mask_path"], size) if row["label"] else np.zeros(size, bool)


def _window(manifest: pd.DataFrame, crop_size: int) -> int:
    """The side of the squares that are taken before degradation, the same for all images.

    It is what nearly every image has, and at most what the crop needs when shrunk to a half: if large images gave more
    than small ones, padding after shrinking would tell which images are small, and so often the class.
    """
    shorter = np.minimum(manifest["width"], manifest["height"]).dropna()
    common = int(np.quantile(shorter, SMALL)) if len(shorter) else 0
    return int(np.clip(common, crop_size, 2 * crop_size))


def _place(shape: tuple[int, int], mask: np.ndarray | None, size: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """The rows and columns of a random ``size`` square, or of what there is; of a mask that marks something by ``PLACES``."""
    limits = max(0, shape[0] - size), max(0, shape[1] - size)
    top, left = (int(rng.integers(limit + 1)) for limit in limits)
    if mask is not None:
        place = rng.choice(PLACES, p=SHARES)
        marked = np.flatnonzero(_border(mask) if place == "border" else mask) if place != "anywhere" else []
        if len(marked):
            y, x = divmod(int(marked[rng.integers(len(marked))]), mask.shape[1])
            top, left = (
                int(np.clip(centre - rng.integers(size // 4, 3 * size // 4 + 1), 0, limit))
                for centre, limit in zip((y, x), limits, strict=True)
            )
    return slice(top, min(top + size, shape[0])), slice(left, min(left + size, shape[1]))


def _border(mask: np.ndarray) -> np.ndarray:
    """The manipulated pixels that have an authentic neighbour below or to the right, and those that are one."""
    border = np.zeros_like(mask)
    border[:-1] |= mask[:-1] != mask[1:]
    border[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    return border


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the samples that could be read; ``errors`` lists (index, message) of the others."""
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

    With ``balance: source`` the sources of a class are strata.  Half of Task B's manipulated images are fully regenerated
    ones, whatever their number.
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
    labels: np.ndarray, seed: int, epoch: int, groups: np.ndarray | None = None, shares: dict[Any, float] | None = None
) -> np.ndarray:
    """The indices of one epoch: as many as there are images, both classes equally often, shuffled.

    With ``groups`` (N,) the groups of a class are drawn equally often too, or by their ``shares`` of the class.  A class or
    group that is short repeats; of one that is plentiful each epoch takes another random part.
    """
    rng = np.random.default_rng([seed, epoch])
    groups = np.zeros(len(labels), int) if groups is None else groups
    shares, half, parts = shares or {}, -(-len(labels) // 2), []
    for label in (0, 1):
        names = pd.unique(groups[labels == label])
        weights = np.array([shares.get(name, 1 / len(names)) for name in names])
        weights = weights if weights.any() else np.ones(len(names))
        drawn = []
        for name, weight in zip(names, weights / weights.sum(), strict=True):
            members = np.flatnonzero((labels == label) & (groups == name))
            count = int(np.ceil(half * weight - 1e-9))
            repeated = [rng.permutation(members) for _ in range(-(-count // len(members)))]
            drawn.append(rng.permutation(np.concatenate(repeated)[:count]) if repeated else members[:0])
        parts.append(rng.permutation(np.concatenate(drawn))[:half])
    return rng.permutation(np.concatenate(parts))[: len(labels)]


def numbered_draws(order: np.ndarray) -> np.ndarray:
    """An epoch's ``order`` of images with the number of the draw of each, from 0 on: ``(N, 2)``."""
    return np.column_stack([order, pd.Series(order).groupby(order).cumcount()])


class EpochBatches:
    """The batches of one epoch, as keys of ``TrainingCrops``."""

    def __init__(self) -> None:
        self.seed, self.draws = 0, list[np.ndarray]()

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for batch in self.draws:
            yield [(self.seed, index, draw) for index, draw in batch.tolist()]

    def __len__(self) -> int:
        return len(self.draws)


class TrainingBatches:
    """Batches of crops, epoch after epoch, from loader processes that stay until ``close``.

    Starting them for each epoch would cost a second of it: what a model's updates write to after a fork is copied first.
    """

    def __init__(self, crops: TrainingCrops, workers: int) -> None:
        self.batches = EpochBatches()
        self.loader = DataLoader(
            crops,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            worker_init_fn=leave_process_group,
            generator=torch.Generator(),  # starting draws a number, which must not come from what training draws from
        )

    def epoch(self, seed: int, draws: list[np.ndarray]) -> DataLoader:
        """Batches of rows of ``numbered_draws``, drawn by ``seed``; one may be empty.  It ends the epoch before."""
        self.batches.seed, self.batches.draws = seed, draws
        return self.loader

    def close(self) -> None:
        """End the loader processes."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()


def leave_process_group(_: int) -> None:
    """For loader processes: whoever stops a notebook ends its whole group at once, and a training stops only after a batch.

    A loader process ends by itself when the process that it serves is gone.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class InferenceImages(Dataset):
    """Images for inference: the index with an ``(H, W, 3)`` uint8 image, its chosen crops, or an error.

    ``change`` is done to each image first, for robustness measurements.  Where the manifest has a column ``content``, its
    bytes are read instead of the file at ``path``, if there are any.
    """

    def __init__(
        self,
        manifest: pd.DataFrame,
        *,
        crop_size: int | None = None,
        crops: int = 1,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.rows = Columns(manifest, ["path", "content"] if "content" in manifest else ["path"])
        self.crop_size, self.crops, self.change = crop_size, crops, change

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image, or with ``crop_size`` its crops ``(K, 3, crop_size, crop_size)``."""
        try:
            row = self.rows.row(index)
            content = row.get("content")
            image = read_image(row["path"] if content is None else content)
            image = image if self.change is None else self.change(image)
        except ImageError as error:
            return {"index": index, "error": str(error)}
        if self.crop_size is None:
            return {"index": index, "image": image}
        return {"index": index, "crops": torch.stack([to_tensor(c) for c in chosen_crops(image, self.crop_size, self.crops)])}


def stream(dataset: Dataset, workers: int) -> Iterator[dict[str, Any]]:
    """The samples one by one in order, loaded ahead by ``workers`` processes."""
    yield from DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=leave_process_group)
