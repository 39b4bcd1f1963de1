"""Image headers and perceptual hashes, without decoding files in full."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from forensics_lib.images.io import ImageError, open_image, stream_of, to_rgb


@dataclass(frozen=True)
class Header:
    """Properties of an image file that need no decoding."""

    width: int
    height: int
    format: str  # as Pillow names it: JPEG, PNG, WEBP, ...
    jpeg_quality: float | None = None  # 1 to 100 on libjpeg's scale, estimated; None for other formats
    camera: bool = False  # whether EXIF names a camera's make or model
    bytes: int = 0


def read_header(source: str | Path | bytes, *, complete: bool = False) -> Header:
    """Read the header of an image (as ``read_image`` takes it) without decoding its pixels.  Raises ``ImageError``.

    With ``complete`` a truncated file is an error as well.  It is recognised by its format's end marker, and by decoding where
    the marker is missing or the format has none.
    """
    with open_image(source) as image:
        tables = getattr(image, "quantization", None)
        length, ended = _length_and_end(image)
        readable = image.format != "PNG" or "exif" in image.info  # else Pillow would decode all of a PNG to look for EXIF
        camera = readable and bool({0x010F, 0x0110} & set(image.getexif()))
        if complete and not ended:
            image.load()
            to_rgb(image)  # an error where white is unknown
        quality = _quality(tuple(tables[min(tables)])) if tables else None
        form = "JPEG" if image.format == "MPO" else image.format or ""  # an MPO is a JPEG followed by others
        return Header(image.width, image.height, form, quality, camera, length)


def _length_and_end(image: ImageFile) -> tuple[int, bool]:
    """The file's length in bytes, and whether its end marker is there; False if only decoding can tell."""
    file = stream_of(image)
    place, length = file.tell(), file.seek(0, os.SEEK_END)
    ended = False
    if image.format == "WEBP":  # a RIFF container: its second word is the length of the rest
        file.seek(4)
        ended = int.from_bytes(file.read(4), "little") + 8 <= length
    elif image.format in ("JPEG", "PNG"):
        file.seek(max(0, length - 32))
        ended = (b"IEND" if image.format == "PNG" else b"\xff\xd9") in file.read(32)
    file.seek(place)
    return length, ended


def facts_of(paths: list[str]) -> list[tuple]:
    """Width, height, format, JPEG quality, camera, bytes and error of each file; with an error the others are None."""
    facts: list[tuple] = []
    for path in paths:
        try:
            header = read_header(path, complete=True)
            facts.append((header.width, header.height, header.format, header.jpeg_quality, header.camera, header.bytes, None))
        except ImageError as error:
            facts.append((None, None, None, None, None, None, str(error)))
    return facts


def hashes_of(paths: list[str]) -> list[tuple[int | None]]:
    """The 64-bit perceptual hash of each image (pHash: the signs of low DCT frequencies).

    None for unreadable files, and for flat pictures, whose hash is noise.
    """
    return [(_hash_of(path),) for path in paths]


def _hash_of(path: str) -> int | None:
    from imagehash import phash  # slow to import: scipy and wavelets

    try:
        with open_image(path) as image:
            image.draft("L", (128, 128))  # JPEG decodes at a fraction of its size: the hash uses 32 x 32 pixels
            grey = to_rgb(image).convert("L").resize((64, 64), Image.Resampling.BOX)
    except ImageError:
        return None
    return int(str(phash(grey)), 16) if np.asarray(grey).std() > 2 else None


# The luminance table of the JPEG standard (ITU T.81, annex K), in zigzag order
_STANDARD = np.array([
    16, 11, 12, 14, 12, 10, 16, 14, 13, 14, 18, 17, 16, 19, 24, 40, 26, 24, 22, 22, 24, 49, 35, 37, 29, 40, 58, 51, 61, 60, 57,
    51, 56, 55, 64, 72, 92, 78, 64, 68, 87, 69, 55, 56, 80, 109, 81, 87, 95, 98, 103, 104, 103, 62, 77, 113, 121, 112, 100,
    120, 92, 101, 103, 99,
])  # fmt: skip


@lru_cache(maxsize=4096)
def _quality(table: tuple[int, ...]) -> float:
    """The quality on libjpeg's scale whose luminance table is nearest to a file's."""
    found = np.sort(np.asarray(table, float))  # Pillow's order of entries has changed; their values have not
    scale = float(np.median(found / np.sort(_STANDARD))) * 100
    return round(100 - scale / 2 if scale <= 100 else 5000 / scale, 1)
