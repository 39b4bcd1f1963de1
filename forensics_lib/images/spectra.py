"""Noise residuals of images and their spectra, in which generators leave traces."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.ndimage import median_filter

from forensics_lib.images.crops import centre_crop
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.utils.progress import progress


def residual(image: np.ndarray) -> np.ndarray:
    """The residual of a 3 x 3 median filter: ``(H, W, 3)`` uint8 to ``(H, W)`` float32, grey levels around 0."""
    grey = image.astype(np.float32).mean(axis=2)
    return grey - median_filter(grey, 3)


def average_spectrum(rows: pd.DataFrame, side: int = 128, count: int = 200, seed: int = 0) -> np.ndarray:
    """The mean amplitude spectrum of residuals of image centres: ``(side, side)``, dB, frequency 0 in the middle.

    Upsampling in a generator leaves peaks in it that photographs do not have (Zhang et al., WIFS 2019; Corvi et al.,
    CVPRW 2023).  At most ``count`` images are drawn; unreadable and smaller ones are skipped, and without any the
    spectrum is NaN.
    """
    total, used = np.zeros((side, side)), 0
    window = np.outer(np.hanning(side), np.hanning(side))
    drawn = rows.sample(min(count, len(rows)), random_state=seed)
    for path in progress(drawn["path"].tolist(), "spectra"):
        try:
            crop = centre_crop(read_image(path), side)
        except ImageError:
            continue
        if crop.shape[:2] == (side, side):
            total += np.abs(np.fft.fftshift(np.fft.fft2(residual(crop) * window)))
            used += 1
    return 20 * np.log10(total / used + 1e-6) if used else np.full((side, side), np.nan)


def radial_profile(spectrum: np.ndarray) -> np.ndarray:
    """The radial mean of a spectrum, from frequency 0 to Nyquist: ``(side // 2,)``."""
    side = spectrum.shape[0]
    y, x = np.indices(spectrum.shape) - side // 2
    radius = np.hypot(x, y).astype(int)
    rings = np.bincount(radius.ravel(), spectrum.ravel()) / np.bincount(radius.ravel())
    return rings[: side // 2]
