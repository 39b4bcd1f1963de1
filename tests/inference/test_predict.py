from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, mid_greys, picture, save
from PIL import Image
from scipy.special import expit

from forensics_lib.device import DeviceMemoryError, Machine, choose_machine
from forensics_lib.images.crops import chosen_crops, whole_crops
from forensics_lib.images.masks import load_mask, save_mask
from forensics_lib.inference import predict
from forensics_lib.inference.predict import output_in_parts, predict_mask, predict_masks, predict_probabilities, tile_starts
from forensics_lib.models.combined import CombinedModel, Output
from forensics_lib.params import Params

PARAMS = Params(**TINY | {"mask_scales": [1.0]})
MACHINE = choose_machine(PARAMS)


class Constant(torch.nn.Module):
    """Answers 0.5 for every pixel and image."""

    sees_whole = False

    def forward(self, x):
        return Output(torch.zeros(len(x), 2), torch.zeros(len(x), 1, *x.shape[-2:]), x.mean((2, 3)))

    def classify(self, features, mask):
        return torch.zeros(len(features), 2)


class Brightness(Constant):
    """A pixel's probability is its red value: what tiles cannot change."""

    def forward(self, x):
        return super().forward(x)._replace(mask_logits=torch.logit(x[:, :1].clamp(0.01, 0.99)))


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(10, 64, 16), (64, 64, 16), (65, 64, 16), (1000, 64, 16), (977, 64, 0)]
)
def test_tiles_cover_a_side_and_overlap(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(length - tile, 0)
    assert all(b - a <= tile - overlap for a, b in pairwise(starts))


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (48, 56), (64, 64), (65, 64), (200, 150), (257, 31)])
def test_a_constant_model_gives_a_constant_mask_of_the_images_size(shape, rng):
    prob, mask = predict_mask(Constant(), picture(rng, *shape), PARAMS, MACHINE)
    assert mask.shape == shape
    assert mask.dtype == np.float16
    assert prob == 0.5
    assert (mask == 0.5).all()


@pytest.mark.parametrize("shape", [(40, 40), (200, 150)])
def test_tiles_put_every_pixel_in_its_place(shape, rng):
    image = picture(rng, *shape)
    mask = predict_mask(Brightness(), image, PARAMS, MACHINE)[1]
    assert np.abs(mask - (image[..., 0] / 255).clip(0.01, 0.99)).max() < 2e-3


@pytest.mark.parametrize("scales", [[1.0, 0.5], [0.5]])
@pytest.mark.parametrize("shape", [(40, 40), (200, 150)])
def test_flips_and_scales_put_every_pixel_in_its_place(shape, scales):
    smooth = np.linspace(30, 220, shape[0] * shape[1]).reshape(*shape, 1).repeat(3, 2).astype(np.uint8)
    params = PARAMS.model_copy(update={"mask_flips": True, "mask_scales": scales})
    mask = predict_mask(Brightness(), smooth, params, MACHINE)[1]
    assert mask.shape == shape
    assert np.abs(mask - smooth[..., 0] / 255).max() < 0.05


@pytest.mark.parametrize(
    ("shape", "count"), [((20, 30), 1), ((40, 45), 1), ((46, 10), 2), ((64, 10), 2), ((150, 200), 4), ((513, 20), 5)]
)
def test_a_pyramid_halves_an_image_down_to_about_a_crop(shape, count, rng):
    seen = []

    class Watching(Brightness):
        def forward(self, x):
            seen.append(tuple(x.shape[2:]))
            return super().forward(x)

    params = PARAMS.model_copy(update={"mask_scales": "pyramid", "crop_size": 32, "tile_size": 1024})
    mask = predict_mask(Watching(), picture(rng, *shape), params, MACHINE)[1]
    assert mask.shape == shape
    assert seen == [tuple(max(1, round(side / 2**level)) for side in shape) for level in range(count)]


def test_tiled_and_whole_masks_agree(rng):
    """A model whose reach is smaller than the overlap says the same of an image in tiles and of the image as one."""
    torch.manual_seed(0)

    class Local(Constant):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 1, 9, padding=4, padding_mode="reflect")

        def forward(self, x):
            return super().forward(x)._replace(mask_logits=self.conv(x) * 4)

    image, model = picture(rng, 224, 160), Local().eval()
    tiled = predict_mask(model, image, PARAMS, MACHINE)[1].astype(float)
    at_once = predict_mask(model, image, PARAMS.model_copy(update={"tile_size": 256}), MACHINE)[1]
    apart = np.abs(tiled - at_once)
    assert apart.mean() < 0.01  # they differ where a tile ends: there the blend weighs it least
    assert np.quantile(apart, 0.95) < 0.05


