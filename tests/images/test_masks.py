"""What a mask file marks, or why it cannot be told."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, save
from PIL import Image, ImageFilter

from forensics_lib.images.io import ImageError, read_image
from forensics_lib.images.masks import mask_facts, read_mask


@pytest.mark.parametrize("high", [255, 1])
def test_masks_of_both_scales(high, tmp_path: Path):
    grey = np.zeros((5, 6), np.uint8)
    grey[1:3, 2:4] = high
    mask = read_mask(save(tmp_path / "m.png", grey), (5, 6))
    assert mask.dtype == bool
    assert mask.sum() == 4


def test_mask_of_another_size_names_both(tmp_path: Path):
    with pytest.raises(ImageError, match="mask of 6 x 5 for an image of 7 x 5"):
        read_mask(save(tmp_path / "m.png", np.full((5, 6), 255, np.uint8)), (5, 7))


def test_mask_that_marks_nothing(tmp_path: Path):
    with pytest.raises(ImageError, match="marks nothing"):
        read_mask(save(tmp_path / "m.png", np.zeros((5, 6), np.uint8)), (5, 6))


MARKED = np.zeros((16, 24), bool)
MARKED[4:12, 8:16] = True


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16", "CMYK", "F"])
def test_masks_of_every_mode_mark_the_same(mode, tmp_path: Path):
    grey = Image.fromarray(MARKED.astype(np.uint8) * 255)
    images = {"I;16": Image.fromarray(MARKED.astype(np.uint16) * 65535), "F": Image.fromarray(MARKED.astype(np.float32))}
    path = tmp_path / ("m.tif" if mode in ("CMYK", "F") else "m.png")
    image = images.get(mode) or grey.convert("RGB" if mode == "CMYK" else mode)
    (image.convert("CMYK") if mode == "CMYK" else image).save(path)
    assert np.array_equal(read_mask(path, MARKED.shape), MARKED)


@pytest.mark.parametrize("ending", ["gif", "bmp", "webp", "tif"])
def test_masks_of_every_format_mark_the_same(ending, tmp_path: Path):
    Image.fromarray(MARKED.astype(np.uint8) * 255).save(tmp_path / f"m.{ending}", lossless=True)
    assert np.array_equal(read_mask(tmp_path / f"m.{ending}", MARKED.shape), MARKED)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_a_lossy_mask_marks_what_it_was_made_of(mode, quality, tmp_path: Path):
    Image.fromarray(MARKED.astype(np.uint8) * 255).convert(mode).save(tmp_path / "m.jpg", quality=quality)
    assert np.array_equal(read_mask(tmp_path / "m.jpg", MARKED.shape), MARKED)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.502), (0, 0.95), (0.2, 0.8)])
def test_two_values_of_which_one_reaches_half_of_white(low, high, kind, tmp_path: Path):
    low, high = (round(share * np.iinfo(kind).max) for share in (low, high))
    save(tmp_path / "m.png", np.where(MARKED, high, low).astype(kind))
    assert np.array_equal(read_mask(tmp_path / "m.png", MARKED.shape), MARKED)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_zeros_and_ones_are_a_mask_of_any_depth(kind, tmp_path: Path):
    assert np.array_equal(read_mask(save(tmp_path / "m.png", MARKED.astype(kind)), MARKED.shape), MARKED)


@pytest.mark.parametrize(
    ("values", "kind", "named"),
    [
        ((0, 2), np.uint8, "0, 2 of 0 to 255"),
        ((0, 100), np.uint8, "0, 100 of 0 to 255"),
        ((0, 127), np.uint8, "0, 127"),
        ((0, 1, 2), np.uint8, "0, 1, 2"),
        ((0, 50, 200), np.uint8, "0, 50, 200"),
        (tuple(range(180)), np.uint8, "0, 1, 2, 3, ..., 179"),
        ((0, 255), np.uint16, "0, 255 of 0 to 65535"),
        ((0, 256), np.uint16, "0, 256 of 0 to 65535"),
        ((0, 1, 2, 3), np.uint16, "0, 1, 2, 3"),
    ],
)
def test_values_of_unclear_meaning_are_named_and_not_guessed(values, kind, named, tmp_path: Path):
    pixels = np.resize(np.array(values, kind), MARKED.shape)
    with pytest.raises(ImageError, match=r"m\.png: the mask has the values .* save it with 0") as refused:
        read_mask(save(tmp_path / "m.png", pixels), MARKED.shape)
    assert named in str(refused.value)


def painted(colour: tuple[int, ...], ground: tuple[int, ...] = (0, 0, 0)) -> np.ndarray:
    return np.where(MARKED[..., None], colour, ground).astype(np.uint8)


@pytest.mark.parametrize(
    "pixels",
    [painted((255, 0, 0)), painted((0, 0, 255), (255, 255, 255)), painted((0, 128, 0)), painted((255, 0, 0), (0, 255, 0))],
    ids=["red on black", "blue on white", "dark green", "red on green"],
)
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_colours_are_refused(pixels, mode, tmp_path: Path):
    Image.fromarray(pixels).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "m.png")
    with pytest.raises(ImageError, match=r"m\.png: the mask has colours; save it in grey"):
        read_mask(tmp_path / "m.png", MARKED.shape)


def test_a_photograph_with_the_region_laid_over_it_is_refused(rng, tmp_path: Path):
    with pytest.raises(ImageError, match="has colours"):
        read_mask(save(tmp_path / "m.png", picture(rng)), (48, 56))


@pytest.mark.parametrize("grey", [0, 255])
@pytest.mark.parametrize("mode", ["LA", "RGBA", "palette"])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_mask_in_the_alpha_channel_is_refused(grey, mode, inverted, tmp_path: Path):
    alpha = Image.fromarray((MARKED ^ inverted).astype(np.uint8) * 255)
    if mode == "palette":
        image = Image.fromarray((MARKED ^ inverted).astype(np.uint8), mode="P")
        image.putpalette([grey] * 6)
        image.save(tmp_path / "m.png", transparency=bytes([0, 255]))
    else:
        image = Image.new(mode[:-1], MARKED.shape[::-1], grey if mode == "LA" else (grey,) * 3)
        image.putalpha(alpha)
        image.save(tmp_path / "m.png")
    with pytest.raises(ImageError, match=r"m\.png: the mask's alpha channel"):
        read_mask(tmp_path / "m.png", MARKED.shape)


@pytest.mark.parametrize("grey", [0, 255])
@pytest.mark.parametrize(("low", "high"), [(0, 100), (200, 255), (0, 1)])
def test_a_mask_in_a_weak_alpha_channel_is_refused(grey, low, high, tmp_path: Path):
    save(
        tmp_path / "m.png",
        np.dstack([np.full((*MARKED.shape, 3), grey, np.uint8), np.where(MARKED, high, low)]).astype(np.uint8),
    )
    with pytest.raises(ImageError, match=r"m\.png: the mask's alpha channel"):
        read_mask(tmp_path / "m.png", MARKED.shape)


@pytest.mark.parametrize(
    ("values", "named"),
    [((0, 1, 255), "0, 1, 255 of"), ((0, 128, 255), "0, 128, 255 of"), ((0, 20, 180, 240), "0, 20, 180, 240 of")],
)
def test_numbers_of_objects_are_refused_though_one_is_near_white(values, named, tmp_path: Path):
    with pytest.raises(ImageError, match=f"the mask has the values {named}"):
        read_mask(save(tmp_path / "m.png", np.repeat(np.array(values, np.uint8), 80).reshape(-1, 8)), (10 * len(values), 8))


@pytest.mark.parametrize("radius", [1, 2, 4])
@pytest.mark.parametrize("blur", [ImageFilter.BoxBlur, ImageFilter.GaussianBlur])
def test_feathered_masks_and_those_that_were_jpegs_are_read(blur, radius, tmp_path: Path):
    large = Image.fromarray(MARKED.repeat(9, 0).repeat(9, 1).astype(np.uint8) * 255)
    large.filter(blur(radius)).save(tmp_path / "soft.png")
    large.save(tmp_path / "m.jpg", quality=100 - 15 * radius)
    Image.open(tmp_path / "m.jpg").save(tmp_path / "jpeg.png")
    for name in ("soft.png", "jpeg.png"):
        assert abs(read_mask(tmp_path / name, (144, 216)).mean() - MARKED.mean()) < 0.01


@pytest.mark.parametrize("read", [read_image, lambda path: read_mask(path, MARKED.shape)])
def test_a_bmp_that_pillow_unpacks_wrongly_is_refused(read, tmp_path: Path):
    image = Image.fromarray(MARKED.astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / "m.bmp")
    with pytest.raises(ImageError, match="BMP of 8 bits with a short grey palette"):
        read(tmp_path / "m.bmp")
    Image.fromarray(MARKED).save(tmp_path / "one.bmp")
    assert read_image(tmp_path / "one.bmp")[MARKED].min() == 255


def deep_png(path: Path, high: int, kind: int, channels: int) -> Path:
    """A PNG of 16-bit colours, which Pillow does not write: ``kind`` is 2 for RGB, 4 for grey with alpha."""
    pixels = np.repeat((MARKED * high)[..., None], channels, axis=2)
    pixels[..., 1:] = pixels[..., 1:] if kind == 2 else 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    size = struct.pack(">IIBBBBB", *MARKED.shape[::-1], 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2)])
def test_deep_colours_of_a_mask_must_reach_half_of_white(kind, channels, tmp_path: Path):
    assert np.array_equal(read_mask(deep_png(tmp_path / "m.png", 65535, kind, channels), MARKED.shape), MARKED)
    for high in (1, 255, 256, 300):
        with pytest.raises(ImageError, match="colours of 16 bits that do not reach half of white"):
            read_mask(deep_png(tmp_path / "m.png", high, kind, channels), MARKED.shape)
    (tmp_path / "m.ppm").write_bytes(b"P6 24 16 65535\n" + np.repeat(MARKED * 255, 3).astype(">u2").tobytes())
    with pytest.raises(ImageError, match="colours of 16 bits that do not reach half of white"):
        read_mask(tmp_path / "m.ppm", MARKED.shape)


@pytest.mark.parametrize("inverted", [False, True])
def test_an_alpha_channel_that_says_what_the_colours_say_does_no_harm(inverted, tmp_path: Path):
    grey = MARKED.astype(np.uint8) * 255
    save(tmp_path / "m.png", np.dstack([grey, grey, grey, 255 - grey if inverted else grey]))
    assert np.array_equal(read_mask(tmp_path / "m.png", MARKED.shape), MARKED)


def test_the_colours_of_a_palette_count_and_not_its_numbers(tmp_path: Path):
    image = Image.fromarray(MARKED.astype(np.uint8), mode="P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", MARKED.shape), ~MARKED)


def test_soft_edges_of_a_mask_count_from_half_on(tmp_path: Path):
    grey = np.array([[0, 60, 127, 128, 200, 255]], np.uint8)
    assert read_mask(save(tmp_path / "m.png", grey), (1, 6)).tolist() == [[False, False, False, True, True, True]]
    assert mask_facts(tmp_path / "m.png", (1, 6)) == (0.5, 6)
