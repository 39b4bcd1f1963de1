"""The only place that opens image files: one policy, the same in training and inference.

- Pixels are taken as they are stored: orientation (EXIF, TIFF) is not applied, since traces and masks live on the stored
  grid.  HEIC alone is turned: its decoder does so.
- Every mode becomes 8-bit RGB: alpha is dropped, palettes are looked up, CMYK is converted, the first frame of an animation
  or page of a TIFF counts.  Grey of more than 8 bits is scaled from black to white and rounded, floats from 0 to 1; colours
  of 16 bits keep their upper byte, as Pillow's decoders do it.
- Pixels without a known white are an error, never black or noise: signed or 32-bit integers, floats outside of [0, 1].
- A truncated file is an error, never a half-grey image; so is one of more than ``MAX_PIXELS`` pixels.
- The content decides what a file is, not its name, and only ``FORMATS`` are opened: other formats of Pillow would start
  programs (PostScript) or open further files.  HEIC needs the package pillow-heif.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from forensics_lib.images.parquet import member_bytes
from forensics_lib.utils.files import LFS_POINTER, is_lfs_pointer, shown, why_no_file

MAX_PIXELS = 250_000_000
STRIP = 128  # rows copied at a time
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".mpo", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif",
    ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
    ".jpg_large", ".jpg_orig", ".jpg_medium", ".jpg_small", ".png_large", ".png_orig",  # as saved from Twitter
})  # fmt: skip
_WEAK_MAGIC = {"BMP", "PPM"}  # their signature is two ordinary letters, which may begin a text file too

Image.MAX_IMAGE_PIXELS = None  # the check below replaces Pillow's, which only warns between one and two times its limit


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names the file and the cause."""


class UnusableImage(ValueError):
    """The content of a file cannot be used; ``open_image`` adds the file's name to the message."""


