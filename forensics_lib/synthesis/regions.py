"""Random regions of images: masks of manipulations, with and without relation to what the image shows.

Detectors that are trained on the outlines of objects alone follow objects, so most shapes here belong to none.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from skimage.segmentation import felzenszwalb

SHARES = (0.005, 0.6)  # smallest and largest region, as a share of the image's area
INVERTED = 0.05  # share of regions that are exchanged with their surroundings: a new background around an object


def random_region(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A region of an image ``(H, W, 3)`` uint8: ``(H, W)`` bool, neither empty nor full where there are two pixels.

    Its share of the area is about log-uniform in ``SHARES``.  Shapes are drawn from ``SHAPES``.
    """
    shape = image.shape[:2]
    share = float(np.exp(rng.uniform(*np.log(SHARES))))
    kinds = list(SHAPES)
    make = kinds[rng.choice(len(kinds), p=list(SHAPES.values()))]
    mask = make(image, share, rng)
    mask = ~mask if rng.random() < INVERTED else mask
    if mask.all() or not mask.any():
        mask = np.zeros(shape, bool)
        mask[tuple(rng.integers(shape))] = True
    return mask


def blob(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """One to three object-like outlines near each other."""
    height, width, top, left = _box(image.shape[:2], share / 0.24, rng)  # an outline fills about a quarter of its box
    mask = outlined(image.shape[:2], (top, left, height, width), True, rng)
    for _ in range(int(rng.integers(3))):
        down, right = (int(rng.integers(-side // 4, side // 4 + 1)) for side in (height, width))
        mask |= outlined(image.shape[:2], (top + down, left + right, height, width), True, rng)
    return mask


def rectangle(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A rectangle along the image's sides."""
    height, width, top, left = _box(image.shape[:2], share, rng)
    mask = np.zeros(image.shape[:2], bool)
    mask[top : top + height, left : left + width] = True
    return mask


def strokes(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Strokes of a brush, as free-form inpainting is asked for (Yu et al., ICCV 2019)."""
    height, width = image.shape[:2]
    thickness = max(1, round(np.sqrt(share * height * width) * rng.uniform(0.25, 0.7)))
    canvas = Image.new("L", (width, height))
    draw, place = ImageDraw.Draw(canvas), rng.random(2) * (width, height)
    angle, drawn = rng.uniform(0, 2 * np.pi), 0.0
    while drawn < share * height * width:
        angle += rng.uniform(-1.2, 1.2)
        step = thickness * rng.uniform(0.5, 1.5)
        end = np.clip(place + step * np.array([np.cos(angle), np.sin(angle)]), 0, (width, height))
        draw.line([*place, *end], fill=255, width=thickness)
        draw.ellipse([*(end - thickness / 2), *(end + thickness / 2)], fill=255)
        place, drawn = end, drawn + step * thickness
    return np.asarray(canvas) > 0


def patches(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Patches of any outline: the highest values of smooth noise."""
    noise = gaussian_filter(rng.standard_normal(image.shape[:2]), rng.uniform(0.02, 0.12) * max(image.shape[:2]))
    return noise > np.quantile(noise, 1 - share)


def segments(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Neighbouring segments of the image (Felzenszwalb and Huttenlocher, IJCV 2004), so that edges follow the picture."""
    height, width = image.shape[:2]
    labels = felzenszwalb(image, scale=100, sigma=0.8, min_size=max(4, round(share * height * width / 4)))
    areas = np.bincount(labels.ravel())
    y, x = np.divmod(np.arange(labels.size), width)
    centres = np.stack([np.bincount(labels.ravel(), values) / areas for values in (y, x)], 1)
    start = labels[rng.integers(height), rng.integers(width)]
    near = np.argsort(np.hypot(*(centres - centres[start]).T), kind="stable")
    count = 1 + int(np.searchsorted(np.cumsum(areas[near]), share * labels.size))
    return np.isin(labels, near[:count])


SHAPES = {blob: 0.3, rectangle: 0.2, strokes: 0.2, patches: 0.15, segments: 0.15}  # and their shares


def outlined(shape: tuple[int, int], box: tuple[int, int, int, int], segm: bool, rng: np.random.Generator) -> np.ndarray:
    """A boolean mask of ``shape`` inside ``box`` (top, left, height, width): an object-like outline, or a rectangle."""
    top, left, height, width = box
    size = rng.uniform(0.35, 0.62, 2) * (height, width)
    cy, cx = (top, left) + size / 2 + rng.random(2) * ((height, width) - size)
    y, x = np.mgrid[: shape[0], : shape[1]]
    dy, dx = (y - cy) / (size[0] / 2), (x - cx) / (size[1] / 2)
    if not segm:
        return (np.abs(dy) <= 1) & (np.abs(dx) <= 1)
    angle = np.arctan2(dy, dx)
    outline = 0.85 + sum(rng.uniform(0, 0.09) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
    return np.hypot(dy, dx) <= outline


def _box(shape: tuple[int, int], share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Height, width, top and left of a random box with about a share of the area."""
    side, stretch = np.sqrt(share * shape[0] * shape[1]), np.exp(rng.uniform(-0.5, 0.5))
    height, width = (int(np.clip(s, 1, limit)) for s, limit in zip((side * stretch, side / stretch), shape, strict=True))
    return height, width, int(rng.integers(shape[0] - height + 1)), int(rng.integers(shape[1] - width + 1))
