"""``model_card.md``: what a trained model is, what it was measured on, and what it must not be used for.

The headings follow Mitchell et al., Model Cards for Model Reporting, FAccT 2019.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from forensics_lib.reports.report import METRIC_NAMES, TABLES, chosen_on
from forensics_lib.run import Run, trained_by
from forensics_lib.utils.files import read_json, write_text

_USE = """Finding AI-generated images (Task A) or AI-manipulated regions (Task B) in research and in the MediaEval *Synthetic
Images* challenge, as one hint among others. A probability is no proof: it must not decide alone over a person or a
publication."""
_LIMITS = """- Scores hold for the sources above. On generators and platforms that are not among them expect less; the
  tables per source and the robustness table say how much less to expect of pictures that were changed.
- Validation images chose epoch, calibration and threshold, so scores at the threshold are slightly kind.
- {calibration}
- Only pixels are looked at: no metadata, no provenance, no watermark."""

_CALIBRATION = """Probabilities are calibrated for the share of positive images among those ({share:.1%}). Where another share q
  is expected, add log(q / (1 - q)) - log({positive} / {authentic}) to the log-odds."""
_NO_INTERCEPT = """Probabilities were calibrated by a version that fitted no intercept: they hold for no known share of positive
  images. Execute the training notebook again to calibrate them for that of validation."""


def build_card(run: Run, task: str) -> Path:
    """Write ``outputs/<run_name>/task<X>_model_card.md`` from the run's files; returns its path."""
    facts = read_json(run.folder / "run.json")
    trained, validation = trained_by(run, task), facts[f"task{task}_validation"]
    params = trained["params"]
    data = pd.DataFrame(facts[f"task{task}_data"])
    sample = "**Trained on the built-in sample: it shows that everything works and knows no real generator.**\n\n"
    parts = [
        f"# {run.name}, Task {task}\n\n{sample if run.sample else ''}",
        f"- Model: `{params['backbone']}`, front end {params['frontend']}, file `{run.finetuned_model(task).name}`\n",
        f"- Run: {params['run_type']}, seed {params['seed']}, {trained['updated']}, code {trained['git'] or 'not in git'}\n",
        f"- Input: native-resolution crops of {params['crop_size']} pixels, {params['crops_per_image']} an image\n\n",
        f"## Intended use\n\n{_USE}\n\n",
        f"## Data\n\n{markdown_table(data)}\n\n",
        f"## Scores on validation\n\n{_scores(validation, facts.get(f'task{task}_validation_intervals') or {})}\n\n",
        f"{chosen_on(facts, task)}\n\n",
        _optional("Scores on other validation images", facts.get(f"task{task}_validation_others"), _scores),
        _optional("Scores on held-out images", facts.get(f"task{task}_held_out"), _scores),
        *(_optional(f"Scores {title}", facts.get(f"task{task}_{name}"), _table) for name, title in TABLES.items()),
        f"## Limits\n\n{_LIMITS.format(calibration=_calibration(facts.get(f'task{task}_chosen_on')))}\n",
    ]
    path = run.folder / f"task{task}_model_card.md"
    write_text(path, "".join(parts))
    return path


def _calibration(found: dict[str, Any] | None) -> str:
    """What share of positive images the probabilities hold for, and how to get to another one."""
    if found is None:
        return _NO_INTERCEPT
    positive, images = found["positive"], found["images"]
    return _CALIBRATION.format(share=positive / images, positive=positive, authentic=images - positive)


def _optional(title: str, value: Any, show: Any) -> str:
    return f"## {title}\n\n{show(value)}\n\n" if value else ""


def _table(rows: list[dict[str, Any]]) -> str:
    return markdown_table(pd.DataFrame(rows))


def _scores(scores: dict[str, float], intervals: dict[str, list[float]] | None = None) -> str:
    rows = []
    for key, name in METRIC_NAMES.items():
        if key in scores:
            low, high = (intervals or {}).get(key, (None, None))
            interval = f"{low:.3f} to {high:.3f}" if low is not None else ""
            rows.append({"metric": name, "value": f"{scores[key]:.3f}", "95% interval": interval})
    return markdown_table(pd.DataFrame(rows))


def markdown_table(table: pd.DataFrame, missing: str = "") -> str:
    """A table in Markdown, floats with three decimals, ``missing`` for values that are not there."""
    shown = table.astype(object).where(table.notna(), missing)
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
