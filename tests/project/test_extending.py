"""The code of docs/extending.md and docs/backbones.md, run as it stands there."""

import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, changed, picture, save
from PIL import Image

from forensics_lib.data.manifest import build_manifest, build_test_manifest, usable
from forensics_lib.data.readers import read_data_set, task_of
from forensics_lib.data.rows import LayoutError
from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.images.degradations import degrade
from forensics_lib.images.io import read_image
from forensics_lib.inference.export import export
from forensics_lib.inference.predictor import predict
from forensics_lib.inference.shards import infer
from forensics_lib.models import combined as model_module
from forensics_lib.models.checkpoint import CheckpointError, load_model
from forensics_lib.params import DataSet, Degradations, ParamsError, make_params
from forensics_lib.run import Run, stored_thresholds
from forensics_lib.training.loop import train
from forensics_lib.utils.files import home, project_root


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (project_root() / "docs" / page).read_text(), re.DOTALL)


@pytest.fixture
def modules(monkeypatch) -> list[str]:
    """The page's modules, written where a user would put them."""
    monkeypatch.setattr(model_module, "SegmentationBranch", model_module.SegmentationBranch)  # put back afterwards
    names = []
    for block in blocks("extending.md"):
        name = re.match(r"# (\w+)\.py", block)[1]
        (home() / f"{name}.py").write_text(block)
        monkeypatch.delitem(sys.modules, name, raising=False)
        names.append(name)
        assert len(block.splitlines()) < 30
    monkeypatch.syspath_prepend(str(home()))
    return names


def test_a_layout_of_ones_own(modules, tiny_run, rng):
    root = tiny_run.data / "cameras"
    for camera in ("one", "two"):
        for kind in ("originals", "generated"):
            for number in range(12):
                save(root / camera / kind / f"{number:02d}.png", picture(rng))
    entry = {"root": str(root), "layout": "my_layouts:read_by_camera"}
    assert task_of(DataSet(**entry)) == "A"
    values = tiny_run.params.model_dump() | {"data": [entry], "run_type": "open", "tasks": ["A"]}
    table = build_manifest(Run(make_params(values, "test"), tiny_run.data), "A")
    assert table.groupby(["split", "label"]).size().to_dict() == {
        ("train", 0): 20,
        ("train", 1): 20,
        ("val", 0): 4,
        ("val", 1): 4,
    }
    assert set(table["source"]) == {"cameras/one", "cameras/two"}
    with pytest.raises(LayoutError, match="constrained run takes official data only"):
        build_manifest(Run(make_params(values | {"run_type": "constrained"}, "test"), tiny_run.data), "A")


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("def read(root, entry):\n    return []", "returned list"),
        (
            "def read(root, entry):\n    rows = Rows()\n    rows.add(['x.jpg'], 3, 'train', 's', kind=None)\n    return rows",
            "none of 0, 1",
        ),
        (
            "def read(root, entry):\n    r = Rows()\n    r.add(['ITW-SM/x.jpg'], 1, 'train', 's', kind=None)\n    return r",
            "of ITW-SM",
        ),
        ("def other(root, entry):\n    pass", "cannot be loaded"),
    ],
)
def test_a_reader_that_does_wrong_is_told_so(code, fault, tmp_path, monkeypatch):
    (home() / "wrong_reader.py").write_text(f"from forensics_lib.data.rows import Rows\n\n\n{code}\n")
    monkeypatch.delitem(sys.modules, "wrong_reader", raising=False)
    monkeypatch.syspath_prepend(str(home()))
    with pytest.raises(ValueError, match=fault):
        read_data_set(DataSet(root=str(tmp_path), layout="wrong_reader:read"))


def test_an_unknown_layout_names_those_that_there_are():
    with pytest.raises(ParamsError, match=r"no layout 'tgiff'; there are own, .*module:function"):
        make_params({"data": [{"root": "x", "layout": "tgiff"}]}, "test")


