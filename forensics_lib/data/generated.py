"""Training data for open runs made of photographs: synthetic twins for Task A, forgeries for Task B.

A twin is a photograph after an autoencoder.  It keeps the photograph's content, size and codec, so that only the decoder's
traces tell the two apart (Rajan et al., AlignedForensics, ICLR 2025; Guillaro et al., B-Free, CVPR 2025).  Pixels and
frequencies are aligned as in Chen et al., Dual Data Alignment, NeurIPS 2025: a random share of the photograph is mixed in,
and the twin of a JPEG file is compressed with that file's own quantization tables, which removes the fine detail that a
decoder adds and the photograph has lost.  A WebP file does not store its quality: its twin gets the quality at which the
photograph is as large as its file.  Twins of other files are lossless; ``equalize`` compresses both anyway.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from forensics_lib.data.rows import COLUMNS
from forensics_lib.images.crops import random_square
from forensics_lib.images.degradations import BLOCK
from forensics_lib.images.io import ImageError, open_image, read_image, stream_of
from forensics_lib.params import Aligned, Forgeries, Generated
from forensics_lib.synthesis.autoencoder import WEIGHTS, Autoencode, load_autoencode
from forensics_lib.synthesis.forgeries import FORGERY_VERSION, METHODS, forge
from forensics_lib.utils.callables import source_of
from forensics_lib.utils.files import atomic_write, home
from forensics_lib.utils.progress import progress

SIDE = 512  # twins and forgeries are squares of at most this side, pixels
MIX = 0.5  # highest share of a photograph in its twin
TWIN_VERSION = 3  # of the method: a new number invalidates the cache
SUFFIXES = {"JPEG": ".jpg", "WEBP": ".webp"}  # by a photograph's format; twins of all others are PNG


def make_twins(photos: pd.DataFrame, settings: Aligned, autoencode: Autoencode | None = None) -> pd.DataFrame:
    """Make synthetic twins of ``photos``: rows of authentic images with ``COLUMNS``, ``format`` and ``bytes``.

    Twins are cached in ``outputs/.cache/aligned`` and made again only if the photograph, the settings or the autoencoder's
    code changed; the same photographs give the same twins.  Unreadable photographs are skipped with a message.  Returns a row
    with ``COLUMNS`` per twin, with label 1 and the split and group of its photograph.  Raises ``ValueError`` if the
    autoencoder (None: that of ``settings``, if needed) cannot be loaded, or changes the shape or type of an image.
    """
    folder, planned = cache_folder("aligned", settings, TWIN_VERSION), []
    for photo in _drawn(photos, settings):
        name = _hashed(f"{photo['path']} {photo['bytes']}")
        files = [folder / (name + SUFFIXES.get(photo["format"], ".png"))]
        row = _row(photo, files, settings, origin="aligned", method="aligned", kind="full")
        planned.append(_Planned(int(name, 16), files, partial(_write_twin, photo["path"], settings.autoencoder), row))
    return _made("aligned twins", planned, settings, autoencode)


def make_forgeries(photos: pd.DataFrame, settings: Forgeries, autoencode: Autoencode | None = None) -> pd.DataFrame:
    """Make forgeries of ``photos`` by all ``METHODS`` in turn; the next photograph drawn is the donor.

    Images and masks are PNG files, cached in ``outputs/.cache/forgeries``; for the rest see ``make_twins``.
    """
    drawn, folder, planned = _drawn(photos, settings), cache_folder("forgeries", settings, FORGERY_VERSION), []
    for number, photo in enumerate(drawn):
        donor, method = drawn[(number + 1) % len(drawn)]["path"], METHODS[number % len(METHODS)]
        name = _hashed(f"{photo['path']} {photo['bytes']} {donor} {method}")
        files = [folder / f"{name}.png", folder / f"{name}_mask.png"]
        row = _row(photo, files, settings, origin="forged", method=method, kind="fr" if method == "whole" else "sp")
        planned.append(_Planned(int(name, 16), files, partial(_write_forgery, photo["path"], donor, method), row))
    return _made("forgeries", planned, settings, autoencode)


@dataclass(frozen=True)
class _Planned:
    """An image to make, unless its files are in the cache."""

    seed: int
    files: list[Path]  # the image, and its mask if it has one
    write: Callable[[list[Path], Autoencode, np.random.Generator], None]
    row: dict[str, Any]

    def exists(self) -> bool:
        return all(path.is_file() for path in self.files)


def _made(title: str, planned: list[_Planned], settings: Generated, autoencode: Autoencode | None) -> pd.DataFrame:
    """Make the planned images that are not in the cache; returns the rows of all that could be made."""
    missing, unreadable = [plan for plan in planned if not plan.exists()], 0
    if missing:
        print(f"making {len(missing)} of {len(planned)} {title} with the autoencoder {settings.autoencoder}, once")
        autoencode = autoencode or load_autoencode(settings.autoencoder)
        for plan in progress(missing, title):
            try:
                plan.write(plan.files, autoencode, np.random.default_rng(plan.seed))
            except ImageError:
                unreadable += 1
    if unreadable:
        print(f"{unreadable} photograph(s) could not be read and give no {title}")
    return pd.DataFrame([plan.row for plan in planned if plan.exists()], columns=COLUMNS)


def _drawn(photos: pd.DataFrame, settings: Generated) -> list[dict[str, Any]]:
    return photos.sample(min(settings.count, len(photos)), random_state=0).sort_index().to_dict("records")


def _hashed(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:20]


def _row(
    photo: dict[str, Any], files: list[Path], settings: Generated, *, origin: str, method: str, kind: str
) -> dict[str, Any]:
    places = {"path": str(files[0]), "mask_path": str(files[1]) if len(files) > 1 else None}
    names = {"source": f"{origin}/{photo['source']}", "generator": settings.autoencoder, "method": method, "kind": kind}
    return places | names | {"label": 1, "split": photo["split"], "group": photo["group"]}


def cache_folder(name: str, settings: Generated, version: int) -> Path:
    """The folder of images made with these settings, this version of the method, and the autoencoder's current code."""
    code = WEIGHTS if settings.autoencoder == "own" else source_of(settings.autoencoder)
    made_by = hashlib.sha256(code.read_bytes()).hexdigest() if code else None
    facts = settings.model_dump(exclude={"count"}) | {"rule": version, "code": made_by}
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return home() / "outputs" / ".cache" / name / key


