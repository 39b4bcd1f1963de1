"""Degradations of images in circulation: recompression, scaling, blur, noise, and a platform's upload.

One implementation serves training augmentation and the robustness sweep.  Images are ``(H, W, 3)`` uint8, masks
``(H, W)`` bool or None; geometric operations transform both.

No operation changes the mean brightness, which a network could learn: all compute in floats and round once.  Two effects
remain: noise and sharp kernels are clipped at 0 and 255, which brightens black and darkens white, and WebP's colour
conversion adds up to a quarter of a grey level.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from forensics_lib.params import Degradations
from forensics_lib.utils.callables import load_callable

KERNELS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
SUBSAMPLINGS = (0, 2)  # 4:4:4 and 4:2:0
BLOCK = 16  # side of the blocks of JPEG 4:2:0 and WebP, pixels


@dataclass(frozen=True)
class Encoding:
    """The last compression of an image."""

    format: str  # JPEG or WEBP
    quality: int  # 1 to 100
    bytes: int


def recompress(
    image: np.ndarray, codec: str, quality: int, subsampling: int = 2, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Encode an image as ``JPEG`` or ``WEBP`` of a quality from 1 to 100, and decode it again.

    ``subsampling`` is of JPEG's colours, as Pillow numbers it: 0 for 4:4:4, 1 for 4:2:2, 2 for 4:2:0.  ``rng`` draws the offset
    of the codec's blocks, as in a crop of a larger picture; None: blocks begin in the corner.
    """
    return _recompressed(image, codec, quality, subsampling, rng)[0]


def _recompressed(
    image: np.ndarray, codec: str, quality: int, subsampling: int, rng: np.random.Generator | None
) -> tuple[np.ndarray, Encoding]:
    top, left = rng.integers(BLOCK, size=2) if rng else (0, 0)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"subsampling": subsampling} if codec == "JPEG" else {"method": 2}
    padded = np.pad(image, ((top, 0), (left, 0), (0, 0)), mode="symmetric")
    Image.fromarray(padded).save(buffer, codec, quality=quality, **options)
    decoded = np.array(Image.open(buffer).convert("RGB"))[top:, left:]
    return decoded, Encoding(codec, quality, buffer.getbuffer().nbytes)


def resize(
    image: np.ndarray, mask: np.ndarray | None, scale: float, kernel: Image.Resampling
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale both sides by ``scale``, to one pixel at least; masks by nearest neighbour."""
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    resized = resampled(image, size, kernel)
    if mask is None:
        return resized, None
    return resized, np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def resampled(image: np.ndarray, size: tuple[int, int], kernel: Image.Resampling) -> np.ndarray:
    """Resample an image to ``size`` (width, height).

    In floats: for 8-bit pixels Pillow rounds halves up after each direction, so that halving by the box filter would
    brighten an image by half a grey level.
    """
    result = np.empty((size[1], size[0], image.shape[2]), np.uint8)
    for channel in range(image.shape[2]):
        values = Image.fromarray(image[..., channel].astype(np.float32)).resize(size, kernel)
        result[..., channel] = np.rint(np.asarray(values)).clip(0, 255)
    return result


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with ``sigma`` in pixels."""
    return np.rint(gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))).astype(np.uint8)


def add_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise with ``sigma`` in grey levels, independent per pixel and channel."""
    return (image + rng.normal(0, sigma, image.shape)).round().clip(0, 255).astype(np.uint8)


def upload(
    image: np.ndarray, mask: np.ndarray | None, scale: float, quality: int, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray | None, Encoding]:
    """A platform's upload: shrink by ``scale`` (Lanczos), then JPEG 4:2:0 of ``quality``; see ``recompress``."""
    if scale < 1:
        image, mask = resize(image, mask, scale, Image.Resampling.LANCZOS)
    image, encoding = _recompressed(image, "JPEG", quality, 2, rng)
    return image, mask, encoding


def degrade(
    image: np.ndarray, mask: np.ndarray | None, settings: Degradations, rng: np.random.Generator, *, equalize: bool = False
) -> tuple[np.ndarray, np.ndarray | None, Encoding | None]:
    """Apply random scaling, blur, noise, compression and upload, in the order of an image's life.

    ``rng`` draws the operations, their strengths and the offset of compression blocks.  With ``equalize`` an image that no
    operation compressed is compressed in the end, so that all images have one distribution of codecs and qualities, whatever
    their files were.  Returns the image ``(H', W', 3)``, its mask ``(H', W')`` or None, and the last compression or None.
    """
    encoding = None
    if settings.own:
        wanted = "its function gets image, mask and generator, and returns image and mask"
        image, mask = load_callable(settings.own, "degrade: own", wanted)(image, mask, rng)
    if rng.random() < settings.resize:
        image, mask = resize(image, mask, float(rng.uniform(*settings.resize_scale)), KERNELS[rng.integers(len(KERNELS))])
    if rng.random() < settings.blur:
        image = blur(image, float(rng.uniform(*settings.blur_sigma)))
    if rng.random() < settings.noise:
        image = add_noise(image, float(rng.uniform(*settings.noise_sigma)), rng)
    if rng.random() < settings.double_jpeg:
        image, encoding = _randomly_compressed(image, "JPEG", settings, rng)
    if rng.random() < settings.jpeg:
        image, encoding = _randomly_compressed(image, "JPEG", settings, rng)
    elif rng.random() < settings.webp:
        image, encoding = _randomly_compressed(image, "WEBP", settings, rng)
    if rng.random() < settings.social:
        quality = _drawn_quality(settings.social_quality, rng)
        image, mask, encoding = upload(image, mask, float(rng.uniform(*settings.social_scale)), quality, rng)
    if equalize and encoding is None:
        image, encoding = _randomly_compressed(image, "JPEG" if rng.random() < 0.8 else "WEBP", settings, rng)
    return image, mask, encoding


def _randomly_compressed(
    image: np.ndarray, codec: str, settings: Degradations, rng: np.random.Generator
) -> tuple[np.ndarray, Encoding]:
    quality = _drawn_quality(settings.jpeg_quality if codec == "JPEG" else settings.webp_quality, rng)
    return _recompressed(image, codec, quality, int(rng.choice(SUBSAMPLINGS)), rng)


def _drawn_quality(limits: tuple[int, int], rng: np.random.Generator) -> int:
    return int(rng.integers(limits[0], limits[1] + 1))
