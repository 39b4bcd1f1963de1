"""Aligned training data for open runs: photographs that went through an autoencoder, as synthetic twins.

A twin has its photograph's content, size and codec, so that nothing but the decoder's traces tells the two apart (Rajan
et al., AlignedForensics, ICLR 2025; Guillaro et al., B-Free, CVPR 2025).  Pixels and frequencies are aligned as in Chen
et al., Dual Data Alignment, NeurIPS 2025: a random share of the photograph is mixed in, and the twin of a JPEG file is
compressed by that file's own quantization tables, which takes away the fine detail that a decoder adds and the
photograph has lost.  A WebP file does not tell its quality: its twin gets the one that makes the photograph as large as its
file.  Twins of other files are stored without loss; ``equalize`` compresses both all the same.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from forensics_lib.data.rows import COLUMNS
from forensics_lib.images.crops import random_square
from forensics_lib.images.degradations import BLOCK
from forensics_lib.images.io import ImageError, open_image, read_image
from forensics_lib.params import Aligned, Forgeries
from forensics_lib.synthesis.autoencoder import Autoencode, load_autoencode
from forensics_lib.synthesis.forgeries import FORGERY_VERSION, METHODS, forge
from forensics_lib.utils.callables import source_of
from forensics_lib.utils.files import atomic_write, home
from forensics_lib.utils.progress import progress

SIDE = 512  # twins and forgeries are of squares of at most this side, pixels
MIX = 0.5  # highest share of a photograph in its twin
TWIN_VERSION = 3  # how twins are made and stored: a new number makes those in the cache anew
SUFFIXES = {"JPEG": ".jpg", "WEBP": ".webp"}  # by a photograph's format; twins of all others are PNG


def make_twins(photos: pd.DataFrame, settings: Aligned, autoencode: Autoencode | None = None) -> pd.DataFrame:
    """Twins of authentic images: rows with ``layouts.COLUMNS``, label 1, and the group of their photograph.

    At most ``settings.count`` photographs are drawn.  Twins are kept in ``outputs/.cache/aligned`` and made again only
    where photograph, settings or the autoencoder's code changed; the same photographs give the same twins.  Unreadable
    ones are passed over.
    """
    drawn = photos.sample(min(settings.count, len(photos)), random_state=0).sort_index()
    folder = kept_in("aligned", settings, TWIN_VERSION)
    rows, passed_over = [], 0
    for photo in progress(drawn.to_dict("records"), "aligned twins"):
        name = hashlib.sha256(f"{photo['path']} {photo['bytes']}".encode()).hexdigest()[:20]
        path = folder / (name + SUFFIXES.get(photo["format"], ".png"))
        if not path.is_file():
            autoencode = autoencode or load_autoencode(settings.autoencoder)
            try:
                _write_twin(path, photo["path"], settings, autoencode, np.random.default_rng(int(name, 16)))
            except ImageError:
                passed_over += 1
                continue
        facts = {"path": str(path), "label": 1, "mask_path": None, "split": photo["split"], "kind": "full"}
        names = {"source": f"aligned/{photo['source']}", "generator": settings.autoencoder, "method": "aligned"}
        rows.append(facts | names | {"group": photo["group"]})
    if passed_over:
        print(f"{passed_over} photograph(s) could not be read and have no twin")
    return pd.DataFrame(rows, columns=COLUMNS)


def kept_in(name: str, settings: Aligned | Forgeries, rule: int) -> Path:
    """The folder of what is made by these settings, this rule, and the autoencoder whose code is as it is now."""
    if settings.autoencoder == "own":
        from forensics_lib.synthesis.autoencoder import WEIGHTS as code
    else:
        code = source_of(settings.autoencoder)
    made_by = hashlib.sha256(code.read_bytes()).hexdigest() if code else None
    facts = settings.model_dump(exclude={"count"}) | {"rule": rule, "code": made_by}
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return home() / "outputs" / ".cache" / name / key


def _write_twin(path: Path, photo: str, settings: Aligned, autoencode: Autoencode, rng: np.random.Generator) -> None:
    whole_photo = read_image(photo)
    image = random_square(whole_photo, SIDE, rng, BLOCK)  # so that both files' blocks begin in the same places
    twin = autoencode(image)
    if twin.shape != image.shape or twin.dtype != np.uint8:
        raise ValueError(
            f"aligned.autoencoder: {settings.autoencoder} made {twin.dtype} {twin.shape} of uint8 {image.shape}; "
            "it must return an image of the same shape and type"
        )
    share = rng.uniform(0, MIX)
    mixed = share * image + (1 - share) * twin.astype(np.float32)
    if np.ptp(image, axis=2).max() <= 2:  # a grey photograph's twin is grey; WebP leaves grey so
        mixed = mixed.mean(axis=2, keepdims=True).repeat(3, axis=2)
    mode, options = _encoding_of(photo, whole_photo)
    with atomic_write(path) as temporary:
        Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8)).convert(mode).save(temporary, **options)


def _encoding_of(photo: str, pixels: np.ndarray) -> tuple[str, dict[str, Any]]:
    """The mode and the options to store a twin with: as its photograph was compressed, where its file tells."""
    with open_image(photo) as image:
        if image.format in ("JPEG", "MPO"):  # an MPO is a JPEG that others follow
            mode = image.mode if image.mode in ("L", "CMYK") else "RGB"
            stored_as_rgb = mode == "RGB" and image.info.get("adobe_transform") == 0
            options = {"subsampling": _subsampling(image.layer), "progressive": "progressive" in image.info}
            return mode, options | {"format": "JPEG", "qtables": image.quantization, "keep_rgb": stored_as_rgb}
        if image.format == "WEBP":
            image.fp.seek(0)
            data = image.fp.read()
            options = {"lossless": True, "exact": True} if _lossless(data) else {"quality": _webp_quality(pixels, len(data))}
            return "RGB", {"format": "WEBP"} | options
        return "RGB", {"format": "PNG"}


def _subsampling(components: list[tuple[int, int, int, int]]) -> int:
    """4:4:4, 4:2:2 or 4:2:0 (0, 1, 2), whichever has a JPEG's share of colour samples; Pillow writes no others.

    A component is its number, its horizontal and its vertical sampling, and its table.
    """
    if len(components) != 3:
        return 0
    share = components[0][1] * components[0][2] / (components[1][1] * components[1][2])
    return 0 if share < 2 else 1 if share < 4 else 2


def _lossless(data: bytes) -> bool:
    """Whether a WebP file's first picture is stored without loss."""
    place = 12
    while place + 8 <= len(data):
        name, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8L"
        place += 8 + length + length % 2
    return False


