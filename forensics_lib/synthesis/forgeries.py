"""Forgeries: manipulated images made from photographs, with exact masks, for the sample and as training data.

A forgery is a region (``regions``), its new content, its edge, and what happened to the picture before.  Contents: another
photograph, another place of the same one, a fill from the surroundings, the same content with another processing history,
and any of these after a generator.  Contents with another history show nothing that the photograph did not: they can be
told by their noise, sharpness and compression alone.  The generator is any callable from image to image, such as the
project's own autoencoder or a diffusers VAE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter, median_filter

from forensics_lib.images.crops import fitted
from forensics_lib.images.degradations import KERNELS, add_noise, blur, recompress, resampled
from forensics_lib.synthesis.autoencoder import Autoencode
from forensics_lib.synthesis.regions import random_region

FORGERY_VERSION = 3  # of the method: a new number invalidates the cache
METHODS = ("region", "whole")  # of those that are made before training, since generators can be slow
REGENERATED = 0.3  # share of contents that pass through the generator, where there is one
MARGIN = 8  # pixels around a region that a generator sees as well


@dataclass
class Forgery:
    """A manipulated image with its ground truth."""

    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) bool, True for manipulated pixels
    kind: str  # sp or fr


def forge(photo: np.ndarray, donor: np.ndarray, method: str, autoencode: Autoencode, rng: np.random.Generator) -> Forgery:
    """Manipulate a photograph by a generator: a region with content from elsewhere, and for ``whole`` then the image.

    Args:
        photo: ``(H, W, 3)`` uint8.
        donor: another photograph, of any size.
        method: one of ``METHODS``.
        autoencode: the generator.
        rng: draws the region and its content.
    """
    mask = random_region(photo, rng)
    make = enlarged(autoencode) if rng.random() < 0.5 else autoencode
    content = CONTENTS["donor" if rng.random() < 0.5 else "moved"][0](photo, mask, donor, rng)
    image = composed(photo, mask, content, make)
    return Forgery(make(image) if method == "whole" else image, mask, "fr" if method == "whole" else "sp")


def pasted(
    base: np.ndarray,
    donor: np.ndarray | None,
    rng: np.random.Generator,
    make: Autoencode | None = None,
    name: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """``base`` with new contents in a random region, and the region's mask ``(H, W)`` bool.

    Args:
        base: ``(H, W, 3)`` uint8.
        donor: another image, of any size; None: there is none, and other contents take its share.
        rng: draws region, content and edge.
        make: a generator; None: no content is generated.
        name: one of ``CONTENTS``; None: it is drawn by their shares.
    """
    mask = random_region(base, rng)
    names = [each for each in CONTENTS if donor is not None or each != "donor"]
    shares = np.array([CONTENTS[each][1] for each in names])
    name = name or names[rng.choice(len(names), p=shares / shares.sum())]
    content = CONTENTS[name][0](base, mask, base if donor is None else donor, rng)
    if make and rng.random() < REGENERATED:
        box = _box(mask)
        content = content.copy()
        content[box] = make(np.ascontiguousarray(content[box]))
    elif name in ("donor", "moved") and rng.random() < 0.5:
        content = retouched(content, rng)
    if name == "history":
        return blended(base, content, mask, _edge(rng)), mask
    return _finished(base, content, mask, rng), mask


def _finished(base: np.ndarray, content: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``content`` inside ``mask``: as it is, matched in colour, or cloned seamlessly; with any edge."""
    way = rng.random()
    if way < 0.3:
        return composed(base, mask, content)
    return blended(base, cloned(base, mask, content) if way < 0.5 else content, mask, _edge(rng))


def _edge(rng: np.random.Generator) -> float:
    """The softness of an edge, pixels: hard in two of five cases."""
    return 0.0 if rng.random() < 0.4 else float(np.exp(rng.uniform(np.log(0.5), np.log(5))))


