"""Noise residuals of images and their spectra, in which generators leave traces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.ndimage import median_filter

from forensics_lib.images.crops import centre_crop
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.utils.progress import progress

PERIODS = (2, 4, 8)  # pixels, by which generators enlarge and codecs divide
CLEAR = 2.0  # dB above which a peak is one
SURE = 4.5  # standard deviations of the spectrum's own scatter above which it is


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
    drawn = rows.sample(min(count, len(rows)), random_state=seed)
    return _average_spectrum(tuple(drawn["path"]), side)


@lru_cache(maxsize=4)  # of both classes of both tasks: a figure and its caption ask for the same ones
def _average_spectrum(paths: tuple[str, ...], side: int) -> np.ndarray:
    total, used = np.zeros((side, side)), 0
    window = np.outer(np.hanning(side), np.hanning(side))
    for path in progress(paths, "spectra"):
        try:
            crop = centre_crop(read_image(path), side)
        except ImageError:
            continue
        if crop.shape[:2] == (side, side):
            total += np.abs(np.fft.fftshift(np.fft.fft2(residual(crop) * window)))
            used += 1
    spectrum = 20 * np.log10(total / used + 1e-6) if used else np.full((side, side), np.nan)
    spectrum.setflags(write=False)
    return spectrum


def radial_profile(spectrum: np.ndarray) -> np.ndarray:
    """The radial mean of a spectrum, from frequency 0 to Nyquist: ``(side // 2,)``."""
    side = spectrum.shape[0]
    y, x = np.indices(spectrum.shape) - side // 2
    radius = np.hypot(x, y).astype(int)
    rings = np.bincount(radius.ravel(), spectrum.ravel()) / np.bincount(radius.ravel())
    return rings[: side // 2]


@dataclass(frozen=True)
class Peak:
    """A peak that one of two average spectra has and the other has not."""

    period: int  # pixels: it stands at multiples of 1/period of the sampling rate
    above_surroundings: float  # dB
    above_other: float  # dB


def periodic_peak(ours: np.ndarray, other: np.ndarray) -> Peak | None:
    """The highest peak of a spectrum at 1/2, 1/4 or 1/8 of the sampling rate, or at odd multiples of these.

    It counts where it stands out from its own surroundings, from the other spectrum, and from the other's surroundings by as
    much: by ``CLEAR`` and by ``SURE`` times the scatter of such differences.  Peaks along each axis and off the axes are
    looked for separately.  Spectra are ``(side, side)`` as from ``average_spectrum``; None where there is no such peak.
    """
    if not (np.isfinite(ours).all() and np.isfinite(other).all()):
        return None
    lifted, others = (spectrum - median_filter(spectrum, 9, mode="wrap") for spectrum in (ours, other))
    scatter = 1.4826 * np.median(np.abs(lifted - others))
    found = []
    for period in PERIODS:
        for places in _lattice(len(ours), period):
            peak = Peak(period, float(lifted[places].mean()), float((ours - other)[places].mean()))
            surer = float((lifted - others)[places].mean())
            needed = max(CLEAR, SURE * scatter / np.sqrt(max(1, len(places[0]) // 2)))  # each frequency stands there twice
            if min(peak.above_surroundings, peak.above_other, surer) > needed:
                found.append(peak)
    return max(found, key=lambda peak: peak.above_surroundings, default=None)


def _lattice(side: int, period: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where the multiples of 1/period of the sampling rate are that are none of twice that: on each axis, and off both."""
    steps = np.arange(period)
    y, x = (places.ravel() for places in np.meshgrid(steps, steps, indexing="ij"))
    new = (y % 2 == 1) | (x % 2 == 1)
    groups = (new & (y == 0), new & (x == 0), new & (y > 0) & (x > 0))
    rows, columns = ((side // 2 + number * side // period) % side for number in (y, x))
    return [(rows[group], columns[group]) for group in groups]
