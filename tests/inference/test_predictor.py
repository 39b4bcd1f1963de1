import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, encoded, picture, save
from PIL import Image

from forensics_lib.data.rows import LayoutError
from forensics_lib.images.masks import load_mask
from forensics_lib.inference.predictor import predict
from forensics_lib.inference.shards import infer
from forensics_lib.models.checkpoint import CheckpointError, save_checkpoint
from forensics_lib.models.combined import CombinedModel


@pytest.mark.parametrize("task", ["A", "B"])
def test_a_checkpoint_says_what_its_run_said(task, trained, rng):
    run, _ = trained(task)
    expected = infer(run, task)
    table, masks = predict(run.test_folder(task), run.finetuned_model(task), device="cpu")
    assert table["path"].tolist() == expected["path"].tolist()
    assert np.allclose(table["prob"], expected["prob"], atol=1e-2)  # the run computed in fp32, this by what the machine has
    assert len(masks) == (4 if task == "B" else 0)
    for path, mask in masks.items():
        written = load_mask(run.masks / f"{path.rsplit('/', 1)[1][:-4]}.npz")
        assert mask.shape == written.shape
        assert np.allclose(mask, written, atol=2e-2)
    bad = run.data / "bad.jpg"
    bad.write_bytes(b"no image")
    good = save(run.data / "good.png", picture(rng))
    table, masks = predict([bad, good], run.finetuned_model(task), device="cpu")
    assert table["error"].notna().tolist() == [True, False]
    assert table["label"].isna().tolist() == [True, False]
    assert table["prob"].isna().tolist() == [True, False]
    table, _ = predict(good, run.finetuned_model(task), device="cpu")
    assert len(table) == 1
    with pytest.raises(CheckpointError, match="holds no thresholds"):
        predict(good, run.classifier_model(task))


def test_images_whose_names_are_not_utf8_are_named(tmp_path, rng, capsys):
    model = CombinedModel("A", "test_convnext")
    inference = {name: TINY[name] for name in ("crop_size", "crops_per_image", "tile_size")}
    save_checkpoint(tmp_path / "m.pth", model, thresholds={"threshold": 0.5, "temperature": 1.0}, inference=inference)
    odd = save(tmp_path / "images" / "plain.jpg", picture(rng)).rename(tmp_path / "images" / os.fsdecode(b"caf\xe9.jpg"))
    save(tmp_path / "images" / "b.jpg", picture(rng))
    for images in (tmp_path / "images", [tmp_path / "images" / "b.jpg", odd]):
        table, _ = predict(images, tmp_path / "m.pth", device="cpu")
        print(table.to_string())
        capsys.readouterr().out.encode("utf-8")
        assert [Path(path).name for path in table["path"]] == ["b.jpg", "caf\\xe9.jpg"]
        assert table["prob"].notna().tolist() == [True, False] and "its name is not UTF-8" in table["error"].iloc[1]


KEYS = ("crop_size", "crops_per_image", "tile_size", "precision")


@pytest.fixture(params=["A", "B"])
def checkpoint(request, tmp_path) -> Path:
    """A model that was never trained, with all that a finished run adds to its own."""
    torch.manual_seed(0)
    model = CombinedModel(request.param, "test_convnext", decoder_channels=16)
    thresholds = {"threshold": 0.5, "temperature": 1.0, "loc_threshold": 0.5}
    path = tmp_path / f"{request.param}.pth"
    save_checkpoint(path, model, thresholds=thresholds, inference={key: TINY[key] for key in KEYS})
    return path


def test_the_same_pixels_in_any_form_get_the_same_answer(checkpoint, tmp_path, rng):
    """Paths, arrays, open images, bytes and files in one list, one of them twice; each row has its own mask."""
    pixels = picture(rng, 70, 90)
    file = save(tmp_path / "a.png", pixels)
    with file.open("rb") as opened:
        forms = [file, str(file), pixels, Image.fromarray(pixels), Image.open(file)]
        forms += [encoded(pixels), opened, io.BytesIO(encoded(pixels))]
        forms += [bytearray(encoded(pixels)), memoryview(encoded(pixels, "BMP")), pixels[::-1][::-1]]
        table, masks = predict(forms, checkpoint, device="cpu")
    assert table["path"].tolist() == [str(file), f"{file} (2)", *(f"image {number}" for number in range(2, 11))]
    assert table["error"].isna().all()
    assert table["prob"].nunique() == 1
    if checkpoint.stem == "B":
        assert list(masks) == table["path"].tolist()
        assert all(np.array_equal(mask, masks[str(file)]) and mask.shape == (70, 90) for mask in masks.values())
    other, _ = predict(255 - pixels, checkpoint, device="cpu")
    assert other["path"].tolist() == ["image 0"]
    assert other["prob"][0] != table["prob"][0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA", "I;16", "RGB"])
def test_open_images_are_read_as_their_files_are(mode, checkpoint, tmp_path, rng):
    pixels = picture(rng, 64, 64)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "x.tif")
    table, _ = predict([image, tmp_path / "x.tif"], checkpoint, device="cpu")
    assert table["error"].isna().all()
    assert table["prob"].nunique() == 1


