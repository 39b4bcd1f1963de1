"""Native-resolution crops: padding, random squares, and the crops that inference uses."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from forensics_lib.images.io import STRIP

WHOLE_CROPS = 3  # at most, along the longer side of an image that is seen whole


def random_square(image: np.ndarray, side: int, rng: np.random.Generator, step: int = 1) -> np.ndarray:
    """A random square crop of at most ``side`` pixels of ``(H, W, 3)``, at offsets that are multiples of ``step``."""
    top, left = (step * int(rng.integers(max(0, length - side) // step + 1)) for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def pad_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pad ``(H, W, ...)`` by reflection at the bottom and right to at least ``height`` x ``width``."""
    missing = [(0, max(0, height - image.shape[0])), (0, max(0, width - image.shape[1]))]
    if not any(after for _, after in missing):
        return image
    return np.pad(image, missing + [(0, 0)] * (image.ndim - 2), mode="symmetric")


def fitted(donor: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random crop of ``donor`` of ``shape`` (height, width); a smaller donor is padded by reflection."""
    donor = pad_to(donor, *shape)
    top, left = (int(rng.integers(have - want + 1)) for have, want in zip(donor.shape[:2], shape, strict=True))
    return donor[top : top + shape[0], left : left + shape[1]]


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """``(H, W, 3)`` uint8 to ``(3, H, W)`` uint8."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def chosen_crops(image: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """The centre crop and the ``count - 1`` most textured crops of a half-overlapping grid.

    Texture is the mean absolute difference of neighbouring pixels of the green channel.  Smaller images are padded by
    reflection; an image of the size of one crop gives one.
    """
    image = pad_to(image, size, size)
    return [image[y : y + size, x : x + size] for y, x in chosen_places(image, size, count)]


def chosen_places(image: np.ndarray, size: int, count: int) -> list[tuple[int, int]]:
    """The upper left corners of ``chosen_crops``."""
    image = pad_to(image, size, size)
    height, width = image.shape[:2]
    places = [((height - size) // 2, (width - size) // 2)]
    if count > 1 and (height > size or width > size):
        grid = [(y, x) for y in _grid(height, size) for x in _grid(width, size)]
        texture = _texture(image, size, grid)
        ranked = [grid[i] for i in np.argsort(-texture, kind="stable")]
        places += [place for place in ranked if place != places[0]][: count - 1]
    return places


def at_scale(image: np.ndarray, scale: float) -> np.ndarray:
    """An image ``(H, W, 3)`` uint8 scaled by bicubic interpolation, to one pixel at least; at 1 the image itself."""
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in (image.shape[1], image.shape[0])]
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def seen_whole(image: np.ndarray, size: int) -> np.ndarray:
    """The image shrunk until its shorter side has ``size`` pixels; one that is no larger as it is."""
    return at_scale(image, min(1, size / min(image.shape[:2])))


def whole_crops(image: np.ndarray, size: int) -> list[np.ndarray]:
    """``chosen_crops`` of the image as it is ``seen_whole``; none of an image that is not shrunk."""
    return chosen_crops(seen_whole(image, size), size, WHOLE_CROPS) if min(image.shape[:2]) > size else []


def _grid(length: int, size: int) -> list[int]:
    steps = max(1, -(-(length - size) // (size // 2)))
    return sorted({round(i * (length - size) / steps) for i in range(steps + 1)})


def _texture(image: np.ndarray, size: int, places: list[tuple[int, int]]) -> np.ndarray:
    """Mean absolute neighbour difference of each ``size`` square, from running sums computed in strips of rows."""
    tops, lefts = np.array(places).T
    columns, column = np.unique(lefts, return_inverse=True)
    rows = np.empty((image.shape[0], len(columns)), np.int64)  # sums over a square's columns, per row
    for top in range(0, image.shape[0], STRIP):
        strip, above = (image[start : top + STRIP, :, 1].astype(np.int16) for start in (top, max(top - 1, 0)))
        energy = np.abs(np.diff(strip, axis=0, prepend=above[:1])) + np.abs(np.diff(strip, axis=1, prepend=strip[:, :1]))
        sums = np.pad(energy.cumsum(1, dtype=np.int64), ((0, 0), (1, 0)))
        rows[top : top + len(strip)] = sums[:, columns + size] - sums[:, columns]
    total = np.pad(rows.cumsum(0), ((1, 0), (0, 0)))
    return (total[tops + size, column] - total[tops, column]) / size**2


def centre_crop(image: np.ndarray, side: int) -> np.ndarray:
    """The central ``side`` x ``side`` pixels at native resolution, or fewer of a smaller image."""
    top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
    return image[top : top + side, left : left + side]
