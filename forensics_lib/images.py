"""The only place that opens image files: one policy, the same in training and inference.

- Pixels are taken as they are stored: EXIF orientation is not applied, since traces and masks live on the stored grid.
- Every mode becomes 8-bit RGB: alpha is dropped, palettes are looked up, CMYK is converted, 16-bit values keep their
  upper byte, the first frame of an animation counts.
- A truncated file is an error, never a half-grey image; so is one of more than ``MAX_PIXELS`` pixels.
- The content decides what a file is, not its name, and only ``FORMATS`` are opened: others that Pillow knows would start
  programs (PostScript) or open further files.  HEIC needs the package pillow-heif.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from forensics_lib.parquet import member_bytes

MAX_PIXELS = 250_000_000
STRIP = 128  # rows that are copied at a time
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".mpo", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif",
    ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
    ".jpg_large", ".jpg_orig", ".jpg_medium", ".jpg_small", ".png_large", ".png_orig",  # as saved from Twitter
})  # fmt: skip
_WEAK_MAGIC = {"BMP", "PPM"}  # begin with two ordinary letters, as a text may

Image.MAX_IMAGE_PIXELS = None  # the check below replaces Pillow's, which only warns between one and two times its limit

Region = Callable[[int, int], tuple[slice, slice]]  # of height and width: the rows and the columns, with both ends


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names the file and the cause."""


@dataclass(frozen=True)
class Header:
    """What an image file says of itself without decoding its pixels."""

    width: int
    height: int
    format: str  # as Pillow names it: JPEG, PNG, WEBP, ...
    jpeg_quality: float | None = None  # 1 to 100 as libjpeg counts, estimated; None for other formats
    camera: bool = False  # whether EXIF names a camera's make or model
    bytes: int = 0