def _webp_quality(pixels: np.ndarray, length: int) -> int:
    """The WebP quality that makes an image as large as ``length`` bytes, or comes nearest: what it had already been."""

    def size(quality: int) -> int:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "WEBP", quality=quality)
        return buffer.getbuffer().nbytes

    return min(100, 1 + bisect_left(range(1, 101), length, key=size))


def make_forgeries(photos: pd.DataFrame, settings: Forgeries, autoencode: Autoencode | None = None) -> pd.DataFrame:
    """Forgeries of authentic images by all ``METHODS`` in turn: rows with ``layouts.COLUMNS`` and their photograph's group.

    Donors are photographs of the same table.  Images and masks are PNG in ``outputs/.cache/forgeries``, made again only
    where photographs, settings or the autoencoder's code changed; the same photographs give the same forgeries.
    Unreadable ones are passed over.
    """
    drawn = photos.sample(min(settings.count, len(photos)), random_state=0).sort_index()
    folder = kept_in("forgeries", settings, FORGERY_VERSION)
    rows, passed_over = [], 0
    for number, photo in enumerate(progress(drawn.to_dict("records"), "forgeries")):
        donor, method = drawn.iloc[(number + 1) % len(drawn)]["path"], METHODS[number % len(METHODS)]
        name = hashlib.sha256(f"{photo['path']} {photo['bytes']} {donor} {method}".encode()).hexdigest()[:20]
        path, mask_path = folder / f"{name}.png", folder / f"{name}_mask.png"
        if not (path.is_file() and mask_path.is_file()):
            autoencode = autoencode or load_autoencode(settings.autoencoder)
            try:
                rng = np.random.default_rng(int(name, 16))
                images = [random_square(read_image(source), SIDE, rng) for source in (photo["path"], donor)]
            except ImageError:
                passed_over += 1
                continue
            forgery = forge(*images, method, autoencode, rng)
            for target, pixels in ((path, forgery.image), (mask_path, forgery.mask.astype(np.uint8) * 255)):
                with atomic_write(target) as temporary:
                    Image.fromarray(pixels).save(temporary, format="PNG")
        facts = {"path": str(path), "label": 1, "mask_path": str(mask_path), "split": photo["split"]}
        names = {"source": f"forged/{photo['source']}", "generator": settings.autoencoder, "method": method}
        rows.append(facts | names | {"kind": "fr" if method == "whole" else "sp", "group": photo["group"]})
    if passed_over:
        print(f"{passed_over} photograph(s) could not be read and give no forgery")
    return pd.DataFrame(rows, columns=COLUMNS)
