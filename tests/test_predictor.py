import os
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, picture, save

from forensics_lib.evaluation import evaluate
from forensics_lib.infer import infer
from forensics_lib.inference import load_mask
from forensics_lib.manifest import build_manifest
from forensics_lib.model import CheckpointError, CombinedModel, save_checkpoint
from forensics_lib.predictor import predict
from forensics_lib.training import train


@pytest.mark.parametrize("task", ["A", "B"])
def test_a_checkpoint_says_what_its_run_said(task, tiny_run, rng):
    manifest = build_manifest(tiny_run, task)
    train(tiny_run, task, manifest)
    evaluate(tiny_run, task, manifest)
    expected = infer(tiny_run, task)
    table, masks = predict(tiny_run.test_folder(task), tiny_run.finetuned_model(task), device="cpu")
    assert table["path"].tolist() == expected["path"].tolist()
    assert np.allclose(table["prob"], expected["prob"], atol=1e-2)  # the run computed in fp32, this by what the machine has
    assert len(masks) == (4 if task == "B" else 0)
    for path, mask in masks.items():
        written = load_mask(tiny_run.masks / f"{path.rsplit('/', 1)[1][:-4]}.npz")
        assert mask.shape == written.shape
        assert np.allclose(mask, written, atol=2e-2)
    bad = tiny_run.data / "bad.jpg"
    bad.write_bytes(b"no image")
    good = save(tiny_run.data / "good.png", picture(rng))
    table, masks = predict([bad, good], tiny_run.finetuned_model(task), device="cpu")
    assert table["error"].notna().tolist() == [True, False]
    assert table["label"].isna().tolist() == [True, False]
    assert table["prob"].isna().tolist() == [True, False]
    table, _ = predict(good, tiny_run.finetuned_model(task), device="cpu")
    assert len(table) == 1
    with pytest.raises(CheckpointError, match="holds no thresholds"):
        predict(good, tiny_run.classifier_model(task))


def test_images_whose_names_are_not_utf8_are_named(tmp_path, rng, capsys):
    model = CombinedModel("A", "test_convnext")
    inference = {name: TINY[name] for name in ("crop_size", "crops_per_image", "tile_size", "tile_overlap")}
    save_checkpoint(tmp_path / "m.pth", model, thresholds={"threshold": 0.5, "temperature": 1.0}, inference=inference)
    odd = save(tmp_path / "images" / "plain.jpg", picture(rng)).rename(tmp_path / "images" / os.fsdecode(b"caf\xe9.jpg"))
    save(tmp_path / "images" / "b.jpg", picture(rng))
    for images in (tmp_path / "images", [tmp_path / "images" / "b.jpg", odd]):
        table, _ = predict(images, tmp_path / "m.pth", device="cpu")
        print(table.to_string())
        capsys.readouterr().out.encode("utf-8")
        assert [Path(path).name for path in table["path"]] == ["b.jpg", "caf\\xe9.jpg"]
        assert table["prob"].notna().tolist() == [True, False] and "its name is not UTF-8" in table["error"].iloc[1]
