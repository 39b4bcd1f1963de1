from functools import partial

import numpy as np
import pytest
from conftest import EVERYTHING, NOTHING, mid_greys, picture
from PIL import Image
from scipy.ndimage import gaussian_filter

from forensics_lib.images.crops import at_scale
from forensics_lib.images.degradations import KERNELS, add_noise, blur, degrade, recompress, resize, upload


@pytest.mark.parametrize("codec", ["JPEG", "WEBP"])
def test_stronger_compression_loses_more(codec, rng):
    image = picture(rng)
    errors = [np.abs(recompress(image, codec, quality).astype(int) - image).mean() for quality in (95, 60, 20)]
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_image_and_mask_are_scaled_together(rng):
    image, mask = resize(picture(rng), np.eye(48, 56, dtype=bool), 0.5, Image.Resampling.BICUBIC)
    assert image.shape == (24, 28, 3)
    assert mask.shape == (24, 28)
    assert mask.dtype == bool


def test_scaling_never_loses_the_image(rng):
    assert resize(picture(rng, 1, 1), None, 0.3, Image.Resampling.BILINEAR)[0].shape == (1, 1, 3)


def test_blur_and_noise_do_what_they_say(rng):
    image = picture(rng)
    assert blur(image, 1.0).astype(float).std() < image.astype(float).std()
    assert abs((add_noise(np.full((99, 99, 3), 128, np.uint8), 5, rng).astype(float) - 128).std() - 5) < 0.3


UNBIASED = {
    **{f"blur {sigma}": partial(blur, sigma=sigma) for sigma in (0.3, 0.5, 0.8, 1.5, 3.0)},
    **{
        f"{kernel.name} {scale}": (lambda image, scale=scale, kernel=kernel: resize(image, None, scale, kernel)[0])
        for kernel in KERNELS
        for scale in (0.25, 0.37, 0.5, 0.75, 0.9, 1.3, 1.5, 2.0, 3.0)
    },
    **{f"noise {sigma}": (lambda image, s=sigma: add_noise(image, s, np.random.default_rng(1))) for sigma in (0.4, 2, 8)},
    **{
        f"JPEG {quality} {sampling}": partial(recompress, codec="JPEG", quality=quality, subsampling=sampling)
        for quality in (50, 75, 90, 100)
        for sampling in (0, 1, 2)
    },
    **{f"scale for masks {scale}": partial(at_scale, scale=scale) for scale in (0.5, 0.75, 1.5, 2.0)},
    **{f"upload {scale}": (lambda image, s=scale: upload(image, None, s, 75)[0]) for scale in (0.5, 0.7, 1.0)},
}


@pytest.mark.parametrize("name", UNBIASED)
def test_no_operation_makes_a_picture_darker_or_brighter(name, rng):
    """Nor a channel of it."""
    images = [mid_greys(rng) for _ in range(5)]
    errors = [UNBIASED[name](image).mean((0, 1)) - image.mean((0, 1)) for image in images]
    assert np.abs(np.mean(errors, 0)).max() < 0.1


@pytest.mark.parametrize("quality", [45, 75, 100])
def test_webp_adds_no_more_than_its_own_colour_conversion(quality, rng):
    image = mid_greys(rng)
    assert np.abs((recompress(image, "WEBP", quality).astype(float) - image).mean((0, 1))).max() < 0.35


@pytest.mark.parametrize("level", [0, 1, 37, 128, 254, 255])
def test_flat_pictures_stay_flat(level):
    image = np.full((40, 48, 3), level, np.uint8)
    assert (blur(image, 1.1) == level).all()
    for kernel in KERNELS:
        assert (resize(image, None, 0.6, kernel)[0] == level).all()


def test_probability_zero_changes_nothing(rng):
    image = picture(rng)
    assert (degrade(image, None, NOTHING, rng)[0] == image).all()


def test_the_same_generator_state_gives_the_same_result(rng):
    image = picture(rng)
    results = [degrade(image, None, EVERYTHING, np.random.default_rng(3))[0] for _ in range(2)]
    assert np.array_equal(*results)


def test_equalizing_compresses_every_image_by_one_distribution(rng):
    image = picture(rng, 64, 64)
    found = [degrade(image, None, NOTHING, rng, equalize=True)[2] for _ in range(200)]
    assert {encoding.format for encoding in found} == {"JPEG", "WEBP"}
    assert min(e.quality for e in found) < 62 and max(e.quality for e in found) > 92
    assert degrade(image, None, NOTHING, rng)[2] is None


def test_an_upload_shrinks_image_and_mask_and_never_enlarges(rng):
    image, mask, encoding = upload(picture(rng), np.ones((48, 56), bool), 0.5, 80)
    assert image.shape == (24, 28, 3) and mask.shape == (24, 28)
    assert (encoding.format, encoding.quality) == ("JPEG", 80)
    assert upload(picture(rng), None, 1.5, 80)[0].shape == (48, 56, 3)


@pytest.mark.parametrize(
    ("operation", "codec"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("social", "JPEG"), ("double_jpeg", "JPEG")]
)
def test_qualities_stay_in_their_ranges(operation, codec, rng):
    limits = {"jpeg_quality": (70, 72), "webp_quality": (70, 72), "social_quality": (70, 72)}
    settings = NOTHING.model_copy(update={operation: 1.0, **limits})
    found = [degrade(picture(rng), None, settings, rng)[2] for _ in range(20)]
    assert {encoding.format for encoding in found} == {"WEBP" if operation == "webp" else "JPEG"}
    assert {encoding.quality for encoding in found} == {70, 71, 72}


def block_phase(image: np.ndarray) -> tuple[int, int]:
    """In which row and column of eight the blocks of a coarse JPEG begin."""
    grey = image.astype(float).mean(2)
    steps = [np.abs(np.diff(grey, axis=axis)).mean(1 - axis) for axis in (0, 1)]
    return tuple((int(np.argmax([part[phase::8].mean() for phase in range(8)])) + 1) % 8 for part in steps)


def test_blocks_of_a_training_crop_begin_anywhere(rng):
    smooth = gaussian_filter(rng.normal(0, 1, (96, 96, 3)), (5, 5, 0))
    image = (128 + 50 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)
    assert block_phase(recompress(image, "JPEG", 5)) == (0, 0)
    phases = [block_phase(recompress(image, "JPEG", 5, rng=rng)) for _ in range(150)]
    assert {row for row, _ in phases} == {column for _, column in phases} == set(range(8))
    coarse = NOTHING.model_copy(update={"jpeg": 1.0, "jpeg_quality": (5, 5)})
    assert len({block_phase(degrade(image, None, coarse, rng)[0]) for _ in range(40)}) > 10


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (40, 40)])
def test_compression_keeps_the_size_wherever_its_blocks_begin(shape, rng):
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    for codec in ("JPEG", "WEBP"):
        assert all(recompress(image, codec, 80, rng=rng).shape == image.shape for _ in range(20))
