"""Copy-move: parts of an image that it holds twice, found by matching the image with itself.

Content that was copied within a photograph has its history, so that no trace tells it from its surroundings; but no two
parts of a photograph are the same to the pixel.  As Christlein et al. (An evaluation of popular copy-move forgery detection
approaches, IEEE TIFS 2012) have it: keypoints are matched, matches vote for a displacement, and each displacement with enough
votes is verified densely.  Found are parts that were moved, not turned or scaled, by more than ``NEAR`` pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter, label, maximum_filter, uniform_filter

WINDOW = 16  # side of the windows that are compared, pixels
NEAR = 40  # shorter displacements are not looked for, pixels: texture resembles what lies beside it
TEXTURED = 1.0  # standard deviation of detail from which a window can be compared, grey levels; half of it beside a keypoint
CORNERED = 0.1  # ratio of the structure tensor's eigenvalues: below, a window slides along a line and stays the same
ALIKE, SAME = 0.9, 0.97  # correlations of windows that may be a copy, and of which some must be in it
SHADED = 0.4  # difference of the mean brightness, grey levels, from which two parts were lit, so not copied
PERIODIC = 0.3  # correlation with what lies as far on the other side, from which a pattern repeats by itself
LEAST_VOTES, LEAST_SAME = 3, 50  # keypoints, and pixels of ``SAME`` correlation, that a copy has at least
MOST_KEYPOINTS, MOST_DISPLACEMENTS = 8000, 40
LARGEST = 2**22  # pixels: larger images are halved first


def copied_parts(image: np.ndarray) -> np.ndarray:
    """Mark the parts of an ``(H, W, 3)`` uint8 image that it holds twice or more, sources and copies: ``(H, W)`` bool."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).convert("L")
    while small.width * small.height > LARGEST:
        small = small.reduce(2)
    grey = np.asarray(small, np.float32)
    detail = _detail(grey)
    found = np.zeros(detail.shape, bool)
    if min(detail.shape) > 2 * WINDOW:
        comparable = _comparable(detail)
        points = _keypoints(detail, comparable)
        for displacement, members in _voted(points, _matched(detail, points)):
            _mark(found, grey, detail, comparable, displacement, points[members])
    return found if found.shape == (height, width) else np.asarray(Image.fromarray(found).resize((width, height)))


def _detail(grey: np.ndarray) -> np.ndarray:
    """What is finer than shading and coarser than noise and compression."""
    return gaussian_filter(grey, 0.7) - gaussian_filter(grey, 3.0)


def _comparable(detail: np.ndarray) -> np.ndarray:
    """Where a window has enough detail, and in more than one direction."""
    dy, dx = np.gradient(detail)
    yy, xx, yx = (uniform_filter(product, WINDOW) for product in (dy * dy, dx * dx, dy * dx))
    half, root = (yy + xx) / 2, np.sqrt(((yy - xx) / 2) ** 2 + yx**2)
    return (uniform_filter(detail**2, WINDOW) > (TEXTURED / 2) ** 2) & (half - root > CORNERED * (half + root))