def _write_forgery(
    photo: str, donor: str, method: str, paths: list[Path], autoencode: Autoencode, rng: np.random.Generator
) -> None:
    square, other = (random_square(read_image(source), SIDE, rng) for source in (photo, donor))
    forgery = forge(square, other, method, autoencode, rng)
    for path, pixels in zip(paths, (forgery.image, forgery.mask.astype(np.uint8) * 255), strict=True):
        with atomic_write(path) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")


def _write_twin(photo: str, name: str, paths: list[Path], autoencode: Autoencode, rng: np.random.Generator) -> None:
    """``name`` is the autoencoder's, for the message."""
    whole_photo = read_image(photo)
    image = random_square(whole_photo, SIDE, rng, BLOCK)  # so that the blocks of both files coincide
    twin = autoencode(image)
    if twin.shape != image.shape or twin.dtype != np.uint8:
        raise ValueError(
            f"aligned.autoencoder: {name} made {twin.dtype} {twin.shape} of uint8 {image.shape}; "
            "it must return an image of the same shape and type"
        )
    share = rng.uniform(0, MIX)
    mixed = share * image + (1 - share) * twin.astype(np.float32)
    if np.ptp(image, axis=2).max() <= 2:  # the twin of a grey photograph is grey; 2 is WebP's rounding
        mixed = mixed.mean(axis=2, keepdims=True).repeat(3, axis=2)
    mode, options = _encoding_of(photo, whole_photo)
    with atomic_write(paths[0]) as temporary:
        Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8)).convert(mode).save(temporary, **options)


def _encoding_of(photo: str, pixels: np.ndarray) -> tuple[str, dict[str, Any]]:
    """The mode and the options to store a twin with: the compression of its photograph, as far as the file shows it."""
    with open_image(photo) as image:
        if isinstance(image, JpegImageFile):  # or an MPO, a JPEG followed by others
            mode = image.mode if image.mode in ("L", "CMYK") else "RGB"
            stored_as_rgb = mode == "RGB" and image.info.get("adobe_transform") == 0
            options = {"subsampling": _subsampling(image.layer), "progressive": "progressive" in image.info}
            return mode, options | {"format": "JPEG", "qtables": image.quantization, "keep_rgb": stored_as_rgb}
        if image.format == "WEBP":
            stream_of(image).seek(0)
            data = stream_of(image).read()
            options = {"lossless": True, "exact": True} if _lossless(data) else {"quality": _webp_quality(pixels, len(data))}
            return "RGB", {"format": "WEBP"} | options
        return "RGB", {"format": "PNG"}


def _subsampling(components: list[tuple[int, int, int, int]]) -> int:
    """0, 1 or 2 for 4:4:4, 4:2:2 or 4:2:0, by a JPEG's share of colour samples; Pillow writes no others.

    A component is its number, its horizontal and its vertical sampling, and its table.
    """
    if len(components) != 3:
        return 0
    share = components[0][1] * components[0][2] / (components[1][1] * components[1][2])
    return 0 if share < 2 else 1 if share < 4 else 2


def _lossless(data: bytes) -> bool:
    """Whether a WebP file's first picture is lossless."""
    place = 12
    while place + 8 <= len(data):
        name, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8L"
        place += 8 + length + length % 2
    return False


def _webp_quality(pixels: np.ndarray, length: int) -> int:
    """The lowest WebP quality at which an image takes ``length`` bytes: an estimate of its file's quality."""

    def size(quality: int) -> int:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "WEBP", quality=quality)
        return buffer.getbuffer().nbytes

    return min(100, 1 + bisect_left(range(1, 101), length, key=size))
