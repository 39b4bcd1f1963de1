"""The only place that opens image files: one policy, the same in training and inference.

- Pixels are taken as they are stored: orientation (EXIF, TIFF) is not applied, since traces and masks live on the stored
  grid.  HEIC alone is turned: its decoder does so.
- Every mode becomes 8-bit RGB: alpha is dropped, palettes are looked up, CMYK is converted, the first frame of an animation
  or page of a TIFF counts.  Grey of more than 8 bits is scaled from black to white and rounded, floats from 0 to 1; colours
  of 16 bits keep their upper byte, as Pillow's decoders do it.
- What has no known white is an error, never black or noise: integers with a sign or of 32 bits, floats outside of [0, 1].
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

from forensics_lib.images.parquet import member_bytes
from forensics_lib.utils.disk import LFS_POINTER, is_lfs_pointer, shown, why_no_file

MAX_PIXELS = 250_000_000
STRIP = 128  # rows that are copied at a time
EMPTY_MASK = "the mask marks nothing"
GREY_SPREAD = 16  # between the channels of a pixel that counts as grey in a mask, as lossy codecs leave it
MAX_IDS = 32  # distinct values that may be numbers of objects; masks with more have soft edges
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


class _Unusable(ValueError):
    """What a file holds cannot be used; ``open_image`` adds the file's name."""


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
                if image.format == "TIFF":
                    _prepare_tiff(image)
                if image.format == "BMP":
                    _refuse_packed_greys(image)
                yield image
    except ImageError:
        raise
    except _Unusable as error:
        raise ImageError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        if is_lfs_pointer(name):
            raise ImageError(f"{name}: {LFS_POINTER}") from None
        raise ImageError(f"{name}: not an image that Pillow can read{_hint(name, data)}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise ImageError(f"{name}: {type(error).__name__}: {error}") from None


def _hint(name: str, data: bytes | None) -> str:
    """What can be done about a file that is no image to Pillow; empty where nothing is known."""
    if name.lower().endswith((".heic", ".heif", ".hif")):
        return "; for heic, pip install pillow-heif"
    with io.BytesIO(data) if data is not None else Path(name).open("rb") as file:
        if file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return ": a TIFF of an unusual kind, such as floats of 16 bits or colours with a sign; save it with 8 or 16 bits"
    return ""


def _prepare_tiff(image: Image.Image) -> None:
    """Keep a TIFF on its stored grid, which Pillow would turn; raises ``_Unusable`` where Pillow would read it wrongly."""
    tags, compressed = image.tag_v2, image.info.get("compression") != "raw"
    bits, sample_format = max(tags.get(258, (1,))), max(tags.get(339, (1,)))
    whites_zero, planes = tags.get(262, 0) == 0, tags.get(284, 1) == 2
    kind = f"a TIFF of {bits}-bit {({2: 'integers with a sign', 3: 'floats'}).get(sample_format, 'integers')}"
    if sample_format == 2 or (bits == 32 and sample_format != 3):
        raise _Unusable(f"{kind} has no known white; save it with 8 or 16 bits")
    if whites_zero and bits > 8:
        raise _Unusable(f"{kind} whose zero is white is not read; save it with zero as black")
    if planes and not compressed and (bits != 8 or whites_zero):
        raise _Unusable(f"{kind} in separate planes is not read; save it with interleaved colours")
    if sample_format == 3 and compressed and tags.prefix == b"MM":
        raise _Unusable(f"{kind}, compressed and big-endian, is not read; save it little-endian")
    image.getexif()[0x0112] = 1
    image._size = tags[256], tags[257]  # width and height; Pillow tells those of the turned picture


def _refuse_packed_greys(image: Image.Image) -> None:
    """Raise ``_Unusable`` of a BMP whose palette makes Pillow unpack its pixels at another depth than they have."""
    place = image.fp.tell()
    image.fp.seek(14)
    header = image.fp.read(16)
    image.fp.seek(place)
    at = 10 if header[:4] == b"\x0c\0\0\0" else 14  # OS/2's header has shorter sizes
    bits = int.from_bytes(header[at : at + 2], "little")
    if {"1": 1, "L": 8}.get(image.mode, bits) != bits:
        raise _Unusable(f"a BMP of {bits} bits with a short grey palette is not read; save it as PNG, or with all 256 greys")


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
            _to_rgb(image)  # refuses what has no known white
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
            grey = _to_rgb(image).convert("L").resize((64, 64), Image.Resampling.BOX)
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


def as_file(image: Image.Image | np.ndarray) -> bytes:
    """An open image, or pixels of ``(H, W, 3)`` or ``(H, W)`` uint8, as a file that ``read_image`` reads to the same pixels.

    Raises ``ImageError``.
    """
    try:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.load()
        file = io.BytesIO()
        _to_rgb(image).save(file, "PPM")
        return file.getvalue()
    except Exception as error:  # as in open_image
        told = str(error) if isinstance(error, _Unusable) else f"{type(error).__name__}: {error}"
        raise ImageError(told) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_bytes(*_deep(image))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # looks the palette up without blending
    return image.convert("RGB")


def _deep(image: Image.Image) -> tuple[np.ndarray, int]:
    """The grey values ``(H, W)`` of an image of more than 8 bits, and its white; black is 0.  Raises ``_Unusable``."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        if not (low >= 0 and high <= 1):  # also where they are not finite
            raise _Unusable(f"floats from {low:g} to {high:g} have no known white; they must lie in [0, 1]")
        return values, 1
    twelve = image.format == "TIFF" and max(image.tag_v2.get(258, (16,))) == 12
    return values, 4095 if twelve else 65535


def _to_bytes(values: np.ndarray, white: int) -> np.ndarray:
    """Values from 0 to ``white`` as the nearest of 256 grey levels, uint8."""
    if values.dtype.kind == "f":
        return (values * 255).round().astype(np.uint8)
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def read_mask(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """A ground-truth mask as ``(H, W)`` bool, True where the image was manipulated.

    A mask is a grey picture of its image's ``size`` (height, width): black where nothing was changed, white where the image
    was manipulated.  Grey values of at least half of the file's white (128 of 8 bits, 32,768 of 16, 0.5 of floats) count as
    manipulated; in a file of integers with nothing above 1, the ones do.  Palettes are looked up, so a palette's colours
    count and not their numbers.  Whatever else a file may mean is never guessed.  Raises ``ImageError`` where

    - the sizes differ, or nothing is marked;
    - nothing reaches half of white (0 and 2, 0 and 100, 0 and 255 of 16 bits);
    - there are more than two values and none is near white, or few that cover areas of their own (numbers of objects or
      classes, a value that is to be ignored); soft edges and what a lossy codec leaves beside them are no areas;
    - colours are told apart (red on black, an overlay);
    - colours of 16 bits do not reach half of white, since their lower bytes are not decoded;
    - an alpha channel marks other pixels than the colours do (a mask in the alpha channel).
    """
    return _mask_and_distinct(path, size)[0]


def mask_facts(path: str | Path, size: tuple[int, int]) -> tuple[float, int]:
    """The share of manipulated pixels of a mask, and how many grey values its file has.  Raises as ``read_mask`` does."""
    mask, distinct = _mask_and_distinct(path, size)
    return float(mask.mean()), len(distinct)


def _mask_and_distinct(path: str | Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The mask ``(H, W)`` bool and the distinct grey values of its file, in order."""
    with open_image(path) as image:
        deep_colours = _has_deep_colours(image)
        image.load()
        if (image.height, image.width) != size:
            raise _Unusable(f"mask of {image.width} x {image.height} for an image of {size[1]} x {size[0]} pixels")
        values, white = _mask_values(image)
        high = values.max(initial=0)
        mask = values >= (white / 2 if high > 1 or image.mode == "F" else 1)
        _refuse_alpha(image, mask)
        if deep_colours and high < white / 2:
            raise _Unusable("the mask has colours of 16 bits that do not reach half of white; save it in grey of 8 bits")
        if not high:
            raise _Unusable(f"{EMPTY_MASK}, but its image is listed as manipulated")
        distinct = np.unique(values) if image.mode == "F" else np.flatnonzero(np.bincount(values.ravel()))
        unclear = high < 0.9 * white and high > 1 and len(distinct) > 2
        if not mask.any() or unclear or _are_ids(values, distinct):
            raise _Unusable(
                f"the mask has the values {_listed(distinct)} of 0 to {white}: it is not clear what is manipulated; "
                f"save it with 0 where nothing was changed and {white} where the image was manipulated"
            )
        return mask, distinct


def _has_deep_colours(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has colours of more than 8 bits, of which Pillow keeps the upper ones."""
    if image.mode.startswith("I") or image.mode == "F":
        return False
    if image.format == "PPM":
        return any(isinstance(tile[3], tuple) and tile[3][1] > 255 for tile in image.tile)  # its mode and its white
    return any(";16" in str(tile[3]) for tile in image.tile)


def _are_ids(values: np.ndarray, distinct: np.ndarray) -> bool:
    """Whether few values between black and white cover areas of 3 x 3 pixels or more, as numbers of objects do.

    At least half of those between must: of a soft edge, and beside an edge in a lossy file, most cover none.
    """
    between = distinct[1:-1]
    if not len(between) or len(distinct) > MAX_IDS:
        return False
    flat = np.ones((max(0, values.shape[0] - 2), max(0, values.shape[1] - 2)), bool)
    centre = values[1:-1, 1:-1]
    for top in range(3):
        for left in range(3):
            flat &= centre == values[top : top + flat.shape[0], left : left + flat.shape[1]]
    return 2 * np.isin(between, centre[flat]).sum() >= len(between)


def _mask_values(image: Image.Image) -> tuple[np.ndarray, int]:
    """The grey values ``(H, W)`` of a mask's file, and its white.  Raises ``_Unusable`` where it has colours."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep(image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L")), 255
    rgb = np.asarray(_to_rgb(image))
    grey, lowest = rgb.max(axis=2), rgb.min(axis=2)
    if (grey - lowest).max(initial=0) > GREY_SPREAD:
        raise _Unusable("the mask has colours; save it in grey, black where nothing was changed and white where it was")
    return grey, 255


def _refuse_alpha(image: Image.Image, mask: np.ndarray) -> None:
    """Raise ``_Unusable`` where an alpha channel marks other pixels than the colours' ``mask`` does."""
    if image.mode != "La" and not image.has_transparency_data:
        return
    alpha = np.asarray(image.convert("LA" if image.mode == "La" else "RGBA").getchannel("A"))
    opaque = alpha > (int(alpha.min()) + int(alpha.max())) / 2
    if alpha.min() < alpha.max() and not (np.array_equal(opaque, mask) or np.array_equal(opaque, ~mask)):
        raise _Unusable(
            "the mask's alpha channel marks other pixels than its colours do; save it in grey without alpha, "
            "black where nothing was changed and white where it was"
        )


def _listed(distinct: np.ndarray, count: int = 5) -> str:
    """Distinct values in words, at most ``count`` of them."""
    found = [f"{value:g}" for value in distinct]
    return ", ".join(found if len(found) <= count else [*found[: count - 1], "...", found[-1]])


def random_square(image: np.ndarray, side: int, rng: np.random.Generator, step: int = 1) -> np.ndarray:
    """A random square of at most ``side`` of ``(H, W, 3)``, that begins at multiples of ``step``: all of a smaller image."""
    top, left = (step * int(rng.integers(max(0, length - side) // step + 1)) for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def pad_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pad ``(H, W, ...)`` at its lower and right side by reflection to at least ``height`` x ``width``."""
    missing = [(0, max(0, height - image.shape[0])), (0, max(0, width - image.shape[1]))]
    if not any(after for _, after in missing):
        return image
    return np.pad(image, missing + [(0, 0)] * (image.ndim - 2), mode="symmetric")
