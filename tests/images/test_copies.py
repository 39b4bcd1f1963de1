"""Copy-move: what an image holds twice is found, and nothing else."""

import numpy as np
import pytest
from conftest import mid_greys

from forensics_lib.images import copies
from forensics_lib.images.copies import copied_parts
from forensics_lib.images.degradations import recompress

SIDE = 64


def copied(image: np.ndarray, source: tuple[int, int], place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The image with a square of it copied elsewhere, and what it then holds twice."""
    changed, truth = image.copy(), np.zeros(image.shape[:2], bool)
    changed[place[0] : place[0] + SIDE, place[1] : place[1] + SIDE] = image[
        source[0] : source[0] + SIDE, source[1] : source[1] + SIDE
    ]
    for top, left in (source, place):
        truth[top : top + SIDE, left : left + SIDE] = True
    return changed, truth


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("place", [(20, 150), (120, 130), (125, 15)], ids=["beside", "aslant", "below"])
@pytest.mark.parametrize("quality", [None, 90])
def test_a_part_that_was_copied_is_found_with_its_source(rng, place, quality):
    image, truth = copied(mid_greys(rng), (20, 20), place)
    image = image if quality is None else recompress(image, "JPEG", quality)
    assert iou(copied_parts(image), truth) > 0.6


def test_of_a_large_image_the_half_is_looked_at(rng, monkeypatch):
    image, truth = copied(mid_greys(rng), (20, 20), (121, 151))
    image, truth = (np.repeat(np.repeat(x, 2, 0), 2, 1) for x in (image, truth))
    monkeypatch.setattr(copies, "LARGEST", 200 * 240)
    found = copied_parts(image)
    assert found.shape == (400, 480) and iou(found, truth) > 0.6


def test_a_pattern_is_no_copy(rng):
    tile = mid_greys(rng, 50, 60)
    assert not copied_parts(np.tile(tile, (4, 4, 1))).any()


@pytest.mark.parametrize(("lighter", "found"), [(0, True), (2, False), (-2, False)])
def test_what_stands_twice_in_another_light_is_no_copy(rng, lighter, found):
    image, _ = copied(mid_greys(rng), (20, 20), (120, 130))
    image[120 : 120 + SIDE, 130 : 130 + SIDE] += np.array(lighter, np.int8).view(np.uint8)
    assert copied_parts(recompress(image, "JPEG", 90)).any() == found


def test_an_edge_is_no_copy():
    ramp = np.abs(np.arange(240) - 120).clip(0, 100).astype(np.uint8) // 20 * 40
    assert not copied_parts(np.broadcast_to(ramp[None, :, None], (200, 240, 3)).copy()).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (33, 33), (200, 240)])
@pytest.mark.parametrize("value", [0, 120, 255])
def test_flat_and_tiny_images_have_no_copies(shape, value):
    found = copied_parts(np.full((*shape, 3), value, np.uint8))
    assert found.shape == shape and found.dtype == bool and not found.any()


def test_a_photograph_has_no_copies(rng):
    assert not copied_parts(recompress(mid_greys(rng, 400, 500), "JPEG", 80)).any()