@contextmanager
def open_image(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Open an image, and turn everything that can go wrong with it into ``ImageError``."""
    name = "image bytes" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else member_bytes(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken metadata: the pixels decide
            if data is None and not Path(name).is_file():
                raise ImageError(f"{name}: no such file, a broken link, or no file at all")
            with Image.open(name if data is None else io.BytesIO(data), formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")
                yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        hint = "; for heic, pip install pillow-heif" if name.lower().endswith((".heic", ".heif", ".hif")) else ""
        raise ImageError(f"{name}: not an image that Pillow can read{hint}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise ImageError(f"{name}: {type(error).__name__}: {error}") from None


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """Those of ``FORMATS`` that can be decoded here."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return [form for form in FORMATS if form in Image.OPEN]


def is_image(path: str | Path) -> bool:
    """Whether a file begins as an image of ``FORMATS`` does, whatever its name; what follows may still be damaged."""
    try:
        if not Path(path).is_file():
            return False  # opening a pipe would wait for ever
        with Path(path).open("rb") as file:
            start = file.read(16)
    except OSError:
        return False
    formats = {form for form in _formats() if (accepts := Image.OPEN[form][1]) and accepts(start)}
    if formats - _WEAK_MAGIC or not formats:
        return bool(formats)
    try:
        with open_image(path):
            return True
    except ImageError:
        return False


def has_image_ending(name: str) -> bool:
    """Whether a name ends as an image's, also where a download added something: ``a.JPG``, ``a.jpg:large``, ``a.jpeg%20``."""
    ending = name[name.rfind(".") :].lower() if "." in name else ""
    return ending in SUFFIXES or re.split(r"[^a-z0-9.]", ending, maxsplit=1)[0] in SUFFIXES


def read_header(source: str | Path | bytes, *, complete: bool = False) -> Header:
    """What a file says of itself, read without decoding it.  Raises ``ImageError``.

    With ``complete`` a truncated file is an error too: it is told by its format's end mark, and where the mark is not in
    its place, or the format has none, by decoding.
    """
    with open_image(source) as image:
        tables = getattr(image, "quantization", None)
        length, ended = _length_and_end(image)
        readable = image.format != "PNG" or "exif" in image.info  # else Pillow would decode a PNG to its end for it
        camera = readable and bool({0x010F, 0x0110} & set(image.getexif()))
        if complete and not ended:
            image.load()
        quality = _quality(tuple(tables[min(tables)])) if tables else None
        form = "JPEG" if image.format == "MPO" else image.format or ""  # an MPO is a JPEG that others follow
        return Header(image.width, image.height, form, quality, camera, length)


def _length_and_end(image: Image.Image) -> tuple[int, bool]:
    """The file's length in bytes, and whether it ends as its format says it must; False where only decoding can tell."""
    place, length = image.fp.tell(), image.fp.seek(0, os.SEEK_END)
    ended = False
    if image.format == "WEBP":  # a RIFF container: its second word is the length of what follows
        image.fp.seek(4)
        ended = int.from_bytes(image.fp.read(4), "little") + 8 <= length
    elif image.format in ("JPEG", "PNG"):
        image.fp.seek(max(0, length - 32))
        ended = (b"IEND" if image.format == "PNG" else b"\xff\xd9") in image.fp.read(32)
    image.fp.seek(place)
    return length, ended


def facts_of(paths: list[str]) -> list[tuple]:
    """Width, height, format, JPEG quality, camera, bytes, error of each file; the others are None where there is one."""
    return [_facts_of(path) for path in paths]


def _facts_of(path: str) -> tuple:
    try:
        header = read_header(path, complete=True)
        return header.width, header.height, header.format, header.jpeg_quality, header.camera, header.bytes, None
    except ImageError as error:
        return None, None, None, None, None, None, str(error)


def hashes_of(paths: list[str]) -> list[tuple[int | None]]:
    """The 64-bit perceptual hash of each image (pHash, the signs of low DCT frequencies); None where it means nothing.

    That is where a file cannot be read, and where a picture is flat.
    """
    return [(_hash_of(path),) for path in paths]


def _hash_of(path: str) -> int | None:
    from imagehash import phash  # imports scipy and wavelets, which nothing else here needs

    try:
        with open_image(path) as image:
            image.draft("L", (128, 128))  # JPEG decodes at a fraction of its size: the hash looks at 32 x 32 pixels
            grey = image.convert("L").resize((64, 64), Image.Resampling.BOX)
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
    """The quality, as libjpeg counts, whose scaling of the standard table comes nearest to a file's luminance table."""
    found = np.sort(np.asarray(table, float))  # Pillow's order of entries has changed; their values have not
    scale = float(np.median(found / np.sort(_STANDARD))) * 100
    return round(100 - scale / 2 if scale <= 100 else 5000 / scale, 1)


def read_image(source: str | Path | bytes, region: Region | None = None) -> np.ndarray:
    """An image as ``(H, W, 3)`` uint8 RGB, by the policy above; of ``region`` alone where one is given.

    ``region`` is asked, with the image's height and width, for the rows and columns that are wanted: all pixels are decoded,
    so that a damaged file is an error wherever it is damaged, but no others are copied.  Raises ``ImageError``.
    """
    with open_image(source) as image:
        image.load()
        rgb = _to_rgb(image)
        rows, columns = region(rgb.height, rgb.width) if region else (slice(0, rgb.height), slice(0, rgb.width))
        pixels = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)
        for top in range(rows.start, rows.stop, STRIP):  # strips stay in the processor's cache: a third of the time
            bottom = min(top + STRIP, rows.stop)
            pixels[top - rows.start : bottom - rows.start] = rgb.crop((columns.start, top, columns.stop, bottom))
        return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # looks the palette up without blending
    return image.convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """16-bit integers keep the upper byte; floats in [0, 1] are scaled, others are clipped to [0, 255]."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, posinf=255, neginf=0)
        return (values * 255 if values.max(initial=0) <= 1 else values).clip(0, 255).astype(np.uint8)
    return (values.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)


def read_mask(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """A ground-truth mask as ``(H, W)`` bool, True where the image was manipulated.

    Grey values of at least half the range count as manipulated; files with nothing above 1 hold 0 and 1.  ``size`` is
    the image's (height, width).  Raises ``ImageError`` where the sizes differ or nothing is marked.
    """
    grey = read_image(path).max(axis=2)
    if grey.shape != size:
        raise ImageError(f"{path}: mask of {grey.shape[1]} x {grey.shape[0]} for an image of {size[1]} x {size[0]} pixels")
    mask = grey > (127 if grey.max(initial=0) > 1 else 0)
    if not mask.any():
        raise ImageError(f"{path}: the mask marks nothing, but its image is listed as manipulated")
    return mask


def random_square(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of at most ``side`` of ``(H, W, 3)``: all of a smaller image."""
    top, left = (int(rng.integers(max(0, length - side) + 1)) for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def pad_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pad ``(H, W, ...)`` at its lower and right side by reflection to at least ``height`` x ``width``."""
    missing = [(0, max(0, height - image.shape[0])), (0, max(0, width - image.shape[1]))]
    if not any(after for _, after in missing):
        return image
    return np.pad(image, missing + [(0, 0)] * (image.ndim - 2), mode="symmetric")
