import io
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import encoded, picture, save
from PIL import Image

from forensics_lib.images import io as images
from forensics_lib.images.headers import hashes_of, read_header
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.images.masks import read_mask


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


GREY16 = np.arange(0, 65536, 13, dtype=np.uint16)[:5040].reshape(70, 72)


def pgm(values: np.ndarray, white: int) -> bytes:
    return b"P5 %d %d %d\n" % (*values.shape[::-1], white) + values.astype(">u2").tobytes()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_the_nearest_grey_level(form):
    data = pgm(GREY16, 65535) if form == "PPM" else encoded(Image.fromarray(GREY16), form)
    found = read_image(data)[..., 0]
    assert np.array_equal(found, np.rint(GREY16 / 257))
    assert abs((found - GREY16 / 257).mean()) < 0.01


def test_deep_pictures_have_the_hash_of_their_8_bits(rng, tmp_path):
    grey = picture(rng, 64, 64)[..., 0]
    save(tmp_path / "8.png", grey)
    save(tmp_path / "16.png", grey.astype(np.uint16) * 257)
    Image.fromarray(grey / np.float32(255)).save(tmp_path / "float.tif")
    found = hashes_of([str(tmp_path / name) for name in ("8.png", "16.png", "float.tif")])
    assert found[0][0] is not None and len(set(found)) == 1


def test_floats_become_the_nearest_grey_level(rng):
    values = rng.random((64, 64)).astype(np.float32)
    assert abs((read_image(encoded(Image.fromarray(values), "TIFF"))[..., 1] - values * 255.0).mean()) < 0.02


def test_alpha_is_dropped_not_blended():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0] = 200  # red, fully transparent
    assert (read_image(encoded(Image.fromarray(rgba), "PNG"))[..., 0] == 200).all()


def test_orientation_is_not_applied(rng):
    image = Image.fromarray(picture(rng, 20, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    assert read_image(encoded(image, "JPEG", exif=exif)).shape == (20, 30, 3)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_a_tiff_stays_on_its_stored_grid(number, compression, mode, rng, tmp_path):
    values = rng.integers(0, 65536, (20, 30), np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else Image.fromarray(picture(rng, 20, 30)).convert(mode)
    image.save(tmp_path / "plain.tif", compression=compression)
    image.save(tmp_path / "turned.tif", compression=compression, tiffinfo={274: number})
    header = read_header(tmp_path / "turned.tif")
    assert (header.height, header.width) == (20, 30)
    assert np.array_equal(read_image(tmp_path / "turned.tif"), read_image(tmp_path / "plain.tif"))
    with images.open_image(tmp_path / "turned.tif") as opened:
        assert images.decoded(opened).size == (30, 20)


def test_a_turned_tiff_and_its_mask_share_a_grid(rng, tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[3:8, 5:9] = 255
    Image.fromarray(mask).save(tmp_path / "mask.tif", tiffinfo={274: 6})
    assert np.array_equal(read_mask(tmp_path / "mask.tif", (20, 30)), mask > 0)


def test_an_orientation_that_xmp_tells_is_not_applied_either(rng, tmp_path):
    pixels = picture(rng, 20, 30)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(pixels).save(tmp_path / "x.tif", tiffinfo={700: xmp})
    assert np.array_equal(read_image(tmp_path / "x.tif"), pixels)


RAMP = np.linspace(0, 1, 40 * 64).reshape(40, 64)
LEVELS = RAMP[..., None] * [255, 255, 255]
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], 2)


def tiff(values: np.ndarray, photometric: str, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric=photometric, metadata=None, **options)
    return buffer.getvalue()


def whole_range(values: np.ndarray, kind: str) -> np.ndarray:
    """Values in [0, 1] over the whole range of integers of this kind, floats as they are."""
    return (values if kind[0] == "f" else values * np.iinfo(kind).max).astype(kind)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
def test_a_tiff_of_any_kind_of_number_is_read_right_or_refused(kind, order, compression):
    """Grey, grey whose zero is white, colours and colours in planes."""
    options = {"byteorder": order, "compression": compression}
    files = {
        "grey": (tiff(whole_range(RAMP, kind), "minisblack", **options), LEVELS),
        "white": (tiff(whole_range(1 - RAMP, kind), "miniswhite", **options), LEVELS),
        "colours": (tiff(whole_range(COLOURS, kind), "rgb", **options), COLOURS * 255),
        "planes": (
            tiff(whole_range(COLOURS, kind).transpose(2, 0, 1).copy(), "rgb", planarconfig="separate", **options),
            COLOURS * 255,
        ),
    }
    read = set()
    for name, (data, right) in files.items():
        try:
            assert np.abs(read_image(data) - right).max() <= 1.01, name
            read.add(name)
        except ImageError as error:
            assert "TIFF" in str(error) and "save it" in str(error)
            with pytest.raises(ImageError):
                read_header(data, complete=True)
    assert read >= {"u1": set(files), "u2": {"grey", "colours"}}.get(kind, set())


@pytest.mark.parametrize("high", [np.nan, np.inf, 1.2, 255.0, -0.5])
def test_floats_without_a_known_white_are_refused_with_their_range(high):
    data = encoded(Image.fromarray(np.where(RAMP > 0.9, high, RAMP).astype(np.float32)), "TIFF")
    for read in (read_image, lambda data: read_header(data, complete=True)):
        with pytest.raises(ImageError, match=r"floats from \S+ to \S+ have no known white"):
            read(data)


def twelve_bits(values: np.ndarray) -> bytes:
    """An uncompressed little-endian TIFF of 12-bit grey; ``values`` have an even width."""
    high, low = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], 2).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_twelve_bits_reach_from_black_to_white():
    found = read_image(twelve_bits(np.rint(RAMP * 4095)))
    assert np.abs(found - LEVELS).max() <= 0.54  # half a level of 256, and half of one of 4,096


def test_the_first_page_counts(rng):
    pages = rng.integers(0, 256, (4, 30, 40), np.uint8)
    assert np.array_equal(read_image(tiff(pages, "minisblack"))[..., 0], pages[0])


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
    with images.open_image(path) as opened:
        rgb = images.decoded(opened)
    assert rgb.size == (201, 300)
    for rows, columns in ((slice(0, 300), slice(0, 201)), (slice(7, 290), slice(33, 34)), (slice(100, 132), slice(169, 201))):
        assert (images.pixels_in(rgb, rows, columns) == whole[rows, columns]).all()


def test_a_file_damaged_below_the_region_is_an_error(tmp_path, rng):
    path = tmp_path / "image.jpg"
    Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ImageError, match="truncated"), images.open_image(path) as opened:
        images.pixels_in(images.decoded(opened), slice(0, 10), slice(0, 10))