def test_grey_arrays_are_read_as_grey_files_are(checkpoint, tmp_path, rng):
    grey = picture(rng, 64, 64)[..., 1]
    table, _ = predict([grey, save(tmp_path / "grey.png", grey)], checkpoint, device="cpu")
    assert table["prob"].nunique() == 1


def test_a_folder_of_folders(checkpoint, tmp_path, rng, capsys):
    folder = tmp_path / "images"
    names = ["b.png", "c", "a/x.jpg", "a/y/z.jp2", "d/no.jpg_large"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(rng, 40, 40), "JPEG2000" if name.endswith("2") else "PNG"))
    (folder / "a" / "notes.txt").write_text("x")
    (folder / "a" / "broken.jpg").write_text("x")
    expected = [str(folder / name) for name in ("b.png", "c", "a/broken.jpg", "a/x.jpg", "a/y/z.jp2", "d/no.jpg_large")]
    table, masks = predict(folder, checkpoint, device="cpu")
    assert table["path"].tolist() == expected
    assert table["error"].notna().tolist() == [False, False, True, False, False, False]
    assert len(masks) == (5 if checkpoint.stem == "B" else 0)
    assert str(folder / "a" / "notes.txt") in capsys.readouterr().out
    mixed, _ = predict(iter([folder / "b.png", str(folder), picture(rng)]), checkpoint, device="cpu")
    assert mixed["path"].tolist() == [expected[0], f"{expected[0]} (2)", *expected[1:], "image 7"]


def test_what_cannot_be_read_keeps_its_row_and_is_named(checkpoint, tmp_path, rng):
    cut = encoded(picture(rng, 64, 64), "JPEG")[:900]
    used = io.BytesIO(encoded(picture(rng)))
    used.read()
    images = [tmp_path / "missing.jpg", picture(rng), b"no image", cut, b"", used, Image.open(io.BytesIO(cut))]
    images += [Image.fromarray(np.full((8, 8), np.nan, np.float32))]
    table, masks = predict(images, checkpoint, device="cpu")
    assert table["error"].notna().tolist() == [True, False, *[True] * 6]
    for name, error in zip(table["path"], table["error"], strict=True):
        assert error is None or error.startswith(f"{name}: "), error
    assert table.loc[table["error"].notna(), ["prob", "label"]].isna().all(axis=None)
    assert set(masks) == ({"image 1"} if checkpoint.stem == "B" else set())


@pytest.mark.parametrize(
    ("image", "kind", "told"),
    [
        (
            np.zeros((8, 9, 3), np.float32),
            ValueError,
            r"image 1: .* shape \(8, 9, 3\), float32; wanted \(H, W, 3\).*uint8",
        ),
        (np.zeros((3, 8, 9), np.uint8), ValueError, r"image 1: an array of shape \(3, 8, 9\), uint8"),
        (np.zeros((8, 9, 4), np.uint8), ValueError, r"shape \(8, 9, 4\), uint8"),
        (np.zeros((2, 8, 9, 3), np.uint8), ValueError, r"shape \(2, 8, 9, 3\)"),
        (np.zeros((0, 9, 3), np.uint8), ValueError, r"shape \(0, 9, 3\)"),
        (np.zeros((8, 9), np.uint16), ValueError, r"shape \(8, 9\), uint16"),
        (np.zeros((8, 9), bool), ValueError, r"shape \(8, 9\), bool"),
        (torch.zeros(3, 8, 9), TypeError, "image 1: of type Tensor; wanted a path, an array"),
        (None, TypeError, "image 1: of type NoneType"),
        (7, TypeError, "image 1: of type int"),
        (["a.jpg"], TypeError, "image 1: of type list"),
        ("", ValueError, "image 1: its path is empty"),
        ("https://example.org/a.jpg", ValueError, "image 1: https://example.org/a.jpg is an address; download it first"),
        (io.StringIO("text"), TypeError, 'image 1: a file opened as text; open it with "rb"'),
    ],
)
def test_what_cannot_be_an_image_is_refused(image, kind, told, tmp_path):
    with pytest.raises(kind, match=told):
        predict([b"x", image], tmp_path / "nothing is loaded.pth")


def test_nothing_to_predict_is_told(tmp_path):
    for nothing in ([], (), iter([])):
        with pytest.raises(ValueError, match="there are no images to predict: an empty"):
            predict(nothing, tmp_path / "x.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("x")
    with pytest.raises(LayoutError, match=r"no images in the folder or below; .*empty holds x\.txt"):
        predict(tmp_path / "empty", tmp_path / "x.pth")
    with pytest.raises(TypeError, match="images is of type int"):
        predict(3, tmp_path / "x.pth")
    with pytest.raises(TypeError, match="images is of type dict"):
        predict({"a": "a.jpg"}, tmp_path / "x.pth")


def test_home_is_found_in_paths(checkpoint, tmp_path, rng, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "x.png", picture(rng))
    table, _ = predict(np.array(["~/x.png"]), f"~/{checkpoint.name}", device="cpu")
    assert table["path"].tolist() == [str(tmp_path / "x.png")]
    assert table["error"].isna().all()
