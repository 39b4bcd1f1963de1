"""Synthetic twins of photographs."""

from pathlib import Path

import numpy as np
import pytest
from conftest import picture, save
from PIL import Image

from forensics_lib import aligned
from forensics_lib.aligned import load_autoencode, make_twins
from forensics_lib.images import read_header, read_image
from forensics_lib.manifest import build_manifest, sources, usable
from forensics_lib.params import Aligned, ParamsError, make_params
from forensics_lib.runs import Run


def smear(image: np.ndarray) -> np.ndarray:
    """Stands for an autoencoder: it loses the finest detail."""
    return np.repeat(np.repeat(image[::2, ::2], 2, 0), 2, 1)[: image.shape[0], : image.shape[1]]


@pytest.fixture
def photos(tiny_run):
    rows = usable(build_manifest(tiny_run, "A"), "train")
    for number, path in enumerate(rows["path"]):
        if number % 2:
            Image.fromarray(read_image(path)).save(path, "JPEG", quality=70, subsampling=2)
            rows.loc[number, "format"] = "JPEG"
    return rows[rows["label"] == 0].reset_index(drop=True)


def test_a_twin_has_its_photographs_size_codec_and_group(photos):
    twins = make_twins(photos, Aligned(mix=0.0), smear)
    assert twins["group"].tolist() == photos["group"].tolist()
    assert set(twins["label"]) == {1} and set(twins["split"]) == {"train"}
    for twin, photo in zip(twins["path"], photos["path"], strict=True):
        ours, theirs = read_header(twin), read_header(photo)
        assert (ours.width, ours.height, ours.format) == (theirs.width, theirs.height, theirs.format)
        assert ours.jpeg_quality == theirs.jpeg_quality
        if ours.format == "PNG":
            assert np.array_equal(read_image(twin), smear(read_image(photo)))


def test_a_share_of_the_photograph_is_mixed_in(photos):
    photos = photos[photos["format"] == "PNG"]
    twins = make_twins(photos, Aligned(mix=1.0), smear)
    for twin, photo in zip(twins["path"], photos["path"], strict=True):
        image = read_image(photo).astype(float)
        far, near = np.abs(smear(image) - image).mean(), np.abs(read_image(twin) - image).mean()
        assert 0 < near < far


def test_twins_are_kept_and_the_same_every_time(photos, tmp_path, monkeypatch):
    first = make_twins(photos, Aligned(), smear)
    content = [Path(path).read_bytes() for path in first["path"]]
    monkeypatch.setattr(aligned, "load_autoencode", lambda name: pytest.fail("made again"))
    assert make_twins(photos, Aligned()).equals(first)
    monkeypatch.setenv("FORENSICS_HOME", str(tmp_path / "other"))
    again = make_twins(photos, Aligned(), smear)
    assert [Path(path).read_bytes() for path in again["path"]] == content
    assert len(make_twins(photos, Aligned(count=2), smear)) == 2


def test_large_photographs_give_a_square(tmp_path, photos, rng):
    save(Path(photos["path"][0]), picture(rng, 90, 200))
    twins = make_twins(photos.head(1), Aligned(side=64), smear)
    header = read_header(twins["path"][0])
    assert (header.width, header.height) == (64, 64)


def test_an_unreadable_photograph_has_no_twin(photos, capsys):
    Path(photos["path"][0]).write_bytes(b"")
    assert len(make_twins(photos, Aligned(), smear)) == len(photos) - 1
    assert "1 photograph(s) could not be read" in capsys.readouterr().out


def test_a_callable_that_changes_the_size_is_refused(photos):
    with pytest.raises(ValueError, match="must return an image of the same shape"):
        make_twins(photos, Aligned(), lambda image: image[:-1])


def test_callables_are_found_by_name(monkeypatch, tmp_path):
    (tmp_path / "my_autoencoder.py").write_text("def load():\n    return lambda image: image\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_autoencode("my_autoencoder:load")("x") == "x"
    assert load_autoencode("own")(np.zeros((20, 30, 3), np.uint8)).shape == (20, 30, 3)
    for wrong in ("my_autoencoder:nothing", "no_such_module:load"):
        with pytest.raises(ValueError, match=f"'{wrong}' cannot be loaded"):
            load_autoencode(wrong)


def test_an_open_run_trains_on_twins_and_a_constrained_one_may_not(tiny_run):
    values = tiny_run.params.model_dump() | {"aligned": {"autoencoder": "own"}}
    with pytest.raises(ParamsError, match="aligned twins are for open runs"):
        make_params(values, "test")
    manifest = build_manifest(Run(make_params(values | {"run_type": "open"}, "test"), tiny_run.data), "A")
    twins = manifest[manifest["layout"] == "aligned"]
    assert len(twins) == 6 and twins["error"].isna().all() and twins["width"].notna().all()
    assert "aligned/src" in set(sources(manifest)["source"])
