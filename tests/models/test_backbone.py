from pathlib import Path

import pytest
import timm
import torch
from conftest import model


def test_unknown_backbone_suggests_others():
    with pytest.raises(ValueError, match=r"no model 'convnext_bse'.*convnext"):
        model(backbone="convnext_bse")


def test_pretrained_without_network_names_model_cache_and_ways_out(monkeypatch):

    def offline(*_, **__):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match="convnext_base") as caught:
        model("A", "convnext_base", pretrained=True)
    assert all(word in str(caught.value) for word in ("cache", "pretrained_file", "pretrained: false"))


def test_pretrained_file_is_loaded(tmp_path: Path):

    source = timm.create_model("test_convnext", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    network = model("A", pretrained=True, pretrained_file=str(tmp_path / "w.pth"))
    assert torch.equal(source.stem[0].weight, network.backbone.stem[0].weight)


def test_pretrained_file_that_is_missing_or_of_another_model(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="pretrained_file"):
        model("A", pretrained=True, pretrained_file=str(tmp_path / "none.pth"))
    torch.save({"other": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(OSError, match="do not load into test_convnext"):
        model("A", pretrained=True, pretrained_file=str(tmp_path / "w.pth"))