def test_the_decision_on_tiles_is_that_on_the_whole_image(rng, monkeypatch):
    torch.manual_seed(0)
    model = CombinedModel("B", "test_convnext", decoder_channels=16).eval()
    image = np.tile(picture(rng, 64, 64), (3, 2, 1))  # every tile shows the same, as does the whole
    monkeypatch.setattr(Params, "tile_overlap", 0)
    tiled = predict_mask(model, image, PARAMS, MACHINE)[0]
    one = predict_mask(model, image[:64, :64], PARAMS, MACHINE)[0]
    assert tiled == pytest.approx(one, abs=1e-3)


def test_masks_are_written_and_read_back(tmp_path, rng):
    mask = rng.random((7, 9)).astype(np.float16)
    save_mask(tmp_path / "m.npz", mask)
    assert np.array_equal(load_mask(tmp_path / "m.npz"), mask)
    with np.load(tmp_path / "m.npz") as content:
        assert content.files == ["arr_0"]


@pytest.fixture
def files(tmp_path, rng):
    paths = [save(tmp_path / f"{i}.png", picture(rng, 40 + 9 * i, 50)) for i in range(5)]
    paths[2].write_bytes(b"broken")
    return pd.DataFrame({"path": [str(path) for path in paths]})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_probabilities_do_not_depend_on_the_other_images(files, precision, monkeypatch):
    torch.manual_seed(0)
    model = CombinedModel("A", "test_convnext").eval()
    machine = replace(MACHINE, precision=precision)
    monkeypatch.setattr(Machine, "images_at_once", lambda self, pixels: 4)  # images share batches, and fill several
    together = list(predict_probabilities(model, files, PARAMS, machine))
    assert [found.index for found in together] == list(range(5))
    assert [np.isnan(found.prob) for found in together] == [False, False, True, False, False]
    assert "2.png" in together[2].error
    for number in (0, 1, 3, 4):
        (alone,) = predict_probabilities(model, files.iloc[[number]], PARAMS, machine)
        assert alone.prob == together[number].prob


@pytest.mark.parametrize("sees_whole", [True, False])
def test_an_image_seen_whole_counts_as_much_as_all_native_crops(sees_whole, tmp_path, rng):
    class Bright(Constant):
        def forward(self, x):
            margins = 10 * x.mean((1, 2, 3))
            return super().forward(x)._replace(logits=torch.stack([torch.zeros_like(margins), margins], 1))

    Bright.sees_whole = sees_whole
    image = picture(rng, 96, 64)
    image[:, 32:] //= 8
    rows = pd.DataFrame({"path": [str(save(tmp_path / "a.png", image)), str(save(tmp_path / "b.png", image[:32, :32]))]})
    large, small = predict_probabilities(Bright(), rows, PARAMS.model_copy(update={"crop_size": 32}), MACHINE)
    native = [10 * crop.mean() / 255 for crop in chosen_crops(image, 32, PARAMS.crops_per_image)]
    whole = [10 * crop.mean() / 255 for crop in whole_crops(image, 32)]
    assert large.margins == pytest.approx(native, abs=1e-4)
    assert large.whole_margins == (pytest.approx(whole, abs=1e-4) if sees_whole else None)
    expected = (np.mean(native) + np.mean(whole)) / 2 if sees_whole else np.mean(native)
    assert large.prob == pytest.approx(expit(expected), abs=1e-4)
    assert small.whole_margins is None, "of an image of one crop, which it sees whole already"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_images_that_wait_for_a_full_batch_hold_no_open_files(files, monkeypatch):
    open_files = []

    class Counting(Constant):
        def forward(self, x):
            open_files.append(len(list(Path("/proc/self/fd").iterdir())))
            return super().forward(x)

    monkeypatch.setattr(Machine, "images_at_once", lambda self, pixels: 1000)  # all wait
    many = pd.concat([files] * 20, ignore_index=True)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert len(list(predict_probabilities(Counting(), many, PARAMS, replace(MACHINE, workers=1)))) == len(many)
    assert len(open_files) == 1
    assert open_files[0] < before + 40  # not one for each of the 80 readable images


def test_masks_keep_the_order_and_carry_errors(files):
    torch.manual_seed(0)
    model = CombinedModel("B", "test_convnext", decoder_channels=16).eval()
    predictions = list(predict_masks(model, files, PARAMS, MACHINE))
    assert [p.index for p in predictions] == list(range(5))
    assert predictions[2].mask is None
    assert "2.png" in predictions[2].error
    assert predictions[3].mask.shape == (67, 50)


