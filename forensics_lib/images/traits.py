"""What may make an image hard to judge: its size, compression, light, texture, and whether a face looks at the camera."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from forensics_lib.images.headers import read_header
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.images.spectra import residual

# What is measured, with its unit, in the order of ``traits_of``
TRAITS = {
    "short side": "pixels",
    "bytes per pixel": "of the file",
    "JPEG quality": "1 to 100, libjpeg's scale",
    "brightness": "mean grey level, 0 to 255",
    "contrast": "standard deviation of grey levels",
    "saturation": "mean, 0 to 1",
    "texture": "standard deviation of the residual of a 3 x 3 median, grey levels",
    "frontal face": "0 or 1",
}
_FACE_SIDE = 320  # longer side of the picture that faces are looked for in, pixels


def traits_of(paths: list[str]) -> list[tuple[float, ...]]:
    """The ``TRAITS`` of each image; NaN for those that a file has not, or that cannot be read."""
    return [_traits(path) for path in paths]


def _traits(path: str) -> tuple[float, ...]:
    try:
        header, image = read_header(path), read_image(path)
    except ImageError:
        return (np.nan,) * len(TRAITS)
    grey, high, low = image.mean(2), image.max(2).astype(float), image.min(2).astype(float)
    saturation = np.where(high > 0, (high - low) / np.maximum(high, 1), 0)
    return (
        float(min(header.width, header.height)),
        header.bytes / (header.width * header.height),
        header.jpeg_quality or np.nan,
        float(grey.mean()),
        float(grey.std()),
        float(saturation.mean()),
        float(residual(image).std()),
        float(_has_face(image)),
    )


def _has_face(image: np.ndarray) -> bool:
    """Whether a face looks into the camera: a cascade of local binary patterns (Liao et al., ICB 2007)."""
    small = Image.fromarray(image)
    small.thumbnail((_FACE_SIDE, _FACE_SIDE))
    largest = (min(small.size),) * 2
    options = {"scale_factor": 1.25, "step_ratio": 1.3, "min_size": (40, 40), "max_size": largest}
    return min(small.size) >= 40 and bool(_cascade().detect_multi_scale(img=np.asarray(small), **options))


@cache
def _cascade() -> Any:
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    return Cascade(lbp_frontal_face_cascade_filename())
