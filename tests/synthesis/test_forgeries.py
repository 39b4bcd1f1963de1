import numpy as np
import pytest
from conftest import mid_greys, picture
from scipy.ndimage import binary_dilation, gaussian_filter, label

from forensics_lib.images.crops import fitted
from forensics_lib.synthesis.forgeries import (
    CONTENTS,
    METHODS,
    blended,
    cloned,
    composed,
    enlarged,
    filled,
    forge,
    moved,
    pasted,
    retouched,
    view,
)
from forensics_lib.synthesis.sample import PHOTOS, load_photo


def darker(image: np.ndarray) -> np.ndarray:
    """Stands for a generator: what it made is known by its pixels."""
    return (image // 2).astype(np.uint8)


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
    reach = binary_dilation(found.mask, iterations=22)  # the softest edge
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
    image, mask = picture(rng, 64, 64), np.zeros((64, 64), bool)
    mask[20:30, 20:30] = True
    for _ in range(10):
        result = moved(image, mask, image, rng)
        assert result.shape == image.shape and (result != image).any(2)[mask].mean() > 0.9


def test_a_donor_is_cut_or_padded_to_the_size(rng):
    assert fitted(picture(rng, 30, 200), (64, 100), rng).shape == (64, 100, 3)


@pytest.mark.parametrize("seed", range(24))
def test_retouching_leaves_a_region_as_bright_as_it_was(seed, rng):
    """Every way and strength of it."""
    images = [mid_greys(rng) for _ in range(5)]
    found = [retouched(image, np.random.default_rng(seed)) for image in images]
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
    for _ in range(8):
        found = filled(hidden, mask, hidden, rng)
        assert np.abs(found[mask].astype(int) - image[mask]).mean() < 40, "what was in the hole is not seen"
    assert filled(hidden, np.ones_like(mask), hidden, rng).shape == hidden.shape


def test_cloned_content_meets_its_surroundings(rng):
    base, content, mask = np.full((60, 60, 3), 90.0), np.full((60, 60, 3), 200.0), np.zeros((60, 60), bool)
    mask[20:40, 20:40] = True
    content[30, 30] += 9
    found = cloned(base, mask, content)
    assert np.abs(found[mask] - 90).max() == pytest.approx(9) and found[30, 30, 0] == pytest.approx(99)


@pytest.mark.parametrize("name", CONTENTS)
def test_regions_are_no_brighter_and_no_more_contrasted_than_their_surroundings(name, rng):
    """Over many photographs: a network must not tell regions by brightness, contrast or colour."""
    photos = [fitted(load_photo(photo), (200, 200), rng) for photo in list(PHOTOS)[:8]]
    differences = []
    for _ in range(60):
        base, donor = (photos[i] for i in rng.choice(len(photos), 2, replace=False))
        content = CONTENTS[name][0](base, np.roll(np.eye(200, dtype=bool), 3), donor, rng).astype(float)
        differences.append((content - base).mean((0, 1)))
    spread = np.std(differences, 0) / np.sqrt(len(differences))
    assert (np.abs(np.mean(differences, 0)) < 3 * spread + 0.5).all()


def test_a_view_is_turned_scaled_and_mirrored_at_times_and_shows_no_empty_corner(rng):
    image = np.full((90, 120, 3), 200, np.uint8)
    assert all((view(image, (60, 60), rng) > 190).all() for _ in range(40))
    image = picture(rng, 90, 120)
    assert len({view(image, (60, 60), rng).tobytes() for _ in range(20)}) > 15


def test_a_generator_makes_some_contents(rng):
    base, seen = picture(rng, 96, 96), []
    for _ in range(60):
        pasted(base, base, rng, lambda patch: seen.append(patch.shape) or patch)
    assert 8 < len(seen) < 30


def test_pasted_regions_have_hard_and_soft_edges_and_are_one_or_several(rng):
    hard, several = [], []
    for _ in range(60):
        base, donor = np.full((96, 96, 3), 40, np.uint8), np.full((96, 96, 3), 200, np.uint8)
        image, mask = pasted(base, donor, rng)
        hard.append((image[~mask] == 40).all())
        several.append(label(mask)[1] > 1)
    assert 0.1 < np.mean(hard) < 0.9
    assert 0.05 < np.mean(several) < 0.9
