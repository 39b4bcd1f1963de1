"""Manipulated images made from photographs, with exact masks: the sample's, and further training data.

Four methods, as the field knows them: a region with new content that a generator made (``region``, kind ``sp``: every
other pixel is the photograph's; or ``whole``, kind ``fr``: the generator redrew all of it), a part of the photograph
copied elsewhere in it (``copy_move``), and a part of another photograph (``splice``).  The generator is any callable from
image to image, such as the project's own autoencoder or a diffusers VAE.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter, median_filter

from forensics_lib.images.crops import fitted
from forensics_lib.images.degradations import KERNELS, add_noise, blur, recompress, resampled
from forensics_lib.synthesis.autoencoder import Autoencode

FORGERY_VERSION = 2  # how forgeries are made: a new number makes those in the cache anew
METHODS = ("region", "whole", "copy_move", "splice")
SHARES = (0.01, 0.35)  # of an image's area: the smallest and the largest region that is made


@dataclass
class Forgery:
    """A manipulated image and what was changed in it."""

    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) bool, True where the content is new
    method: str
    kind: str  # sp or fr


def outlined(shape: tuple[int, int], box: tuple[int, int, int, int], segm: bool, rng: np.random.Generator) -> np.ndarray:
    """A boolean mask ``shape`` inside ``box`` (top, left, height, width): an object-like outline, or a rectangle."""
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


def object_mask(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """An object-like region ``shape`` of ``SHARES`` of the area, small ones as likely as large ones; never empty.

    One to three outlines near each other, now and then a rectangle.
    """
    area = float(np.exp(rng.uniform(*np.log(SHARES)))) * shape[0] * shape[1]
    side = np.sqrt(area / 0.24)  # an outline fills about a quarter of its box
    stretch = np.exp(rng.uniform(-0.5, 0.5))
    height, width = (int(np.clip(s, 4, limit)) for s, limit in zip((side * stretch, side / stretch), shape, strict=True))
    top, left = int(rng.integers(shape[0] - height + 1)), int(rng.integers(shape[1] - width + 1))
    segm = bool(rng.random() < 0.8)
    mask = outlined(shape, (top, left, height, width), segm, rng)
    for _ in range(int(rng.integers(3)) if segm else 0):
        shift = [int(rng.integers(-side // 4, side // 4 + 1)) for side in (height, width)]
        mask |= outlined(shape, (top + shift[0], left + shift[1], height, width), True, rng)
    if not mask.any():
        mask[min(top + height // 2, shape[0] - 1), min(left + width // 2, shape[1] - 1)] = True
    return mask


def composed(base: np.ndarray, mask: np.ndarray, content: np.ndarray, make: Autoencode | None = None) -> np.ndarray:
    """``base`` with ``content`` inside ``mask``: colours matched to the surroundings, edge softened.

    Only the box around the mask goes through ``make`` first.  All are of one size.
    """
    box = _box(mask)
    patch = np.ascontiguousarray(content[box])
    patch = (make(patch) if make else patch).astype(float)
    inside, ring = patch[mask[box]], binary_dilation(mask, iterations=6) & ~mask
    around = base[ring if ring.any() else mask].astype(float)
    gain = np.clip((around.std(0) + 8) / (inside.std(0) + 8), 0.6, 1.6)
    result = base.copy()
    result[box] = blended(base[box], (patch - inside.mean(0)) * gain + around.mean(0), mask[box])
    return result


def blended(base: np.ndarray, content: np.ndarray, mask: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """``content`` over ``base`` inside ``mask``, with an edge of ``sigma`` pixels; 0: a hard one."""
    soft = gaussian_filter(binary_dilation(mask).astype(float), sigma).clip(0, 1)[..., None] if sigma else mask[..., None]
    return (base * (1 - soft) + content * soft).round().clip(0, 255).astype(np.uint8)


def enlarged(autoencode: Autoencode) -> Autoencode:
    """``autoencode`` at 1.5 times the size and back: another trace of the same generator."""

    def through(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        large = Image.fromarray(image).resize((width * 3 // 2, height * 3 // 2), Image.Resampling.BICUBIC)
        made = Image.fromarray(autoencode(np.asarray(large)))
        return np.asarray(made.resize((width, height), Image.Resampling.LANCZOS))

    return through


def pasted(base: np.ndarray, donor: np.ndarray | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``base`` with object-like regions of ``donor`` (None: of itself), and their mask; images of one size.

    Mostly one region, else up to four.  A third are holes filled from their surroundings; of the others half are retouched
    first (rescaled, smoothed, noisy or recompressed), as what is put in has another history than what is around it.  Some
    are matched in colour, and edges are anything from hard to soft.
    """
    mask = np.zeros(base.shape[:2], bool)
    for _ in range(1 if rng.random() < 0.7 else int(rng.integers(2, 5))):
        mask |= object_mask(base.shape[:2], rng)
    if rng.random() < 1 / 3:
        content = filled(base, mask, rng)
    else:
        content = moved(base, mask, rng) if donor is None else donor
        content = _retouched(content, rng) if rng.random() < 0.5 else content
        if rng.random() < 1 / 3:
            return composed(base, mask, content), mask
    return blended(base, content, mask, float(rng.uniform(0.5, 2.0)) if rng.random() < 0.5 else 0.0), mask