def composed(base: np.ndarray, mask: np.ndarray, content: np.ndarray, make: Autoencode | None = None) -> np.ndarray:
    """``base`` with ``content`` inside ``mask``: colours matched to the surroundings, edge softened.

    Only the box around the mask passes through ``make`` first.  All images have one size.
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
    """``content`` over ``base`` inside ``mask``; the edge is softened by ``sigma`` pixels, 0 for a hard edge."""
    soft = gaussian_filter(binary_dilation(mask).astype(float), sigma).clip(0, 1)[..., None] if sigma else mask[..., None]
    return (base * (1 - soft) + content * soft).round().clip(0, 255).astype(np.uint8)


def cloned(base: np.ndarray, mask: np.ndarray, content: np.ndarray) -> np.ndarray:
    """``content`` shifted in colour so that it meets ``base`` at the edge of ``mask``; ``(H, W, 3)`` float.

    The difference at the edge is interpolated over the region, which stands for Poisson editing (Perez et al., SIGGRAPH
    2003; Farbman et al., SIGGRAPH 2009).
    """
    return content + _interpolated(base.astype(float) - content, mask)


def enlarged(autoencode: Autoencode) -> Autoencode:
    """``autoencode`` applied at 1.5 times the size: other traces of the same generator."""

    def through(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        large = Image.fromarray(image).resize((width * 3 // 2, height * 3 // 2), Image.Resampling.BICUBIC)
        made = Image.fromarray(autoencode(np.asarray(large)))
        return np.asarray(made.resize((width, height), Image.Resampling.LANCZOS))

    return through


# ---- Contents: (base, mask, donor, rng) to an image of the size of base ------------------------------------------------


def _of_donor(base: np.ndarray, mask: np.ndarray, donor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return view(donor, base.shape[:2], rng)


def moved(base: np.ndarray, mask: np.ndarray, donor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another place of ``base``: any, sometimes mirrored, turned or scaled, or one that fits the edge."""
    if rng.random() < 0.5:
        return _fitting(base, mask, rng)
    return view(_shifted(base, rng.choice((-1, 1), 2) * (rng.uniform(0.25, 0.75, 2) * base.shape[:2])), base.shape[:2], rng)


