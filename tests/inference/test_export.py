"""ONNX files give the answers of the library."""

import numpy as np
import pytest
from conftest import changed

from forensics_lib.__main__ import main
from forensics_lib.inference import export as exporting
from forensics_lib.inference.export import ExportError, export
from forensics_lib.run import stored_thresholds

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def test_exported_models_answer_as_the_library_does(trained, capsys, monkeypatch):
    run, _ = trained("AB")
    assert main(["export", run.name]) == 0
    assert capsys.readouterr().out.count("of the library's answers") == 2
    for task, side in (("A", 32), ("B", 64)):
        session = onnxruntime.InferenceSession(run.output(task, "model.onnx"))
        facts = session.get_modelmeta().custom_metadata_map
        thresholds = stored_thresholds(run, task).facts()
        assert {key: float(facts[key]) for key in thresholds} == thresholds and facts["task"] == task
        for count in (1, 3):
            answers = session.run(None, {"images": np.zeros((count, 3, side, side), np.float32)})
            assert [found.shape for found in answers] == [(count,), (count, side, side)][: 1 + (task == "B")]
    monkeypatch.setattr(exporting, "_run", lambda path, images: [np.full(len(images), 2.0)])
    with pytest.raises(ExportError, match="differ from the library's by up to"):
        export(run, "A")


def test_what_cannot_be_exported_is_told(trained, monkeypatch):
    run, _ = trained("A")
    with pytest.raises(ExportError, match="no model of its own"):
        export(changed(run, detector="my:own"), "A")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"export needs onnx, onnxscript: pip install"):
        export(run, "A")
    assert main(["export", "nothing"]) == 1