@contextmanager
def open_image(source: str | Path | bytes) -> Iterator[ImageFile]:
    """Open an image; every failure, also within the block, becomes ``ImageError``."""
    name = "image bytes" if isinstance(source, bytes) else shown(source)
    try:
        data = source if isinstance(source, bytes) else member_bytes(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken metadata: the pixels decide
            if data is None and not Path(name).is_file():
                raise ImageError(f"{name}: {why_no_file(name)}")
            with Image.open(name if data is None else io.BytesIO(data), formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")
                if isinstance(image, TiffImageFile):
                    _prepare_tiff(image)
                if image.format == "BMP":
                    _refuse_packed_greys(image)
                yield image
    except ImageError:
        raise
    except UnusableImage as error:
        raise ImageError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        if is_lfs_pointer(name):
            raise ImageError(f"{name}: {LFS_POINTER}") from None
        raise ImageError(f"{name}: not an image that Pillow can read{_hint(name, data)}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise ImageError(f"{name}: {type(error).__name__}: {error}") from None


def _hint(name: str, data: bytes | None) -> str:
    """The remedy for a file that Pillow does not recognise; empty if none is known."""
    if name.lower().endswith((".heic", ".heif", ".hif")):
        return "; for heic, pip install pillow-heif"
    with io.BytesIO(data) if data is not None else Path(name).open("rb") as file:
        start = file.read(4)
        if not start:
            return ": the file is empty"
        if start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return ": a TIFF of an unusual kind, such as floats of 16 bits or colours with a sign; save it with 8 or 16 bits"
    return ""


def _prepare_tiff(image: TiffImageFile) -> None:
    """Keep a TIFF on its stored grid, which Pillow would rotate; raises ``UnusableImage`` if Pillow would misread it."""
    tags, compressed = image.tag_v2, image.info.get("compression") != "raw"
    bits, sample_format = max(tags.get(258, (1,))), max(tags.get(339, (1,)))
    whites_zero, planes = tags.get(262, 0) == 0, tags.get(284, 1) == 2
    kind = f"a TIFF of {bits}-bit {({2: 'integers with a sign', 3: 'floats'}).get(sample_format, 'integers')}"
    if sample_format == 2 or (bits == 32 and sample_format != 3):
        raise UnusableImage(f"{kind} has no known white; save it with 8 or 16 bits")
    if whites_zero and bits > 8:
        raise UnusableImage(f"{kind} whose zero is white is not read; save it with zero as black")
    if planes and not compressed and (bits != 8 or whites_zero):
        raise UnusableImage(f"{kind} in separate planes is not read; save it with interleaved colours")
    if sample_format == 3 and compressed and tags.prefix == b"MM":
        raise UnusableImage(f"{kind}, compressed and big-endian, is not read; save it little-endian")
    image.getexif()[0x0112] = 1
    image._size = tags[256], tags[257]  # width and height; Pillow gives those of the rotated picture


def stream_of(image: ImageFile) -> IO[bytes]:
    """The open file behind an image that is not loaded yet."""
    if image.fp is None:
        raise ValueError("the image's file is closed")
    return image.fp


def _refuse_packed_greys(image: ImageFile) -> None:
    """Raise ``UnusableImage`` for a BMP whose palette makes Pillow unpack its pixels at a wrong bit depth."""
    file = stream_of(image)
    place = file.tell()
    file.seek(14)
    header = file.read(16)
    file.seek(place)
    at = 10 if header[:4] == b"\x0c\0\0\0" else 14  # OS/2's header has shorter fields
    bits = int.from_bytes(header[at : at + 2], "little")
    if {"1": 1, "L": 8}.get(image.mode, bits) != bits:
        raise UnusableImage(
            f"a BMP of {bits} bits with a short grey palette is not read; save it as PNG, or with all 256 greys"
        )


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """The ``FORMATS`` that this installation can decode."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return [form for form in FORMATS if form in Image.OPEN]


def is_image(path: str | Path) -> bool:
    """Whether a file's signature is that of one of ``FORMATS``, whatever its name; its pixels may still be damaged."""
    try:
        if not Path(path).is_file():
            return False  # opening a pipe would block
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
    """Whether a name has an image's ending, also with a download's suffix: ``a.JPG``, ``a.jpg:large``, ``a.jpeg%20``."""
    ending = name[name.rfind(".") :].lower() if "." in name else ""
    return ending in SUFFIXES or re.split(r"[^a-z0-9.]", ending, maxsplit=1)[0] in SUFFIXES


def read_image(source: str | Path | bytes) -> np.ndarray:
    """Read an image by this module's policy: RGB pixels, ``(H, W, 3)`` uint8.

    ``source`` is a file's path, the path of a member of a parquet file, or an encoded image.  Raises ``ImageError``, which
    names the file and the cause.
    """
    with open_image(source) as image:
        rgb = decoded(image)
        return pixels_in(rgb, slice(0, rgb.height), slice(0, rgb.width))


def decoded(image: ImageFile) -> Image.Image:
    """Decode all of an open image, to RGB, so that any damage is an error."""
    image.load()
    return to_rgb(image)


def pixels_in(rgb: Image.Image, rows: slice, columns: slice) -> np.ndarray:
    """A region of a decoded image, ``(rows, columns, 3)`` uint8."""
    pixels = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)
    for top in range(rows.start, rows.stop, STRIP):  # strips fit in the processor's cache: a third of the time
        bottom = min(top + STRIP, rows.stop)
        pixels[top - rows.start : bottom - rows.start] = rgb.crop((columns.start, top, columns.stop, bottom))
    return pixels


def as_file(image: Image.Image | np.ndarray) -> bytes:
    """Encode an open image, or pixels ``(H, W, 3)`` or ``(H, W)`` uint8, losslessly; ``read_image`` gives the same pixels.

    Raises ``ImageError``.
    """
    try:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if isinstance(image, TiffImageFile) and image.fp is not None and image.tile:  # not loaded yet
            _prepare_tiff(image)
        image.load()
        file = io.BytesIO()
        to_rgb(image).save(file, "PPM")
        return file.getvalue()
    except Exception as error:  # as in open_image
        told = str(error) if isinstance(error, UnusableImage) else f"{type(error).__name__}: {error}"
        raise ImageError(told) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to 8-bit RGB.  Raises ``UnusableImage``."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values, white = grey_values(image)
        floats = values.dtype.kind == "f"
        grey = (values * 255).round() if floats else (values.astype(np.uint32) * 255 + white // 2) // white  # rounded too
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # looks the palette up without blending
    return image.convert("RGB")


def grey_values(image: Image.Image) -> tuple[np.ndarray, int]:
    """The grey values ``(H, W)`` of an image of more than 8 bits, and its white; black is 0.  Raises ``UnusableImage``."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        if not (low >= 0 and high <= 1):  # also where they are not finite
            raise UnusableImage(f"floats from {low:g} to {high:g} have no known white; they must lie in [0, 1]")
        return values, 1
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise UnusableImage(f"integers from {values.min()} to {values.max()} have no known white; they must have 16 bits")
    twelve = isinstance(image, TiffImageFile) and max(image.tag_v2.get(258, (16,))) == 12
    return values, 4095 if twelve else 65535