def filled(base: np.ndarray, mask: np.ndarray, donor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The hole at ``mask`` filled from its surroundings: smoothly with texture from elsewhere, or by a place that fits."""
    if rng.random() < 0.5:
        return cloned(base, mask, _fitting(base, mask, rng)).round().clip(0, 255).astype(np.uint8)
    other = _fitting(base, mask, rng).astype(float)
    texture = other - gaussian_filter(other, (2, 2, 0))
    smooth = _interpolated(base.astype(float), mask)
    return (smooth + rng.uniform(0, 1) * texture).round().clip(0, 255).astype(np.uint8)


def _history(base: np.ndarray, mask: np.ndarray, donor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    result = retouched(base, rng)
    if rng.random() < 0.3:
        result = retouched(result, rng)
    return recoloured(result, rng) if rng.random() < 0.25 else result


Content = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
CONTENTS: dict[str, tuple[Content, float]] = {  # and their shares
    "donor": (_of_donor, 0.2), "moved": (moved, 0.2), "filled": (filled, 0.2), "history": (_history, 0.4)
}  # fmt: skip


def view(image: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random part of an image in a size, ``(*shape, 3)`` uint8: often as it is, else mirrored, turned or scaled."""
    if rng.random() < 0.5:
        scale = float(np.exp(rng.uniform(np.log(0.5), np.log(2))))
        size = tuple(max(1, round(side * scale)) for side in (image.shape[1], image.shape[0]))
        image = resampled(image, size, _kernel(rng))
    if rng.random() < 0.3:
        turned = Image.fromarray(image).rotate(float(rng.uniform(-30, 30)), Image.Resampling.BICUBIC)
        margins = [side // 6 for side in image.shape[:2]]  # the corners are empty after a turn
        image = np.asarray(turned)[margins[0] : image.shape[0] - margins[0], margins[1] : image.shape[1] - margins[1]]
    return fitted(image[:, ::-1] if rng.random() < 0.3 else image, shape, rng)


def _fitting(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, tries: int = 32) -> np.ndarray:
    """``image`` shifted, by the one of random shifts that fits best around ``mask``, as exemplar-based inpainting does."""
    ring = np.argwhere(binary_dilation(mask, iterations=3) & ~mask)
    ring = ring[rng.integers(len(ring), size=min(256, len(ring)))] if len(ring) else np.argwhere(mask)[:1]
    around, shape = image[tuple(ring.T)].astype(int), np.array(image.shape[:2])
    shifts = rng.choice((-1, 1), (tries, 2)) * (rng.uniform(0.08, 0.5, (tries, 2)) * shape)
    errors = [np.abs(_shifted(image, shift)[tuple(ring.T)].astype(int) - around).mean() for shift in shifts]
    return _shifted(image, shifts[int(np.argmin(errors))])


def _shifted(image: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """``image`` moved by ``shift`` (down, right) pixels, less than its sides, and reflected where it has no pixels."""
    places = []
    for side, by in zip(image.shape[:2], np.rint(shift).astype(int), strict=True):
        place = np.abs(np.arange(side) - by)
        places.append(np.where(place < side, place, 2 * (side - 1) - place).clip(0))
    return image[np.ix_(*places)]


def _interpolated(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``(H, W, C)`` float values, those inside ``mask`` replaced by smooth ones from outside; the nearest dominate."""
    known = (~mask)[..., None].astype(float)
    mean = values[~mask].mean(0) if not mask.all() else 0.0
    total, weight = np.full_like(values, 1e-12) * mean, 1e-12
    for sigma, share in ((2, 1.0), (8, 1e-3), (32, 1e-6)):
        total = total + share * gaussian_filter(values * known, (sigma, sigma, 0))
        weight = weight + share * gaussian_filter(known, (sigma, sigma, 0))
    return np.where(mask[..., None], total / weight, values)


def retouched(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give an image another processing history, at the same size: no brighter or darker on average."""
    height, width = image.shape[:2]
    way = rng.integers(6)
    if way == 0:  # shrunk and enlarged again
        scale = rng.uniform(0.25, 0.8)
        small = resampled(image, (max(1, round(width * scale)), max(1, round(height * scale))), _kernel(rng))
        return resampled(small, (width, height), _kernel(rng))
    if way == 1:  # denoised
        return median_filter(image, (3, 3, 1)) if rng.random() < 0.5 else blur(image, float(rng.uniform(0.4, 1.2)))
    if way == 2:
        return add_noise(image, float(rng.uniform(2, 8)), rng)
    if way == 3:  # sharpened
        smooth = gaussian_filter(image.astype(np.float32), (sigma := rng.uniform(0.6, 2), sigma, 0))
        return (image + rng.uniform(0.4, 1.5) * (image - smooth)).round().clip(0, 255).astype(np.uint8)
    if way == 4:  # turned a little or shifted by part of a pixel: interpolated
        small = resampled(image, (width + int(rng.integers(1, 4)), height + int(rng.integers(1, 4))), _kernel(rng))
        return resampled(small, (width, height), _kernel(rng))
    return recompress(image, "JPEG", int(rng.integers(40, 91)), rng=rng)


def recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another exposure, contrast and white balance."""
    gamma, gains = np.exp(rng.uniform(-0.25, 0.25)), np.exp(rng.uniform(-0.12, 0.12, 3))
    return (255 * (image / 255.0) ** gamma * gains).round().clip(0, 255).astype(np.uint8)


def _kernel(rng: np.random.Generator) -> Image.Resampling:
    return KERNELS[rng.integers(len(KERNELS))]


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    """The bounding box of a mask with its margin."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    ends = [
        (max(line[0] - MARGIN, 0), min(line[-1] + MARGIN + 1, side))
        for line, side in zip((rows, columns), mask.shape, strict=True)
    ]
    return slice(*ends[0]), slice(*ends[1])
