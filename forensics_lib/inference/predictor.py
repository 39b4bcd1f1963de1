"""Predictions of a trained checkpoint for any images, in three lines of Python and without a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from forensics_lib.data.rows import LayoutError, Rows, contents
from forensics_lib.device import choose_machine
from forensics_lib.images.io import ImageError, as_file
from forensics_lib.inference.detectors import predictions
from forensics_lib.inference.predict import Prediction
from forensics_lib.inference.probabilities import calibrated, check_finite, round_probs
from forensics_lib.models.checkpoint import CheckpointError, load_model
from forensics_lib.params import make_params, without_removed
from forensics_lib.run import Thresholds
from forensics_lib.utils.files import shown

WANTED = "a path, an array (H, W, 3) or (H, W) of uint8, a PIL image, the bytes of an image file, or an open binary file"
Pixels = np.ndarray | Image.Image | bytes | bytearray | memoryview | BinaryIO  # an image that is no path
Source = str | PathLike | Pixels


@dataclass(frozen=True)
class Item:
    """One image: its name, its file's content where it is not read from the path ``name``, and why it cannot be read."""

    name: str
    content: bytes | None = None
    error: str | None = None


def predict(
    images: Source | Iterable[Source], checkpoint: str | Path, device: str = "auto"
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Predict any images with a trained checkpoint.

    Args:
        images: one image, a folder, or any number of both in any mixture.  An image is a path; an array ``(H, W, 3)`` RGB or
            ``(H, W)`` grey of uint8; an open PIL image; the bytes of an image file, or a file opened with "rb".  A folder
            gives the images in it by name, then those of its folders, whatever their extensions.  Only images given as
            paths are not all held in memory.
        checkpoint: the ``..._finetuned_model.pth`` of an evaluated run.
        device: "auto", "cpu" or "cuda".

    Returns:
        A table with a row per image, and for Task B the masks ``(H, W)`` float16 in [0, 1] by the table's path, as
        predicted, whatever the label.  Columns: path (``image 0`` for the first row where it is no file; the second row of
        a file ends in `` (2)``), prob (calibrated, in [0, 1]), label (1 where prob is at least the checkpoint's threshold)
        and error: an image that cannot be read has NaN and the reason.

    Raises:
        TypeError, ValueError: something that cannot be an image, such as an array of floats.
        LayoutError: folders without images, and nothing else; among others such a folder has a row with the reason.
        CheckpointError: a checkpoint without thresholds, such as that of step 1.
        BrokenModelError: predictions are not finite.
    """
    found = collected(images)
    answers = list(Predictor(checkpoint, device).answers(found))
    rows = [(answer.path, answer.prob, answer.label, answer.error) for answer in answers]
    table = pd.DataFrame(rows, columns=["path", "prob", "label", "error"], dtype=object)
    table = table.astype({"path": str, "prob": float, "label": "Int64"})
    return table, {answer.path: answer.mask for answer in answers if answer.mask is not None}


@dataclass
class Answer:
    """What a model says of one image; ``label``, ``mask`` and a finite ``prob`` are missing where it cannot be read."""

    path: str  # made distinct, see ``predict``
    prob: float  # calibrated, in [0, 1]
    label: int | None
    error: str | None
    mask: np.ndarray | None  # Task B: (H, W) float16 in [0, 1]


class Predictor:
    """A trained checkpoint, loaded once, with its thresholds and the inference that they were chosen with.

    Args:
        checkpoint: the ``..._finetuned_model.pth`` of an evaluated run.
        device: "auto", "cpu" or "cuda".

    Raises:
        FileNotFoundError, CheckpointError: there is none, or it holds no thresholds, as that of step 1.
    """

    def __init__(self, checkpoint: str | Path, device: str = "auto") -> None:
        self._model, content = load_model(Path(checkpoint).expanduser())
        if "thresholds" not in content:
            raise CheckpointError(f"{checkpoint} holds no thresholds: take the ..._finetuned_model.pth of an evaluated run")
        self.task: str = content["config"]["task"]
        self.sample = bool(content.get("sample"))  # whether it knows the built-in sample alone
        self.thresholds = Thresholds.of(content["thresholds"])
        values = {"backbone": content["config"]["backbone"], "pretrained": False, "device": device}
        self.params = make_params(without_removed(content["inference"]) | values, str(checkpoint))
        self._machine = choose_machine(self.params)

    def answers(
        self, items: list[Item], change: Callable[[np.ndarray], np.ndarray] | None = None, title: str = "images"
    ) -> Iterator[Answer]:
        """The answer for each of the images ``collected``, in order, after a ``change`` of each where one is given.

        Raises ``BrokenModelError`` at the end where predictions are not finite.
        """
        names = _distinct(item.name for item in items)
        bytes_of = pd.arrays.ArrowExtensionArray(pa.array([item.content for item in items], pa.large_binary()))
        sources = pd.DataFrame({"path": [item.name for item in items], "content": bytes_of})
        probs, errors = [], []
        for prediction in predictions(self._model, self.task, sources, self.params, self._machine, change, title):
            answer = self._answer(prediction, names[prediction.index], items[prediction.index].error)
            probs.append(answer.prob)
            errors.append(answer.error)
            yield answer
        check_finite(names, probs, errors)

    def _answer(self, prediction: Prediction, name: str, refused: str | None) -> Answer:
        error = prediction.error
        if error and error.startswith("image bytes"):
            error = name + error.removeprefix("image bytes")
        prob = float(round_probs(calibrated(np.array(prediction.prob), self.thresholds)))
        label = int(prob >= self.thresholds.threshold) if np.isfinite(prob) else None
        return Answer(name, prob, label, refused or error, prediction.mask)


def collected(images: Source | Iterable[Source]) -> list[Item]:
    """The images that ``predict`` takes, one by one; prints what is skipped in folders.

    A folder without images stands for itself, with the reason.  Raises as ``predict``, ``LayoutError`` where all are such.
    """
    items: list[Item] = []
    empty: list[LayoutError] = []
    for image in _sources(images):
        name = f"image {len(items)}"
        try:
            items += _of_path(image, name) if isinstance(image, str | PathLike) else [_in_memory(image, name)]
        except LayoutError as error:
            empty.append(error)
            items.append(Item(shown(Path(cast(str, image)).expanduser()), b"", str(error)))
    if not items:
        raise ValueError(f"there are no images to predict: an empty {type(images).__name__} was given")
    if len(empty) == len(items):
        raise empty[0]
    return items


def _sources(images: Source | Iterable[Source]) -> Iterable[Source]:
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUT":  # NumPy's arrays of objects and of texts
        return list(images)
    if isinstance(images, str | PathLike | np.ndarray | Image.Image | bytes | bytearray | memoryview):
        return [images]
    if hasattr(images, "read"):
        return [cast(BinaryIO, images)]
    if not isinstance(images, Iterable) or isinstance(images, Mapping):
        raise TypeError(f"images is of type {type(images).__name__}; wanted {WANTED}, or any number of these")
    return images


def _of_path(path: str | PathLike, name: str) -> list[Item]:
    """The file, or the images below the folder."""
    if not fspath(path):
        raise ValueError(f"{name}: its path is empty")
    if re.match(r"https?://", fspath(path)):
        raise ValueError(f"{name}: {fspath(path)} is an address; download it first, images are read from files")
    place = Path(path).expanduser()
    if not place.is_dir():
        return [Item(shown(place))]
    rows = Rows()
    items = [Item(found) for folder in rows.walk(place, by_content=True) for found in folder.paths]
    if not items:
        raise LayoutError(f"no images in the folder or below; {contents(place)}")
    for note in rows.notes():
        print(note)
    return items


def _in_memory(image: Pixels, name: str) -> Item:
    """An image that is no path.  Raises ``TypeError`` and ``ValueError`` for what cannot be an image."""
    if hasattr(image, "read"):
        image = image.read()
        if not isinstance(image, bytes):
            raise TypeError(f'{name}: a file opened as text; open it with "rb"')
    if isinstance(image, bytes | bytearray | memoryview):
        return Item(name, bytes(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise ValueError(f"{name}: an array of shape {image.shape}, {image.dtype}; wanted (H, W, 3) or (H, W), uint8")
    elif not isinstance(image, Image.Image):
        raise TypeError(f"{name}: of type {type(image).__name__}; wanted {WANTED}")
    try:
        return Item(name, as_file(image))
    except ImageError as error:
        return Item(name, b"", f"{name}: {error}")


def _distinct(names: Iterable[str]) -> list[str]:
    """The names in order, made distinct by `` (2)`` and so on at their ends."""
    taken: dict[str, None] = {}
    for name in names:
        number, distinct = 1, name
        while distinct in taken:
            number += 1
            distinct = f"{name} ({number})"
        taken[distinct] = None
    return list(taken)