def test_tiles_of_several_images_share_full_batches_and_change_no_result(tmp_path, rng, monkeypatch):
    torch.manual_seed(0)
    model, sizes = CombinedModel("B", "test_convnext", decoder_channels=16).eval(), []
    model.register_forward_pre_hook(lambda _, images: sizes.append(tuple(images[0].shape)))  # not of its plain forward
    images = [picture(rng, *shape) for shape in [(64, 64), (100, 150), (40, 50), (130, 130), (64, 64)]]
    rows = pd.DataFrame({"path": [str(save(tmp_path / f"{number}.png", image)) for number, image in enumerate(images)]})
    params = PARAMS.model_copy(update={"mask_flips": True, "mask_scales": "pyramid"})
    monkeypatch.setattr(Machine, "images_at_once", lambda self, pixels: 4)
    together = list(predict_masks(model, rows, params, MACHINE))
    whole_tiles = 1 + 3 * 4 + 0 + (4 * 4 + 2 * 2) + 1  # the fourth image has some at two scales
    assert sizes == [(4, 3, 64, 64)] * (2 * -(-whole_tiles // 4))
    for image, found in zip(images, together, strict=True):
        prob, mask = predict_mask(model, image, params, MACHINE)
        assert prob == found.prob and np.array_equal(mask, found.mask)


def test_parts_that_an_image_holds_twice_count_as_manipulated(tmp_path, rng):
    image = mid_greys(rng)
    image[120:184, 150:214] = image[20:84, 20:84]
    rows = pd.DataFrame({"path": [str(save(tmp_path / name, pixels)) for name, pixels in
                                  (("copied.png", image), ("flat.png", np.full((90, 90, 3), 120, np.uint8)))]})  # fmt: skip
    model = CombinedModel("B", "test_convnext", decoder_channels=16, levels="mask").eval()
    params = PARAMS.model_copy(update={"copy_move": True})
    plain, counted = (list(predict_masks(model, rows, one, MACHINE)) for one in (PARAMS, params))
    parts = counted[0].mask > plain[0].mask
    assert parts[30:70, 30:70].all() and parts[130:170, 160:200].all() and not parts[:, 220:].any()
    assert (counted[0].mask[parts] == np.float16(predict.COPIED)).all() and counted[0].prob == predict.COPIED > plain[0].prob
    assert counted[1].prob == plain[1].prob and np.array_equal(counted[1].mask, plain[1].mask), "nothing there is held twice"
    alone = predict_mask(model, image, params, MACHINE)
    assert alone[0] == counted[0].prob and np.array_equal(alone[1], counted[0].mask)


def test_thresholds_of_before_copies_counted_are_of_another_prediction():
    chosen = {"tile_size": PARAMS.tile_size}
    now = PARAMS.model_copy(update={"copy_move": True})
    assert predict.other_settings(chosen, now, "B") == ({"copy_move": False}, {"copy_move": True})
    assert predict.other_settings(chosen, PARAMS, "B") == ({}, {})


def test_images_that_wait_for_a_full_batch_are_bounded_by_their_pixels(tmp_path, rng, monkeypatch):
    rows = pd.DataFrame({"path": [str(save(tmp_path / f"{number}.png", picture(rng, 64, 64))) for number in range(7)]})
    monkeypatch.setattr(predict, "WAITING_PIXELS", 2.5 * 64 * 64)
    monkeypatch.setattr(Machine, "images_at_once", lambda self, pixels: 1000)
    read: list[np.ndarray] = []
    predictions = predict_masks(Constant(), rows, PARAMS, MACHINE, change=lambda image: (read.append(image), image)[1])
    assert [(len(read), found.index) for found in predictions] == [(3, 0), (3, 1), (3, 2), (6, 3), (6, 4), (6, 5), (7, 6)]


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "P", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (33, 70)])
def test_odd_modes_and_sizes_get_a_mask_of_their_size(mode, size, tmp_path, rng):
    torch.manual_seed(0)
    model = CombinedModel("B", "test_convnext", decoder_channels=16).eval()
    values = rng.integers(0, 256, size)
    image = Image.fromarray((values * 257).astype(np.uint16) if mode == "I;16" else values.astype(np.uint8))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    (image if mode == "I;16" else image.convert(mode)).save(path)
    (found,) = predict_masks(model, pd.DataFrame({"path": [str(path)]}), PARAMS, MACHINE)
    assert found.error is None
    assert found.mask.shape == size
    assert np.isfinite(found.mask).all()
    assert 0 <= found.prob <= 1


def test_a_batch_that_does_not_fit_into_memory_goes_through_in_halves():
    model, sizes = CombinedModel("B", "test_convnext", decoder_channels=16).eval(), []

    def small(images: torch.Tensor) -> Output:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(images)

    images = torch.rand(5, 3, 64, 64)
    with torch.inference_mode():
        found, expected = output_in_parts(small, images), model(images)
    assert sizes == [5, 3, 2, 1, 2]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_image_that_does_not_fit_into_memory_says_what_to_lower():
    def never(images: torch.Tensor) -> Output:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DeviceMemoryError, match=r"one image or tile of 64 x 96 pixels does not fit .*halve tile_size"):
        output_in_parts(never, torch.rand(4, 3, 64, 96))
