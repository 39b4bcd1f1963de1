import numpy as np
import pytest
from conftest import picture
from scipy.ndimage import label

from forensics_lib.synthesis.regions import SHAPES, SHARES, random_region, segments


def test_regions_are_never_empty_or_full_and_of_all_sizes(rng):
    image = picture(rng, 96, 128)
    shares = [random_region(image, rng).mean() for _ in range(200)]
    assert 0 < min(shares) < 2 * SHARES[0]
    assert SHARES[1] / 2 < max(shares) < 1


@pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_a_shape_has_about_its_share_of_the_area(make, share, rng):
    found = np.mean([make(picture(rng, 96, 128), share, rng).mean() for _ in range(30)])
    assert share / 2.5 < found < share * 2.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (3, 5), (400, 2)])
def test_tiny_and_narrow_images_have_regions(shape, rng):
    for _ in range(20):
        mask = random_region(picture(rng, *shape), rng)
        assert mask.shape == shape and mask.any()


def test_segments_follow_the_picture(rng):
    image = np.zeros((80, 80, 3), np.uint8)
    image[:, 40:] = 200
    mask = segments(image, 0.3, rng)
    assert mask[:, :38].all() != mask[:, 42:].all()
    assert label(mask)[1] == 1