def test_a_degradation_of_ones_own(modules):
    nothing = dict.fromkeys(("resize", "blur", "noise", "double_jpeg", "jpeg", "webp", "social"), 0.0)
    settings = Degradations(own="my_degradations:exposure", **nothing)
    image = picture(np.random.default_rng(0))
    changed = [degrade(image, None, settings, np.random.default_rng(seed))[0] for seed in range(60)]
    share = np.mean([(one != image).any() for one in changed])
    assert 0.05 < share < 0.4
    again = degrade(image, None, settings, np.random.default_rng(3))[0]
    assert np.array_equal(again, changed[3])


@pytest.mark.parametrize(("task", "name"), [("A", "smoothness"), ("B", "smooth_regions")])
def test_a_detector_of_ones_own(modules, tiny_run, task, name):
    run = changed(tiny_run, detector=f"my_detectors:{name}", tasks=[task])
    manifest = build_manifest(run, task)
    train(run, task, manifest)
    assert len(evaluate(run, task, manifest).table) == len(usable(manifest, "val"))
    assert len(infer(run, task)) == 4


def test_a_detector_from_an_onnx_file(modules, tiny_run, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    mean = onnx.helper.make_node("ReduceMean", ["image"], ["logit"], keepdims=0)
    value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph([mean], "mean", [value("image", shape=[1, 3, 224, 224])], [value("logit", shape=[])])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), home() / "detector.onnx")
    monkeypatch.chdir(home())
    run = changed(tiny_run, detector="my_onnx:from_onnx", tasks=["A"])
    manifest = build_manifest(run, "A")
    found = evaluate(run, "A", manifest)
    image = np.asarray(Image.open(found.table["path"][0]).resize((224, 224)), float) / 255
    assert found.uncalibrated[0] == pytest.approx(1 / (1 + np.exp(-image.mean())), abs=1e-5)


def test_an_exported_model_without_the_library(trained):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    run, _ = trained("A")
    spaces: dict = {}
    exec(next(block for block in blocks("extending.md") if block.startswith("# my_export")), spaces)  # noqa: S102
    threshold = stored_thresholds(run, "A").threshold
    small = [read_image(path)[:32, :20] for path in build_test_manifest(run, "A")["path"]]  # of one crop each
    table, _ = predict(small, run.finetuned_model("A"), device="cpu")
    file = export(run, "A")
    for image, prob in zip(small, table["prob"], strict=True):
        found, called = spaces["probability"](image, file)
        assert found == pytest.approx(prob, abs=0.02) and called == (found >= threshold)


def test_a_decoder_of_ones_own(modules, tiny_run, monkeypatch):
    original = model_module.SegmentationBranch
    __import__("my_decoder")
    assert model_module.SegmentationBranch is not original
    manifest = build_manifest(tiny_run, "B")
    train(tiny_run, "B", manifest)
    assert len(list(Path(tiny_run.finetuned_model("B")).parent.glob("*finetuned*"))) == 1
    model, _ = load_model(tiny_run.finetuned_model("B"), "B")
    assert type(model.segmentation).__name__ == "LastStage"
    monkeypatch.setattr(model_module, "SegmentationBranch", original)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_model(tiny_run.finetuned_model("B"), "B")


def test_a_checkpoint_opens_with_timm(trained):
    run, _ = trained("A")
    with_timm, in_three_lines = blocks("backbones.md")
    checkpoint = str(run.finetuned_model("A"))
    spaces: dict = {}
    exec(with_timm.replace("outputs/constrained_finetuned_model.pth", checkpoint), spaces)  # noqa: S102
    ours, _ = load_model(run.finetuned_model("A"), "A")
    assert isinstance(spaces["backbone"], type(timm.create_model(TINY["backbone"])))
    assert all(torch.equal(value, ours.backbone.state_dict()[name]) for name, value in spaces["backbone"].state_dict().items())
    code = in_three_lines.replace("outputs/constrained_finetuned_model.pth", checkpoint)
    exec(code.replace("folder/of/images", str(run.test_folder("A"))), spaces)  # noqa: S102
    assert len(spaces["table"]) == len(infer(run, "A")) == 4
