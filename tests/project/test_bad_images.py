"""Odd, damaged and hostile files, each with its outcome: the same where data are listed, in training, and in inference."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import encoded, picture
from PIL import Image, ImageCms, features

from forensics_lib.data.datasets import TrainingCrops
from forensics_lib.data.headers import read_headers
from forensics_lib.images.headers import facts_of
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.images.masks import load_mask
from forensics_lib.inference import shards as module
from forensics_lib.inference.shards import infer
from forensics_lib.params import Degradations
from forensics_lib.submission.build import build_submission

SIZE = (40, 56)  # height and width of most of them
RNG = np.random.default_rng(0)
PIXELS = picture(RNG, *SIZE)
PHOTO = Image.fromarray(PIXELS)
WIDE = Image.fromarray(picture(RNG, 96, 160))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, data: bytes, *chunks: bytes) -> bytes:
    """A PNG of 8-bit grey with any declared size and any data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def oriented(number: int) -> bytes:
    exif = PHOTO.getexif()
    exif[0x0112] = number
    return encoded(PHOTO, "JPEG", exif=exif)


def animated(form: str) -> bytes:
    frames = [PHOTO, PHOTO.rotate(180), PHOTO.rotate(90)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50)


def restarted(data: bytes) -> bytes:
    """A JPEG whose scan is cut off but whose end mark is there."""
    return data[: len(data) * 2 // 3] + b"\xff\xd9"


JPEG, PNG, WEBP = encoded(PHOTO, "JPEG", quality=90), encoded(PHOTO, "PNG"), encoded(PHOTO, "WEBP", quality=90)
GIF, TIFF, BMP = encoded(PHOTO, "GIF"), encoded(PHOTO, "TIFF"), encoded(PHOTO, "BMP")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY16 = Image.fromarray((PIXELS[..., 0].astype(np.uint16) << 8) + 7)
PALETTE = PHOTO.quantize(32)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 56\n%%EndComments\n/Helvetica findfont\nshowpage\n%%EOF\n"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)

# name -> content, and what becomes of it: the size that is read, or a part of the message that refuses it
CASES: dict[str, tuple[bytes, tuple[int, int] | str]] = (
    {
        "empty.jpg": (b"", "not an image"),
        "one_byte.png": (b"\x89", "not an image"),
        "zeros.jpg": (bytes(5000), "not an image"),
        "html.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
        "text.png": (b"image_id,prob\nx.jpg,0.5\n", "not an image"),
        "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not an image"),
        "archive.jpg": (b"PK\x03\x04" + bytes(300), "not an image"),
        "pickle.png": (b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", "not an image"),
        "postscript.jpg": (EPS, "not an image"),  # Pillow would hand it to Ghostscript
        "heic.heic": (HEIC, "heic"),
        "jpeg_cut_in_header.jpg": (JPEG[:100], "jpeg_cut_in_header"),
        "jpeg_cut_early.jpg": (JPEG[: len(JPEG) // 3], "truncated"),
        "jpeg_cut_late.jpg": (JPEG[:-40], "truncated"),
        "jpeg_cut_but_ended.jpg": (restarted(JPEG), SIZE),  # libjpeg fills what is missing and warns of nothing
        "jpeg_without_its_end.jpg": (JPEG[:-2], "truncated"),
        "jpeg_with_a_tail.jpg": (JPEG + b"appended" * 50, SIZE),
        "jpeg_twice.jpg": (JPEG + JPEG, SIZE),
        "png_cut_early.png": (PNG[: len(PNG) // 3], "truncated"),
        "png_cut_late.png": (PNG[:-100], "truncated"),
        "png_without_its_end.png": (PNG[:-12], SIZE),  # all of its pixels are there
        "png_without_its_last_checksum.png": (PNG[:-16], SIZE),
        "png_bad_checksum.png": (PNG[:60] + bytes([PNG[60] ^ 0xFF]) + PNG[61:], "png_bad_checksum"),
        "webp_cut.webp": (WEBP[: len(WEBP) // 2], "webp_cut"),
        "gif_cut.gif": (GIF[: len(GIF) // 2], "truncated"),
        "tiff_cut.tif": (TIFF[: len(TIFF) // 2], "tiff_cut"),
        "bmp_cut.bmp": (BMP[: len(BMP) // 2], "truncated"),
        "jpeg_as.png": (JPEG, SIZE),
        "png_as.jpg": (PNG, SIZE),
        "webp_as.jpg": (WEBP, SIZE),
        "huge_declared.png": (png(100_000, 100_000, b"\0" * 100), "100000 x 100000 pixels"),
        "bomb.png": (png(40_000, 40_000, b"\0" * 1000), "40000 x 40000 pixels"),
        "size_zero.png": (png(0, 0, b""), "size_zero"),
        "text_bomb.png": (png(2, 2, b"\0ab\0cd", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300_000_000), 9))), "text_bomb"),
        "profile_bomb.png": (
            png(2, 2, b"\0ab\0cd", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(300_000_000), 9))),
            "profile_bomb",
        ),
        "one_pixel.png": (encoded(PHOTO.crop((0, 0, 1, 1)), "PNG"), (1, 1)),
        "one_row.png": (encoded(PHOTO.resize((20_000, 1)), "PNG"), (1, 20_000)),
        "one_column.png": (encoded(PHOTO.resize((1, 3_000)), "PNG"), (3_000, 1)),
        "two_by_two.jpg": (encoded(PHOTO.resize((2, 2)), "JPEG"), (2, 2)),
        "bilevel.png": (encoded(PHOTO.convert("1"), "PNG"), SIZE),
        "grey.jpg": (encoded(PHOTO.convert("L"), "JPEG"), SIZE),
        "grey_alpha.png": (encoded(PHOTO.convert("LA"), "PNG"), SIZE),
        "grey_16_bit.png": (encoded(GREY16, "PNG"), SIZE),
        "grey_16_bit.tif": (encoded(GREY16, "TIFF"), SIZE),
        "grey_32_bit.tif": (encoded(Image.fromarray(PIXELS[..., 0].astype(np.int32)), "TIFF"), "no known white"),
        "float.tif": (encoded(Image.fromarray(PIXELS[..., 0].astype(np.float32) / 255), "TIFF"), SIZE),
        "float_not_finite.tif": (encoded(Image.fromarray(np.full(SIZE, np.nan, np.float32)), "TIFF"), "no known white"),
        "float_of_levels.tif": (encoded(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"), "no known white"),
        "turned.tif": (encoded(PHOTO, "TIFF", tiffinfo={274: 6}), SIZE),
        "alpha.png": (encoded(PHOTO.convert("RGBA"), "PNG"), SIZE),
        "palette.png": (encoded(PALETTE, "PNG"), SIZE),
        "palette_alpha.png": (encoded(PALETTE, "PNG", transparency=3), SIZE),
        "palette_alphas.png": (encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 8))), SIZE),
        "palette.gif": (GIF, SIZE),
        "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG"), SIZE),
        "cmyk.tif": (encoded(PHOTO.convert("CMYK"), "TIFF"), SIZE),
        "ycck.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG", keep_rgb=False, subsampling=2), SIZE),
        "rgb_jpeg.jpg": (encoded(PHOTO, "JPEG", keep_rgb=True), SIZE),
        "lab.tif": (encoded(PHOTO.convert("LAB"), "TIFF"), SIZE),
        "progressive.jpg": (encoded(PHOTO, "JPEG", progressive=True), SIZE),
        "progressive_cut.jpg": (encoded(WIDE, "JPEG", progressive=True)[:-400], "truncated"),
        "jpeg_444.jpg": (encoded(PHOTO, "JPEG", subsampling=0), SIZE),
        "jpeg_quality_1.jpg": (encoded(PHOTO, "JPEG", quality=1), SIZE),
        "interlaced_like.png": (encoded(PHOTO, "PNG", optimize=True), SIZE),
        "lossless.webp": (encoded(PHOTO, "WEBP", lossless=True), SIZE),
        "alpha.webp": (encoded(PHOTO.convert("RGBA"), "WEBP"), SIZE),
        "animated.gif": (animated("GIF"), SIZE),
        "animated.webp": (animated("WEBP"), SIZE),
        "animated.png": (animated("PNG"), SIZE),
        "several_pages.tif": (animated("TIFF"), SIZE),
        "two_pictures.jpg": (encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(90)]), SIZE),
        "profile.jpg": (encoded(PHOTO, "JPEG", icc_profile=SRGB), SIZE),
        "profile.png": (encoded(PHOTO, "PNG", icc_profile=SRGB), SIZE),
        "broken_profile.jpg": (encoded(PHOTO, "JPEG", icc_profile=b"no profile" * 20), SIZE),
        "broken_exif.jpg": (encoded(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), SIZE),
        "jpeg2000.jpg": (encoded(PHOTO, "JPEG2000"), SIZE),
        "two\nlines.jpg": (JPEG, SIZE),
        "quotes\"and'comma,.jpg": (JPEG, SIZE),
        "<script>alert(1)<script>.jpg": (JPEG, SIZE),
        "naïve 🖼 日本.jpg": (JPEG, SIZE),
        "-rf.jpg": (JPEG, SIZE),
        "=cmd|calc.jpg": (JPEG, SIZE),
        " spaces .jpg": (JPEG, SIZE),
        "a.b.c.jpg": (JPEG, SIZE),
        ("long" * 63)[:251] + ".jpg": (JPEG, SIZE),
    }
    | {f"orientation_{number}.jpg": (oriented(number), SIZE) for number in range(1, 9)}
)  # stored pixels, whatever it says
if features.check("avif"):
    CASES["avif.avif"] = (encoded(PHOTO, "AVIF"), SIZE)
    CASES["avif_cut.avif"] = (encoded(PHOTO, "AVIF")[:200], "avif_cut")
REFUSED = {name: found for name, (_, found) in CASES.items() if isinstance(found, str)}
READ = {name: found for name, (_, found) in CASES.items() if not isinstance(found, str)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("bad")
    for name, (content, _) in CASES.items():
        (made / name).write_bytes(content)
    return made


def test_there_are_many():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", list(CASES))
def test_outcome(name, folder):
    path, expected = folder / name, CASES[name][1]
    if isinstance(expected, tuple):
        pixels = read_image(path)
        assert pixels.shape == (*expected, 3)
        assert pixels.dtype == np.uint8
    else:
        with pytest.raises(ImageError) as refused:
            read_image(path)
        assert expected in str(refused.value)
        assert name in str(refused.value)


# Files whose headers and ends are whole: listing decodes nothing, so training and inference are the first to refuse them
UNSEEN = {"png_bad_checksum.png"}


def test_listing_refuses_what_reading_refuses(folder):
    facts = facts_of([str(folder / name) for name in CASES])
    refused = {name for name, fact in zip(CASES, facts, strict=True) if fact[-1] is not None}
    assert refused == set(REFUSED) - UNSEEN


def test_listing_in_other_processes_says_the_same(folder, tmp_path):
    facts = read_headers([str(folder / name) for name in CASES], tmp_path / "facts.parquet")
    assert set(np.array(list(CASES))[facts["error"].notna().to_numpy()]) == set(REFUSED) - UNSEEN


def test_training_refuses_what_reading_refuses(folder):
    rows = pd.DataFrame({"path": [str(folder / name) for name in CASES], "label": 1, "mask_path": None, "kind": "full"})
    facts = pd.DataFrame(facts_of(rows["path"].tolist()), columns=["width", "height", "format", "jpeg_quality", "c", "b", "e"])
    crops = TrainingCrops(rows.join(facts), 32, masks=False, degradations=Degradations(social=0.0, resize=0.0), equalize=True)
    for index, name in enumerate(CASES):
        sample = crops[0, index, 0]
        assert ("error" in sample) == (name in REFUSED), name
        if "image" in sample:
            assert sample["image"].shape == (3, 32, 32)


def test_links_are_followed_wherever_they_lead(tmp_path):
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(JPEG)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.jpg").symlink_to(outside)
    (tmp_path / "data" / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "data" / "loop.jpg").symlink_to(tmp_path / "data" / "loop.jpg")
    assert read_image(tmp_path / "data" / "link.jpg").shape == (*SIZE, 3)
    for name in ("broken", "loop"):
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / "data" / f"{name}.jpg")


def test_a_folder_or_a_pipe_that_is_named_like_an_image(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("folder", "pipe"):  # opening a pipe that nobody writes to would wait for ever
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / f"{name}.jpg")


@pytest.mark.parametrize("task", ["A", "B"])
def test_every_test_image_is_in_the_submission(task, folder, trained, monkeypatch, capsys):
    """An unreadable one by the fallback probability and an empty mask of its declared size, where that is known."""
    monkeypatch.setattr(module, "SHARDS", 3)
    run, _ = trained(task)
    test = run.test_folder(task)
    for old in test.iterdir():
        old.unlink()
    stems = set()
    for name, (content, _) in CASES.items():
        if Path(name).stem not in stems and Path(name).suffix != "":  # two images of one stem would share a mask
            stems.add(Path(name).stem)
            (test / name).write_bytes(content)
    results = infer(run, task)
    assert set(results["image_id"]) == {path.name for path in test.iterdir()}
    failed = set(results.loc[results["error"].notna(), "image_id"])
    assert failed == set(REFUSED) & set(results["image_id"])
    assert (results.loc[results["error"].notna(), "prob"] == 0.5).all()
    assert "could not be read" in capsys.readouterr().out
    if task == "B":
        for name in results["image_id"]:
            mask = load_mask(run.masks / f"{Path(name).stem}.npz")
            assert name in REFUSED or mask.shape == READ[name]
            assert name not in REFUSED or not mask.any()
        assert load_mask(run.masks / "jpeg_cut_late.npz").shape == SIZE  # its header tells the size
        assert load_mask(run.masks / "empty.npz").shape == (1, 1)
    result = build_submission(run, task)
    assert result.valid
    assert result.rows == len(results)
