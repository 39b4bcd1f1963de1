import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from forensics_lib.data.manifest import build_manifest, usable
from forensics_lib.device import choose_machine
from forensics_lib.evaluation import predictions as scoring
from forensics_lib.images.io import read_image
from forensics_lib.inference.predict import predict_mask
from forensics_lib.models.combined import build_model

# ---- Predictions -----------------------------------------------------------------------------------------------------


def expected_scores(model, rows, params, machine) -> pd.DataFrame:
    lines = []
    for _, row in rows.iterrows():
        _, mask = predict_mask(model, read_image(row["path"]), params, machine)
        truth = scoring.truth_mask(row, mask.shape).ravel()
        probs = mask.ravel().astype(float)
        both = 0 < truth.mean() < 1
        lines.append([f(truth, probs) if both else np.nan for f in (roc_auc_score, average_precision_score)])
    return pd.DataFrame(lines, columns=["pixel_auc", "pixel_ap"])


@pytest.mark.parametrize("processes", [1, 2])
def test_predictions_have_the_exact_scores_of_each_mask(tiny_run, monkeypatch, processes):
    rows, params = usable(build_manifest(tiny_run, "B"), "val"), tiny_run.params
    broken = rows.index[-1]
    rows.loc[broken, "path"] = "gone.png"
    torch.manual_seed(0)
    model, machine = build_model(params, "B").eval(), choose_machine(params)
    parts = []
    monkeypatch.setattr(scoring, "world", lambda: processes)
    monkeypatch.setattr(scoring, "all_gather", lambda part: parts.append(part) or parts)
    monkeypatch.setattr(scoring, "check_finite", lambda *_: None)  # which would miss what the next process answers
    for number in range(processes):
        monkeypatch.setattr(scoring, "rank", lambda number=number: number)
        found = scoring.predict_labelled(model, "B", rows, params, machine)  # the last one sees all parts
    expected = expected_scores(model, rows.drop(index=broken), params, machine)
    assert expected["pixel_auc"].notna().any()
    pd.testing.assert_frame_equal(found.exact[found.good()][["pixel_auc", "pixel_ap"]], expected, rtol=0, atol=1e-9)
    assert found.exact.loc[broken].isna().all() and list(found.errors) == [broken]