def _keypoints(detail: np.ndarray, comparable: np.ndarray) -> np.ndarray:
    """The strongest extremes of the detail, ``(N, 2)`` rows and columns: a copy has them at the same places."""
    strength = np.abs(detail)
    peaks = (strength == maximum_filter(strength, 5)) & comparable & (uniform_filter(detail**2, WINDOW) > TEXTURED**2)
    inside = np.zeros_like(peaks)
    inside[WINDOW // 2 : -WINDOW // 2, WINDOW // 2 : -WINDOW // 2] = True
    points = np.argwhere(peaks & inside)
    return points[np.argsort(-strength[tuple(points.T)], kind="stable")[:MOST_KEYPOINTS]]


def _matched(detail: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Pairs of keypoints, ``(N, 2)`` indices, whose windows are alike and further apart than ``NEAR``."""
    rows, columns = (points - WINDOW // 2).T
    windows = np.lib.stride_tricks.sliding_window_view(detail, (WINDOW, WINDOW))[rows, columns].reshape(len(points), WINDOW**2)
    windows = windows - windows.mean(1, keepdims=True)
    windows /= np.linalg.norm(windows, axis=1, keepdims=True) + 1e-6
    pairs = [np.zeros((0, 2), int)]
    for start in range(0, len(points), 1000):
        first, second = np.nonzero(windows[start : start + 1000] @ windows.T > ALIKE)
        pairs.append(np.column_stack([first + start, second]))
    found = np.concatenate(pairs)
    away = points[found[:, 1]] - points[found[:, 0]]
    forward = (away[:, 0] > 0) | ((away[:, 0] == 0) & (away[:, 1] > 0))
    return found[forward & ((away**2).sum(1) > NEAR**2)]


def _voted(points: np.ndarray, pairs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The displacements (rows, columns) with the most votes, each with the keypoints that it moves."""
    displacements, of_pair, votes = np.unique(
        points[pairs[:, 1]] - points[pairs[:, 0]], axis=0, return_inverse=True, return_counts=True
    )
    chosen = [number for number in np.argsort(-votes, kind="stable")[:MOST_DISPLACEMENTS] if votes[number] >= LEAST_VOTES]
    return [(displacements[number], pairs[of_pair.ravel() == number, 0]) for number in chosen]


def _mark(
    found: np.ndarray,
    grey: np.ndarray,
    detail: np.ndarray,
    comparable: np.ndarray,
    displacement: np.ndarray,
    points: np.ndarray,
) -> None:
    """Mark in ``found`` the parts around ``points`` that are the same as what lies a ``displacement`` away, and that too.

    What was printed or built twice lies in another light (``SHADED``).  A part that repeats by itself is no longer
    ``comparable``: a pattern is also the same at multiples of its period.
    """
    here, there = _overlap(detail.shape, displacement)
    alike = _correlation(detail[here], detail[there])
    parts, _ = label((alike > ALIKE) & comparable[here] & comparable[there])
    at = points - (here[0].start, here[1].start)
    votes = np.bincount(parts[tuple(at.T)], minlength=parts.max() + 1)
    for part in np.flatnonzero(votes >= LEAST_VOTES):
        marked = parts == part
        if part == 0 or (alike[marked] > SAME).sum() < LEAST_SAME:
            continue
        if abs((grey[here] - grey[there])[marked].mean()) > SHADED:
            continue
        repeats = _repeats(detail, np.argwhere(marked) + np.array([here[0].start, here[1].start]), displacement)
        marked = binary_dilation(marked, iterations=WINDOW // 4)
        for side in (here, there):
            if repeats:
                comparable[side] &= ~marked
            else:
                found[side] |= marked


def _overlap(shape: tuple[int, ...], displacement: np.ndarray) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The parts of an image of this shape that lie over each other when it is moved."""
    moves = [(int(move), side) for move, side in zip(displacement, shape, strict=True)]
    here = tuple(slice(max(0, -move), side - max(0, move)) for move, side in moves)
    there = tuple(slice(max(0, move), side + min(0, move)) for move, side in moves)
    return here, there  # type: ignore[return-value]


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The correlation of the windows around each pixel of two images of one shape."""
    product, power, other_power = (uniform_filter(x, WINDOW) for x in (one * other, one * one, other * other))
    return product / np.sqrt(np.maximum(power * other_power, 1e-6))


def _repeats(detail: np.ndarray, places: np.ndarray, displacement: np.ndarray) -> bool:
    """Whether a part is also like what lies as far on its other side, or twice as far, as in a pattern."""
    for times in (-1, 2):
        beyond = places + times * displacement
        inside = ((beyond >= 0) & (beyond < detail.shape)).all(1)
        if inside.mean() < 0.5:
            continue
        one, other = detail[tuple(places[inside].T)], detail[tuple(beyond[inside].T)]
        if (one * other).sum() > PERIODIC * np.sqrt((one**2).sum() * (other**2).sum()):
            return True
    return False