def filled(base: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``base`` with the hole at ``mask`` filled smoothly from its surroundings, with more or less texture of elsewhere."""
    known, image = (~mask)[..., None].astype(float), base.astype(float)
    total, weight = np.full_like(image, 128 * 1e-12), 1e-12
    for sigma, share in ((2, 1.0), (8, 1e-3), (32, 1e-6)):  # the nearest surroundings that reach a pixel count most
        total = total + share * gaussian_filter(image * known, (sigma, sigma, 0))
        weight = weight + share * gaussian_filter(known, (sigma, sigma, 0))
    other = moved(base, mask, rng).astype(float)
    texture = other - gaussian_filter(other, (2, 2, 0))
    return (total / weight + rng.uniform(0, 1) * texture).round().clip(0, 255).astype(np.uint8)


def _retouched(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image with another processing history and the same size."""
    height, width = image.shape[:2]
    way = rng.integers(4)
    if way == 0:
        scale = rng.uniform(0.25, 0.8)
        small = resampled(image, (max(1, round(width * scale)), max(1, round(height * scale))), _kernel(rng))
        return resampled(small, (width, height), _kernel(rng))
    if way == 1:
        return median_filter(image, (3, 3, 1)) if rng.random() < 0.5 else blur(image, float(rng.uniform(0.4, 1.2)))
    if way == 2:
        return add_noise(image, float(rng.uniform(2, 8)), rng)
    return recompress(image, "JPEG", int(rng.integers(50, 91)))


def _kernel(rng: np.random.Generator) -> Image.Resampling:
    return KERNELS[rng.integers(len(KERNELS))]


def moved(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``image`` with a part of itself from elsewhere, now and then mirrored, in the box around ``mask``."""
    box = _box(mask)
    height, width = (side.stop - side.start for side in box)
    limits = image.shape[0] - height + 1, image.shape[1] - width + 1
    top, left = max(rng.integers(limits, size=(8, 2)), key=lambda place: abs(place - (box[0].start, box[1].start)).sum())
    part = image[top : top + height, left : left + width]
    result = image.copy()
    result[box] = part[:, ::-1] if rng.random() < 0.3 else part
    return result


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    """The box around a mask with a margin of 8 pixels."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    height, width = mask.shape
    return slice(max(rows[0] - 8, 0), min(rows[-1] + 9, height)), slice(max(columns[0] - 8, 0), min(columns[-1] + 9, width))


def forge(photo: np.ndarray, donor: np.ndarray, method: str, autoencode: Autoencode, rng: np.random.Generator) -> Forgery:
    """One manipulated image of ``photo`` by one of ``METHODS``; ``donor`` is another photograph of any size."""
    donor = fitted(donor, photo.shape[:2], rng)
    if method == "copy_move":
        image, mask = pasted(photo, None, rng)
    elif method == "splice":
        image, mask = pasted(photo, donor, rng)
    else:
        make = enlarged(autoencode) if rng.random() < 0.5 else autoencode
        mask = object_mask(photo.shape[:2], rng)
        image = composed(photo, mask, donor if rng.random() < 0.5 else moved(photo, mask, rng), make)
        image = make(image) if method == "whole" else image
    return Forgery(image, mask, method, "fr" if method == "whole" else "sp")
