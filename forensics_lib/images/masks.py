"""Masks: reading ground truth, storing predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from forensics_lib.images.io import UnusableImage, grey_values, open_image, to_rgb
from forensics_lib.utils.files import atomic_write

EMPTY_MASK = "the mask marks nothing"
GREY_SPREAD = 16  # largest difference between the channels of a grey pixel, as lossy codecs leave it
MAX_IDS = 32  # most distinct values of a map of object ids; masks with more have soft edges


def read_mask(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """Read a ground-truth mask: a grey picture, black for authentic and white for manipulated pixels.

    Grey values of at least half of the file's white (128 for 8 bits, 32,768 for 16, 0.5 for floats) count as manipulated;
    in a file of integers with nothing above 1, the ones do.  Palettes are looked up.  Ambiguous files are refused.

    Args:
        path: the mask's file, or the path of a member of a parquet file.
        size: height and width of the mask's image, pixels.

    Returns:
        ``(H, W)`` bool, True for manipulated pixels.

    Raises:
        ImageError: the file cannot be read, or

            - the sizes differ, or nothing is marked;
            - nothing reaches half of white (0 and 2, 0 and 100, 0 and 255 of 16 bits);
            - there are more than two values and none is near white, or a few values cover areas (ids of objects or
              classes, an ignore value), unlike soft edges and the artefacts of lossy codecs beside them;
            - it has colours (red on black, an overlay);
            - 16-bit colours do not reach half of white, since their lower bytes are not decoded;
            - an alpha channel marks other pixels than the colours do (a mask in the alpha channel).
    """
    return _mask_and_distinct(path, size)[0]


def mask_facts(path: str | Path, size: tuple[int, int]) -> tuple[float, int]:
    """The share of manipulated pixels of a mask, and the number of grey values in its file.  Raises as ``read_mask`` does."""
    mask, distinct = _mask_and_distinct(path, size)
    return float(mask.mean()), len(distinct)


def _mask_and_distinct(path: str | Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The mask ``(H, W)`` bool, and the distinct grey values of its file, ascending."""
    with open_image(path) as image:
        deep_colours = _has_deep_colours(image)
        image.load()
        if (image.height, image.width) != size:
            raise UnusableImage(f"mask of {image.width} x {image.height} for an image of {size[1]} x {size[0]} pixels")
        values, white = _mask_values(image)
        high = values.max(initial=0)
        mask = values >= (white / 2 if high > 1 or image.mode == "F" else 1)
        _refuse_alpha(image, mask)
        if deep_colours and high < white / 2:
            raise UnusableImage("the mask has colours of 16 bits that do not reach half of white; save it in grey of 8 bits")
        if not high:
            raise UnusableImage(f"{EMPTY_MASK}, but its image is listed as manipulated")
        distinct = np.unique(values) if image.mode == "F" else np.flatnonzero(np.bincount(values.ravel()))
        unclear = high < 0.9 * white and high > 1 and len(distinct) > 2
        if not mask.any() or unclear or _are_ids(values, distinct):
            raise UnusableImage(
                f"the mask has the values {_listed(distinct)} of 0 to {white}: it is not clear what is manipulated; "
                f"save it with 0 where nothing was changed and {white} where the image was manipulated"
            )
        return mask, distinct


def _has_deep_colours(image: ImageFile) -> bool:
    """Whether an image that is not loaded yet has colours of more than 8 bits, of which Pillow keeps the upper 8."""
    if image.mode.startswith("I") or image.mode == "F":
        return False
    if image.format == "PPM":
        return any(isinstance(tile[3], tuple) and tile[3][1] > 255 for tile in image.tile)  # mode and white
    return any(";16" in str(tile[3]) for tile in image.tile)


def _are_ids(values: np.ndarray, distinct: np.ndarray) -> bool:
    """Whether values between black and white cover areas of 3 x 3 pixels or more, as ids of objects do.

    At least half of them must: most values of a soft edge, or of artefacts beside an edge in a lossy file, cover none.
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
    """The grey values ``(H, W)`` of a mask's file, and its white.  Raises ``UnusableImage`` for colours."""
    if image.mode.startswith("I") or image.mode == "F":
        return grey_values(image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L")), 255
    rgb = np.asarray(to_rgb(image))
    grey, lowest = rgb.max(axis=2), rgb.min(axis=2)
    if (grey - lowest).max(initial=0) > GREY_SPREAD:
        raise UnusableImage("the mask has colours; save it in grey, black where nothing was changed and white where it was")
    return grey, 255


def _refuse_alpha(image: Image.Image, mask: np.ndarray) -> None:
    """Raise ``UnusableImage`` if the alpha channel marks other pixels than the ``mask`` of the colours."""
    if image.mode != "La" and not image.has_transparency_data:
        return
    alpha = np.asarray(image.convert("LA" if image.mode == "La" else "RGBA").getchannel("A"))
    opaque = alpha > (int(alpha.min()) + int(alpha.max())) / 2
    if alpha.min() < alpha.max() and not (np.array_equal(opaque, mask) or np.array_equal(opaque, ~mask)):
        raise UnusableImage(
            "the mask's alpha channel marks other pixels than its colours do; save it in grey without alpha, "
            "black where nothing was changed and white where it was"
        )


def _listed(distinct: np.ndarray, count: int = 5) -> str:
    """Distinct values as text, at most ``count`` of them."""
    found = [f"{value:g}" for value in distinct]
    return ", ".join(found if len(found) <= count else [*found[: count - 1], "...", found[-1]])


MASK_KEY = "arr_0"  # name of a mask's array in its npz: NumPy's default


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask as compressed npz, float16, atomically."""
    with atomic_write(path) as temporary:
        np.savez_compressed(temporary, mask.astype(np.float16))  # as MASK_KEY


def load_mask(path: Path) -> np.ndarray:
    """Load a mask written by ``save_mask``, ``(H, W)`` float16."""
    with np.load(path, allow_pickle=False) as content:
        return content[MASK_KEY]


def written_mask(mask: np.ndarray) -> np.ndarray:
    """A mask in [0, 1] as stored: float16 with each value's last bit cleared, so that none equals a threshold."""
    return (mask.astype(np.float16).view(np.uint16) & 0xFFFE).view(np.float16)
