import io
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, save
from PIL import Image

from forensics_lib import images
from forensics_lib.images import ImageError, pad_to, read_header, read_image, read_mask


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I;16", "F"])
def test_every_mode_becomes_rgb(mode, tmp_path: Path):
    values = np.arange(48 * 40, dtype=np.uint16).reshape(48, 40) * 30
    if mode == "I;16":
        image = Image.fromarray(values)
    elif mode == "F":
        image = Image.fromarray((values / values.max()).astype(np.float32))
    else:
        image = Image.fromarray((values >> 8).astype(np.uint8)).convert(mode)
    path = tmp_path / "x.tif"
    image.save(path)
    pixels = read_image(path)
    assert pixels.shape == (48, 40, 3)
    assert pixels.dtype == np.uint8
    assert pixels[-1].mean() > pixels[0].mean()


def test_sixteen_bits_keep_their_upper_byte():
    data = encoded(Image.fromarray(np.full((4, 4), 0x1234, np.uint16)), "PNG")
    assert (read_image(data) == 0x12).all()


def test_alpha_is_dropped_not_blended():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0] = 200  # red, fully transparent
    assert (read_image(encoded(Image.fromarray(rgba), "PNG"))[..., 0] == 200).all()


def test_orientation_is_not_applied(rng):
    image = Image.fromarray(picture(rng, 20, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    assert read_image(encoded(image, "JPEG", exif=exif)).shape == (20, 30, 3)


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\xff\xd8\xff\xe0garbage", b"\x89PNG\r\n\x1a\n"])
def test_garbage_is_an_error_with_the_name(content, tmp_path: Path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        read_image(path)


def test_truncated_is_an_error_though_its_header_reads(rng, tmp_path: Path):
    path = tmp_path / "cut.jpg"
    data = encoded(Image.fromarray(picture(rng)), "JPEG")
    path.write_bytes(data[: len(data) // 2])
    assert read_header(path).width == 56
    with pytest.raises(ImageError, match=r"cut\.jpg"):
        read_image(path)


def test_too_many_pixels_are_refused_before_decoding(rng, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="56 x 48 pixels"):
        read_image(encoded(Image.fromarray(picture(rng)), "PNG"))


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


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (40, 40)])
def test_padding_reflects_and_keeps_the_image(shape, rng):
    image = picture(rng, *shape)
    padded = pad_to(image, 32, 32)
    assert padded.shape[0] >= 32
    assert padded.shape[1] >= 32
    assert (padded[: shape[0], : shape[1]] == image).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16", "CMYK"])
def test_masks_of_every_mode_mark_the_same(mode, tmp_path: Path):
    marked = np.zeros((6, 8), bool)
    marked[2:4, 3:7] = True
    image = Image.fromarray(marked.astype(np.uint16) * 65535) if mode == "I;16" else None
    image = image or Image.fromarray(marked.astype(np.uint8) * 255).convert("RGB" if mode == "CMYK" else mode)
    path = tmp_path / ("m.tif" if mode == "CMYK" else "m.png")
    (image.convert("CMYK") if mode == "CMYK" else image).save(path)
    assert np.array_equal(read_mask(path, (6, 8)), marked)


def test_soft_edges_of_a_mask_count_from_half_on(tmp_path: Path):
    grey = np.array([[0, 60, 127, 128, 200, 255]], np.uint8)
    assert read_mask(save(tmp_path / "m.png", grey), (1, 6)).tolist() == [[False, False, False, True, True, True]]


@pytest.mark.parametrize(
    ("mode", "ending"), [("RGB", "jpg"), ("RGB", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("I;16", "png")]
)
def test_a_region_has_the_pixels_of_the_whole(mode, ending, tmp_path, rng):
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (300, 201), np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (300, 201, 3), np.uint8)).convert(mode)
    path = tmp_path / f"image.{ending}"
    image.save(path)
    whole = read_image(path)
    for rows, columns in ((slice(0, 300), slice(0, 201)), (slice(7, 290), slice(33, 34)), (slice(100, 132), slice(169, 201))):
        asked = []

        def region(height, width, rows=rows, columns=columns, asked=asked):
            asked.append((height, width))
            return rows, columns

        assert (read_image(path, region) == whole[rows, columns]).all()
        assert asked == [(300, 201)]


def test_a_file_damaged_below_the_region_is_an_error(tmp_path, rng):
    path = tmp_path / "image.jpg"
    Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ImageError, match="truncated"):
        read_image(path, lambda height, width: (slice(0, 10), slice(0, 10)))
