import pickle
from pathlib import Path

import pytest
import torch
from conftest import TINY, model

from forensics_lib.models.checkpoint import CheckpointError, add_to_checkpoint, load_model, read_checkpoint, save_checkpoint
from forensics_lib.models.combined import CombinedModel, build_model
from forensics_lib.params import Params


def test_checkpoint_rebuilds_the_model(tmp_path: Path):
    network = model(frontend="srm").eval()
    save_checkpoint(tmp_path / "m.pth", network)
    add_to_checkpoint(tmp_path / "m.pth", thresholds={"threshold": 0.25})
    rebuilt, content = load_model(tmp_path / "m.pth", "B")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(network(x).mask_logits, rebuilt(x).mask_logits)
    assert content["thresholds"] == {"threshold": 0.25}


def test_a_checkpoint_of_a_classifier_without_levels_says_what_it_said(tmp_path: Path):
    torch.manual_seed(0)
    before = CombinedModel("A", "test_convnext").eval()
    save_checkpoint(tmp_path / "m.pth", before)
    content = read_checkpoint(tmp_path / "m.pth")
    assert not any("level" in name for name in content["model"]), "the names of the former weights"
    del content["config"]["levels"]  # as it was written then
    torch.save(content, tmp_path / "m.pth")
    after, _ = load_model(tmp_path / "m.pth", "A")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(after(images).logits, before(images).logits)
    assert not after.sees_whole
    assert build_model(Params(**TINY), "A").sees_whole, "and a new one has them"
    assert build_model(Params(**TINY), "B").config["levels"] == "mask"


def test_checkpoint_of_another_task_is_refused(tmp_path: Path):
    save_checkpoint(tmp_path / "m.pth", model("A"))
    with pytest.raises(CheckpointError, match="trained for Task A, not for Task B"):
        load_model(tmp_path / "m.pth", "B")


class _Attack:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/forensics-attack"),))  # noqa: S108 (must not come to be)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path):
    (tmp_path / "m.pth").write_bytes(pickle.dumps({"format": 1, "model": _Attack()}))
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "m.pth")
    torch.save({"format": 1, "model": _Attack()}, tmp_path / "n.pth")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "n.pth")
    assert not Path("/tmp/forensics-attack").exists()  # noqa: S108
