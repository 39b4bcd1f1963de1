"""What happens to pictures on their way: recompression, scaling, blur, noise.

One implementation serves training augmentation and robustness measurements.  Images are ``(H, W, 3)`` uint8, masks
``(H, W)`` bool or None; whatever moves pixels moves both.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

KERNELS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Encoding:
    """The last compression that an image has gone through."""

    format: str  # JPEG or WEBP
    quality: int  # 1 to 100
    bytes: int


def recompress(image: np.ndarray, codec: str, quality: int, subsampling: int = 2) -> np.ndarray:
    """Encode and decode as ``codec`` (``JPEG`` or ``WEBP``) of ``quality`` 1 to 100."""
    return _recompressed(image, codec, quality, subsampling)[0]


def _recompressed(image: np.ndarray, codec: str, quality: int, subsampling: int) -> tuple[np.ndarray, Encoding]:
    buffer = io.BytesIO()
    options = {"subsampling": subsampling} if codec == "JPEG" else {"method": 2}
    Image.fromarray(image).save(buffer, codec, quality=quality, **options)
    return np.array(Image.open(buffer).convert("RGB")), Encoding(codec, quality, buffer.getbuffer().nbytes)


def resize(
    image: np.ndarray, mask: np.ndarray | None, scale: float, kernel: Image.Resampling
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale both sides by ``scale``, at least to one pixel; the mask by its nearest pixels."""
    size = [max(1, round(side * scale)) for side in (image.shape[1], image.shape[0])]
    resized = np.array(Image.fromarray(image).resize(size, kernel))
    if mask is None:
        return resized, None
    return resized, np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with ``sigma`` in pixels."""
    return gaussian_filter(image, (sigma, sigma, 0))


def add_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise with ``sigma`` in grey levels, independent per pixel and channel."""
    return (image + rng.normal(0, sigma, image.shape)).round().clip(0, 255).astype(np.uint8)


def degrade(
    image: np.ndarray, mask: np.ndarray | None, probability: float, rng: np.random.Generator, *, equalize: bool = False
) -> tuple[np.ndarray, np.ndarray | None, Encoding | None]:
    """Scaling, blur, noise and recompression in the order of a picture's life, and the compression that was last.

    Recompression happens with ``probability``, each of the others with a third of it.  With ``equalize`` every image is
    recompressed, so that all leave here by one distribution of codecs and qualities, whatever their files were.
    """
    encoding = None
    if rng.random() < probability / 3:
        image, mask = resize(image, mask, float(rng.uniform(0.5, 1.5)), KERNELS[rng.integers(len(KERNELS))])
    if rng.random() < probability / 3:
        image = blur(image, float(rng.uniform(0.3, 1.2)))
    if rng.random() < probability / 3:
        image = add_noise(image, float(rng.uniform(1, 6)), rng)
    if rng.random() < probability or equalize:
        codec = "JPEG" if rng.random() < 0.75 else "WEBP"
        image, encoding = _recompressed(image, codec, int(rng.integers(60, 98)), int(rng.choice([0, 2])))
    return image, mask, encoding
