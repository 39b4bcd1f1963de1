import tracemalloc

import numpy as np
import pytest
from conftest import mid_greys, picture

from forensics_lib.images.crops import chosen_crops, chosen_places, pad_to, seen_whole, whole_crops


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (40, 40)])
def test_padding_reflects_and_keeps_the_image(shape, rng):
    image = picture(rng, *shape)
    padded = pad_to(image, 32, 32)
    assert padded.shape[0] >= 32
    assert padded.shape[1] >= 32
    assert (padded[: shape[0], : shape[1]] == image).all()


@pytest.mark.parametrize("shape", [(1, 1), (31, 64), (32, 32), (100, 40), (200, 300)])
@pytest.mark.parametrize("count", [1, 4])
def test_inference_crops_are_native_and_never_too_many(shape, count, rng):
    image = picture(rng, *shape)
    found = chosen_crops(image, 32, count)
    assert 1 <= len(found) <= count
    assert all(crop.shape == (32, 32, 3) for crop in found)


def test_the_textured_place_is_chosen(rng):
    image = np.full((96, 96, 3), 128, np.uint8)
    image[64:, 64:] = picture(rng, 32, 32)
    centre, textured = chosen_crops(image, 32, 2)
    assert (centre == image[32:64, 32:64]).all()
    assert (textured == image[64:, 64:]).all()


@pytest.mark.parametrize(("shape", "count"), [((32, 400), 0), ((20, 20), 0), ((33, 33), 1), ((64, 64), 1), ((100, 400), 3)])
def test_an_image_seen_whole_keeps_its_shape_and_brightness(shape, count, rng):
    image = mid_greys(rng, *shape)
    shrunk, crops = seen_whole(image, 32), whole_crops(image, 32)
    assert len(crops) == count
    if not count:
        assert shrunk is image
        return
    assert min(shrunk.shape[:2]) == 32
    assert abs(shrunk.shape[1] - 32 * shape[1] / min(shape)) <= 1
    assert abs(shrunk.mean() - image.mean()) < 1
    assert all(crop.shape == (32, 32, 3) for crop in crops)


@pytest.mark.parametrize("shape", [(64, 64), (129, 300), (700, 90)])
def test_texture_is_the_mean_difference_of_neighbours(shape, rng):
    image = picture(rng, *shape)
    green = image[..., 1].astype(int)
    energy = np.abs(np.diff(green, axis=0, prepend=green[:1])) + np.abs(np.diff(green, axis=1, prepend=green[:, :1]))
    places = chosen_places(image, 32, 6)[1:]
    texture = [energy[y : y + 32, x : x + 32].mean() for y, x in places]
    assert texture == sorted(texture, reverse=True)


def test_ranking_by_texture_needs_little_memory(rng):
    image = np.broadcast_to(rng.integers(0, 256, (8_000, 1, 3), dtype=np.uint8), (8_000, 6_000, 3))
    tracemalloc.start()
    chosen_places(image, 224, 5)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 40e6
