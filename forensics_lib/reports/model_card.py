"""``model_card.md``: a trained model's data, scores, intended use and limits.

The headings follow Mitchell et al., Model Cards for Model Reporting, FAccT 2019.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from forensics_lib.reports.report import METRIC_NAMES, TABLES, chosen_on, facts_of_task, template
from forensics_lib.run import Run, trained_by
from forensics_lib.utils.files import read_json, write_text


def build_card(run: Run, task: str) -> Path:
    """Write ``outputs/<run_name>/task<X>_model_card.md`` from the run's files; returns its path."""
    facts, trained = read_json(run.folder / "run.json"), trained_by(run, task)
    found = facts_of_task(facts, task)
    others = {"Scores on other validation images": "validation_others", "Scores on held-out images": "held_out"}
    tables = {title: _scores(found[key]) for title, key in others.items() if found.get(key)}
    tables |= {f"Scores {title}": _table(found[name]) for name, title in TABLES.items() if found.get(name)}
    card = template("model_card.md.j2").render(
        run=run,
        task=task,
        params=trained["params"],
        trained=trained,
        data=_table(found["data"]),
        validation=_scores(found["validation"], found.get("validation_intervals")),
        chosen_on=chosen_on(facts, task),
        tables=tables,
        calibrated_on=found.get("chosen_on"),
    )
    path = run.folder / f"task{task}_model_card.md"
    write_text(path, card)
    return path


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
