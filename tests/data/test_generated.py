"""What is made of photographs: synthetic twins and manipulated images."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, mid_greys, photo_table, picture, save
from PIL import Image

from forensics_lib.data import generated
from forensics_lib.data.generated import _encoding_of, _subsampling, make_forgeries, make_twins
from forensics_lib.data.manifest import build_manifest, sources, usable
from forensics_lib.images.headers import read_header
from forensics_lib.images.io import read_image
from forensics_lib.images.masks import read_mask
from forensics_lib.params import Aligned, Forgeries, Params, ParamsError, make_params
from forensics_lib.run import Run
from forensics_lib.synthesis.forgeries import METHODS


def smear(image: np.ndarray) -> np.ndarray:
    """Stands for an autoencoder: it loses the finest detail."""
    return np.repeat(np.repeat(image[::2, ::2], 2, 0), 2, 1)[: image.shape[0], : image.shape[1]]


def darker(image: np.ndarray) -> np.ndarray:
    """Stands for a generator of forgeries."""
    return (image // 2).astype(np.uint8)


@pytest.fixture
def photos(tiny_run):
    rows = usable(build_manifest(tiny_run, "A"), "train")
    for number, path in enumerate(rows["path"]):
        if number % 2:
            Image.fromarray(read_image(path)).save(path, "JPEG", quality=70, subsampling=2)
            rows.loc[number, "format"] = "JPEG"
    return rows[rows["label"] == 0].reset_index(drop=True)


def test_a_twin_has_its_photographs_size_codec_and_group(photos, monkeypatch):
    monkeypatch.setattr(generated, "MIX", 0.0)
    twins = make_twins(photos, Aligned(), smear)
    assert twins["group"].tolist() == photos["group"].tolist()
    assert set(twins["label"]) == {1} and set(twins["split"]) == {"train"}
    for twin, photo in zip(twins["path"], photos["path"], strict=True):
        ours, theirs = read_header(twin), read_header(photo)
        assert (ours.width, ours.height, ours.format) == (theirs.width, theirs.height, theirs.format)
        assert ours.jpeg_quality == theirs.jpeg_quality
        if ours.format == "PNG":
            assert np.array_equal(read_image(twin), smear(read_image(photo)))


WAYS = {
    "tables.jpg": {"format": "JPEG", "quality": 61, "subsampling": 0},
    "halved.jpg": {"format": "JPEG", "quality": 83, "subsampling": 1},
    "progressive.jpg": {"format": "JPEG", "quality": 75, "progressive": True},
    "kept_rgb.jpg": {"format": "JPEG", "quality": 75, "keep_rgb": True},
    "several.jpg": {"format": "MPO", "quality": 72, "save_all": True, "append_images": [Image.new("RGB", (64, 64))]},
    "several.png": {"format": "MPO", "quality": 88, "save_all": True, "append_images": [Image.new("RGB", (8, 8))]},
    "jpeg.png": {"format": "JPEG", "quality": 66},
    "png.jpg": {"format": "PNG"},
    "webp.jpg": {"format": "WEBP", "quality": 80},
    "webp.png": {"format": "WEBP", "quality": 90},
    "lossless.webp": {"format": "WEBP", "lossless": True},
    "plain.bmp": {"format": "BMP"},
    "plain.tif": {"format": "TIFF"},
}


def stored(path: Path, image: Image.Image, **options) -> pd.DataFrame:
    """A table of one photograph, stored like this."""
    image.save(path, **options)
    header = read_header(path)
    facts = {"format": header.format, "bytes": header.bytes, "source": "src"}
    return photo_table([path], **facts)


def compression(path: str) -> dict:
    """What an image file tells of how it was compressed."""
    with Image.open(path) as image:
        if image.format not in ("JPEG", "MPO"):
            return {"format": image.format}
        sampling = [component[1:3] for component in image.layer]
        rgb = image.info.get("adobe_transform") == 0
        facts = {"tables": image.quantization, "sampling": sampling, "progressive": "progressive" in image.info, "rgb": rgb}
        return {"format": "JPEG", "mode": image.mode} | facts


@pytest.mark.parametrize("name", WAYS)
def test_a_twin_is_compressed_as_its_photograph_whatever_its_name(name, tmp_path, rng, monkeypatch):
    photos = stored(tmp_path / name, Image.fromarray(mid_greys(rng, 60, 80)), **WAYS[name])
    monkeypatch.setattr(generated, "MIX", 0.0)
    twin = make_twins(photos, Aligned(), smear)["path"][0]
    ours, theirs = compression(twin), compression(photos["path"][0])
    assert ours == (theirs if theirs["format"] in ("JPEG", "WEBP") else {"format": "PNG"})
    assert Path(twin).suffix == {"JPEG": ".jpg", "WEBP": ".webp", "PNG": ".png"}[ours["format"]]
    if name == "lossless.webp":
        assert np.array_equal(read_image(twin), smear(read_image(photos["path"][0])))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("quality", [60, 92])
def test_a_twin_has_as_many_components_as_its_photograph(mode, quality, tmp_path, rng):
    image = Image.fromarray(mid_greys(rng, 60, 80)).convert(mode)
    photos = stored(tmp_path / "x.jpg", image, format="JPEG", quality=quality)
    twin = make_twins(photos, Aligned(), smear)["path"][0]
    assert compression(twin) == compression(photos["path"][0])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_grey_photograph_has_a_grey_twin(form, tmp_path, rng):
    def coloured(image: np.ndarray) -> np.ndarray:
        return np.clip(image + np.array([9, 0, -12]), 0, 255).astype(np.uint8)

    image = Image.fromarray(mid_greys(rng, 60, 80)).convert("L").convert("RGB")
    twin = read_image(make_twins(stored(tmp_path / "x", image, format=form), Aligned(), coloured)["path"][0])
    assert np.ptp(twin, axis=2).max() <= (2 if form == "WEBP" else 0)


@pytest.mark.parametrize("quality", [75, 90])
def test_the_quality_of_a_webp_is_estimated(quality, tmp_path, rng):
    photos = stored(tmp_path / "x.webp", Image.fromarray(mid_greys(rng)), quality=quality)
    path = photos["path"][0]
    assert abs(_encoding_of(path, read_image(path))[1]["quality"] - quality) <= 7


@pytest.mark.parametrize(("sampling", "wanted"), [((1, 1), 0), ((2, 1), 1), ((1, 2), 1), ((2, 2), 2), ((4, 1), 2)])
def test_colour_sampling_that_pillow_does_not_write_becomes_one_with_as_many_samples(sampling, wanted):
    assert _subsampling([(1, *sampling, 0), (2, 1, 1, 1), (3, 1, 1, 1)]) == wanted


def test_mixing_keeps_the_mean(tmp_path, rng, monkeypatch):
    image = mid_greys(rng)
    photos = stored(tmp_path / "x.png", Image.fromarray(image))
    monkeypatch.setattr(generated, "MIX", 1.0)
    twin = make_twins(photos, Aligned(), lambda image: image[::-1])["path"][0]
    assert abs(read_image(twin).mean() - image.mean()) < 0.02


def test_twins_of_other_code_are_made_again(photos, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_vae.py").write_text("def load():\n    return lambda image: image\n")
    settings = Aligned(autoencoder="my_vae:load")
    paths = [make_twins(photos, settings, smear)["path"][0]]
    assert make_twins(photos, settings, smear)["path"][0] == paths[0]
    (tmp_path / "my_vae.py").write_text("def load():\n    return lambda image: 255 - image\n")
    paths.append(make_twins(photos, settings, smear)["path"][0])
    assert len(set(paths)) == 2


def test_a_share_of_the_photograph_is_mixed_in(photos, monkeypatch):
    photos = photos[photos["format"] == "PNG"]
    monkeypatch.setattr(generated, "MIX", 1.0)
    twins = make_twins(photos, Aligned(), smear)
    shares = []
    for twin, photo in zip(twins["path"], photos["path"], strict=True):
        image = read_image(photo).astype(float)
        shares.append(np.abs(read_image(twin) - image).mean() / np.abs(smear(image) - image).mean())
    assert max(shares) <= 1 and 0 < np.mean(shares) < 1


def test_large_photographs_give_a_square(tmp_path, photos, rng, monkeypatch):
    save(Path(photos["path"][0]), picture(rng, 90, 200))
    monkeypatch.setattr(generated, "SIDE", 64)
    twins = make_twins(photos.head(1), Aligned(), smear)
    header = read_header(twins["path"][0])
    assert (header.width, header.height) == (64, 64)


def test_a_twin_s_blocks_begin_where_its_photograph_s_do(tmp_path, photos, monkeypatch):
    """So that the share of the photograph that is mixed in brings no second grid of blocks."""
    places = np.stack(np.broadcast_arrays(np.arange(180)[:, None], np.arange(250), 0), 2).astype(np.uint8)
    Image.fromarray(places).save(photos["path"][0], format="PNG")
    seen = []
    monkeypatch.setattr(generated, "SIDE", 64)
    monkeypatch.setattr("forensics_lib.data.generated.read_image", lambda _: places)
    for index in range(len(photos)):
        make_twins(photos.iloc[index : index + 1], Aligned(), lambda image: (seen.append(image[0, 0]), image)[1])
    assert len(seen) == len(photos) and len({tuple(corner) for corner in seen}) > 1
    assert all(corner[0] % 16 == corner[1] % 16 == 0 for corner in seen)


def test_an_unreadable_photograph_has_no_twin(photos, capsys):
    Path(photos["path"][0]).write_bytes(b"")
    assert len(make_twins(photos, Aligned(), smear)) == len(photos) - 1
    assert "1 photograph(s) could not be read" in capsys.readouterr().out


def test_a_callable_that_changes_the_size_is_refused(photos):
    with pytest.raises(ValueError, match="must return an image of the same shape"):
        make_twins(photos, Aligned(), lambda image: image[:-1])


def test_an_open_run_trains_on_twins_and_a_constrained_one_may_not(tiny_run):
    values = tiny_run.params.model_dump() | {"aligned": {"autoencoder": "own"}}
    with pytest.raises(ParamsError, match="aligned twins are for open runs"):
        make_params(values, "test")
    manifest = build_manifest(Run(make_params(values | {"run_type": "open"}, "test"), tiny_run.data), "A")
    twins = manifest[manifest["layout"] == "aligned"]
    assert len(twins) == 6 and twins["error"].isna().all() and twins["width"].notna().all()
    assert "aligned/src" in set(sources(manifest)["source"])


@pytest.fixture
def larger_photos(tmp_path, rng) -> pd.DataFrame:
    table = photo_table([save(tmp_path / f"{i}.png", picture(rng, 90, 120)) for i in range(6)], source="camera", format="PNG")
    return table.assign(bytes=[Path(path).stat().st_size for path in table["path"]])


MADE = [
    pytest.param(partial(make_twins, autoencode=smear), Aligned, "TWIN_VERSION", id="twins"),
    pytest.param(partial(make_forgeries, autoencode=darker), Forgeries, "FORGERY_VERSION", id="forgeries"),
]


@pytest.mark.parametrize(("make", "settings", "version"), MADE)
def test_what_is_made_is_kept_and_the_same_every_time(make, settings, version, larger_photos, tmp_path, monkeypatch):
    first = make(larger_photos, settings())
    content = [Path(path).read_bytes() for path in first["path"]]
    with monkeypatch.context() as patched:
        patched.setattr(generated, "load_autoencode", lambda name: pytest.fail("made again"))
        assert make(larger_photos, settings(), autoencode=None).equals(first)
        patched.setenv("FORENSICS_HOME", str(tmp_path / "other"))
        again = make(larger_photos, settings())
        assert [Path(path).read_bytes() for path in again["path"]] == content
    assert len(make(larger_photos, settings(count=2))) == 2
    monkeypatch.setattr(generated, version, getattr(generated, version) + 1)
    assert not set(make(larger_photos, settings())["path"]) & set(first["path"]), "those of an earlier rule are made again"


@pytest.mark.parametrize(("make", "settings", "version"), MADE)
def test_runs_that_make_the_same_at_once_have_whole_files(make, settings, version, larger_photos):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: make(larger_photos, settings()), range(4)))
    assert all(table.equals(made[0]) for table in made)
    for row in made[0].to_dict("records"):
        image = read_image(row["path"])
        assert not row["mask_path"] or read_mask(row["mask_path"], image.shape[:2]).any()
    files = len(made[0]) + made[0]["mask_path"].notna().sum()
    assert len(list(Path(made[0]["path"][0]).parent.iterdir())) == files, "nothing else is left there"


def test_forgeries_are_files_with_masks_groups_and_every_method(larger_photos, monkeypatch):
    monkeypatch.setattr(generated, "SIDE", 64)
    rows = make_forgeries(larger_photos, Forgeries(), darker)
    assert set(rows["method"]) == set(METHODS)
    assert rows["group"].tolist() == larger_photos["group"].tolist()
    assert (rows["kind"] == np.where(rows["method"] == "whole", "fr", "sp")).all()
    for row in rows.to_dict("records"):
        image = read_image(row["path"])
        assert max(image.shape[:2]) <= 64
        assert 0 < read_mask(row["mask_path"], image.shape[:2]).mean() < 0.8


def test_an_unreadable_photograph_gives_no_forgery(larger_photos, capsys):
    Path(larger_photos["path"][2]).write_bytes(b"broken")
    rows = make_forgeries(larger_photos, Forgeries(), darker)
    assert len(rows) == 4, "its own, and the one whose donor it is"
    assert "2 photograph(s)" in capsys.readouterr().out


def test_an_open_run_trains_on_forgeries_and_a_constrained_one_may_not(tiny_data):
    values = TINY | {"tasks": ["B"], "data_root": str(tiny_data), "forgeries": {}}
    run = Run(Params(**values, run_type="open"), tiny_data)
    rows = usable(build_manifest(run, "B"), "train")
    forged = rows[rows["layout"] == "forgeries"]
    assert len(forged) == (rows["label"] == 0).sum()
    assert forged["mask_path"].notna().all()
    with pytest.raises(ParamsError, match="forgeries are for open runs"):
        make_params(values, "own.yaml")
