import numpy as np
import pytest
from conftest import mid_greys, picture
from scipy.ndimage import binary_dilation, gaussian_filter, label

from forensics_lib.images.crops import fitted
from forensics_lib.synthesis.forgeries import (
    METHODS,
    SHARES,
    _retouched,
    blended,
    composed,
    enlarged,
    filled,
    forge,
    moved,
    object_mask,
    pasted,
)


def darker(image: np.ndarray) -> np.ndarray:
    """Stands for a generator: what it made is known by its pixels."""
    return (image // 2).astype(np.uint8)


def test_regions_are_never_empty_and_of_all_sizes(rng):
    shares = [object_mask((96, 128), rng).mean() for _ in range(200)]
    assert min(shares) > 0
    assert min(shares) < 2 * SHARES[0]
    assert max(shares) > SHARES[1] / 2
    assert max(shares) < 2 * SHARES[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (3, 5), (400, 2)])
def test_tiny_and_narrow_images_get_a_region_too(shape, rng):
    for _ in range(20):
        image, mask = pasted(picture(rng, *shape), None, rng)
        assert image.shape == (*shape, 3)
        assert mask.shape == shape
        assert mask.any()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_outside_the_region_stays_the_photographs(method, rng):
    photo, donor = picture(rng, 80, 100), picture(rng, 50, 160)
    found = forge(photo, donor, method, darker, rng)
    assert found.image.shape == photo.shape
    assert found.image.dtype == np.uint8
    assert found.kind == ("fr" if method == "whole" else "sp")
    near = np.abs(found.image.astype(int) - photo).max(2) > 0
    if method == "whole":
        assert near[~found.mask].mean() > 0.9, "the generator redrew all of it"
        return
    padded = np.pad(found.mask, 8)
    reach = np.any([padded[y : y + 80, x : x + 100] for y in range(17) for x in range(17)], 0)  # the soft edge
    assert not near[~reach].any()
    assert near[found.mask].mean() > 0.5


def test_a_generated_region_went_through_the_generator(rng):
    base, mask = np.full((60, 60, 3), 128, np.uint8), np.zeros((60, 60), bool)
    mask[20:40, 20:40] = True
    seen = []

    def generator(image: np.ndarray) -> np.ndarray:
        seen.append(image.shape)
        return image

    composed(base, mask, picture(rng, 60, 60), generator)
    assert seen == [(36, 36, 3)], "the box around the region, with its margin"


def test_a_copy_move_shows_another_place_of_the_image(rng):
    image = np.arange(64 * 64 * 3, dtype=np.int64).reshape(64, 64, 3) % 251
    mask = np.zeros((64, 64), bool)
    mask[20:30, 20:30] = True
    result = moved(image.astype(np.uint8), mask, rng)
    assert (result != image).any(2)[mask].mean() > 0.9
    assert (result == image).all(2)[40:].all()


def test_a_donor_is_cut_or_padded_to_the_size(rng):
    assert fitted(picture(rng, 30, 200), (64, 100), rng).shape == (64, 100, 3)


@pytest.mark.parametrize("seed", range(16))
def test_retouching_leaves_a_region_as_bright_as_it_was(seed, rng):
    """Every way and strength of it."""
    images = [mid_greys(rng) for _ in range(5)]
    found = [_retouched(image, np.random.default_rng(seed)) for image in images]
    assert not any(np.array_equal(*pair) for pair in zip(found, images, strict=True))
    assert np.abs(np.stack(found).mean((0, 1, 2)) - np.stack(images).mean((0, 1, 2))).max() < 0.1


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.3, 2.0])
def test_blending_what_is_there_already_changes_nothing(sigma, rng):
    image, mask = picture(rng, 60, 60), np.zeros((60, 60), bool)
    mask[20:40, 20:40] = True
    assert np.array_equal(blended(image, image.astype(float), mask, sigma), image)


def test_a_soft_edge_is_rounded_and_not_cut_off(rng):
    base, content, mask = picture(rng, 200, 200), picture(rng, 200, 200), np.zeros((200, 200), bool)
    mask[20:180, 20:180] = True
    soft = gaussian_filter(binary_dilation(mask).astype(float), 1.5).clip(0, 1)[..., None]
    assert abs((blended(base, content, mask, 1.5) - (base * (1 - soft) + content * soft)).mean()) < 0.02


def test_enlarging_and_shrinking_back_keeps_the_mean(rng):
    image = picture(rng, 120, 120) // 2 + 60
    assert np.abs((enlarged(lambda image: image)(image).astype(float) - image).mean((0, 1))).max() < 0.1


def test_the_same_seed_gives_the_same_forgery():
    photo, donor = (picture(np.random.default_rng(seed), 64, 64) for seed in (1, 2))
    for method in METHODS:
        one, two = (forge(photo, donor, method, darker, np.random.default_rng(5)) for _ in range(2))
        assert np.array_equal(one.image, two.image)
        assert np.array_equal(one.mask, two.mask)


def test_a_hole_is_filled_from_its_surroundings(rng):
    y, x = np.mgrid[:64, :64]
    image = np.stack([y * 3, x * 3, y + x], 2).astype(np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    hidden = np.where(mask[..., None], 255, image).astype(np.uint8)
    found = filled(hidden, mask, rng)
    assert np.abs(found[mask].astype(int) - image[mask]).mean() < 15, "what was in the hole is not seen"
    assert filled(hidden, np.ones_like(mask), rng).shape == hidden.shape


def test_pasted_regions_have_hard_and_soft_edges_and_are_one_or_several(rng):
    hard, several = [], []
    for _ in range(60):
        base, donor = np.full((96, 96, 3), 40, np.uint8), np.full((96, 96, 3), 200, np.uint8)
        image, mask = pasted(base, donor, rng)
        hard.append((image[~mask] == 40).all())
        several.append(label(mask)[1] > 1)
    assert 0.1 < np.mean(hard) < 0.9
    assert 0.05 < np.mean(several) < 0.9
