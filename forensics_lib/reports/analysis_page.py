"""The comparison of two runs as one page, as figures, and as tables for a paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from forensics_lib.images.io import ImageError, decoded, open_image
from forensics_lib.reports.analysis import Analysis, error_name, errors_of
from forensics_lib.reports.compare import paths_of
from forensics_lib.reports.figures import BLUE, GREY, ORANGE, hide_axes, new_figure, no_image, write_figure
from forensics_lib.reports.report import TASK_NAMES, html_of, picture_of, template
from forensics_lib.utils.files import read_json, write_csv, write_text

SHOWN = 6  # images of an error and a class in a gallery
ROWS = 45  # most rows of a plot
KINDS = {"first alone": "{0} alone is wrong", "second alone": "{1} alone is wrong", "both": "both are wrong"}
SURE = 0.05  # p below which the runs' errors are not equally many


def write_analysis(analyses: list[Analysis]) -> Path:
    """Write ``analysis.html`` into the folder ``analysis`` of the second run, with its figures, CSV and LaTeX tables.

    Returns the page, which needs no other file.
    """
    runs = analyses[0].runs
    folder = paths_of(runs[1]).folder / "analysis"
    sections = []
    for analysis in analyses:
        figures = figures_of(analysis)
        for name, figure in figures.items():
            write_figure(figure, folder / f"task{analysis.task}_{name}")
        for name, table in analysis.tables.items():
            _write_table(table, folder / f"task{analysis.task}_{name}", analysis)
        shown = {_CAPTIONS[name]: picture_of(folder / f"task{analysis.task}_{name}.png") for name in figures}
        sections.append(
            {"analysis": analysis, "title": TASK_NAMES[analysis.task], "figures": shown, "answer": answer(analysis)}
        )
    sample = any(read_json(paths_of(run).folder / "run.json").get("sample") for run in runs)
    page = template("analysis.html.j2").render(runs=runs, sections=sections, sample=sample, html_of=html_of)
    write_text(folder / "analysis.html", page)
    return folder / "analysis.html"


def _write_table(table: pd.DataFrame, target: Path, analysis: Analysis) -> None:
    """A table as ``.csv`` and, with booktabs' rules, as ``.tex``."""
    write_csv(target.with_name(f"{target.name}.csv"), table)
    style = table.style.hide(axis="index").format(precision=3, na_rep="--", escape="latex").format_index(escape="latex", axis=1)
    caption = f"Task {analysis.task}: {_TITLES[target.name.partition('_')[2]].format(*analysis.runs)}.".replace("_", r"\_")
    write_text(target.with_name(f"{target.name}.tex"), style.to_latex(hrules=True, caption=caption, environment="longtable"))


_TITLES = {
    "differences": "{1} minus {0}, with 95% intervals by paired bootstrap over photographs",
    "groups": "{0} and {1} by group, with 95% intervals of the difference by paired bootstrap over photographs",
    "errors": "images by who judges them wrongly; p of McNemar's exact test",
    "traits": "what wrongly judged images differ in from rightly judged ones of their class (Cliff's delta, 95% intervals)",
    "training": "training images",
}
_CAPTIONS = {
    "differences": "Error rates of groups: the second run minus the first, with 95% intervals; orange where it excludes 0",
    "iou": "Mean IoU of groups of manipulated images: the second run minus the first, with 95% intervals",
    "traits": "What wrongly judged images differ in from rightly judged ones of their class, with 95% intervals",
    "first": "Images that the first run alone judges wrongly, the surest of them",
    "second": "Images that the second run alone judges wrongly, the surest of them",
    "both": "Images that both runs judge wrongly, the surest of them",
}


# ---- What it says ----------------------------------------------------------------------------------------------------


def answer(analysis: Analysis) -> list[str]:
    """What the tables say, in sentences."""
    first, second = analysis.runs
    told = []
    for _, row in analysis.differences.iterrows():
        interval = f"{row['value']:+.3f} ({row['from']:+.3f} to {row['to']:+.3f})"
        sure = "" if _excludes_zero(row) else "; these images cannot tell whether there is any difference"
        told.append(f"{row['score'].upper()} of {second} minus {first}: {interval}, {row['images']:,} images{sure}.")
    for _, row in analysis.errors.iterrows():
        only = f"{row[f'{first} alone']} by {first} alone, {row[f'{second} alone']} by {second} alone"
        more = "more than chance makes" if row["p"] < SURE else "a difference that chance may make"
        told.append(f"{row['error'].capitalize()}: {only} ({more}, p {row['p']:.3f}), {row['both']} by both.")
    told += [_groups_sentence(analysis), _traits_sentence(analysis)]
    return [sentence for sentence in told if sentence]


def _excludes_zero(row: pd.Series) -> bool:
    return bool(row["from"] > 0 or row["to"] < 0)


def _groups_sentence(analysis: Analysis) -> str:
    rows = analysis.groups[(analysis.groups["measure"] == "error rate") & (analysis.groups["by"] != "all")]
    if rows.empty:
        return ""
    sure = rows[rows.apply(_excludes_zero, axis=1)]
    chance = f"{len(rows)} groups were looked at, so that about {max(1, round(len(rows) / 20))} may differ by chance"
    if sure.empty:
        return f"In no group do the error rates of the runs differ for sure ({chance})."
    furthest = sure.loc[sure["difference"].abs().sort_values(ascending=False, kind="stable").index].head(4)
    named = [f"{row['by']} {row['group']}, {row['class']} ({row['difference']:+.0%})" for _, row in furthest.iterrows()]
    return f"Error rates change most in: {'; '.join(named)} ({chance})."


def _traits_sentence(analysis: Analysis) -> str:
    """The strongest trait of each run's false positives."""
    told, alarms = [], analysis.traits[analysis.traits["error"] == error_name(analysis.task, 0)]
    for run, rows in alarms.groupby("run", sort=False):
        sure = rows[rows.apply(_excludes_zero, axis=1)]
        if len(sure):
            row = sure.loc[sure["effect"].abs().idxmax()]
            less = "lower" if row["effect"] < 0 else "higher"
            told.append(f"{run}: {less} {row['trait']} (effect {row['effect']:+.2f})")
        else:
            told.append(f"{run}: nothing for sure")
    return f"What marks its false positives: {'; '.join(told)}." if told else "Too few false positives to say what marks them."


# ---- Figures ---------------------------------------------------------------------------------------------------------


def figures_of(analysis: Analysis) -> dict[str, Figure]:
    """The figures of an analysis by name."""
    figures = {"differences": difference_plot(analysis, "error rate")}
    if "iou first" in analysis.images:
        figures["iou"] = difference_plot(analysis, "mean IoU")
    figures["traits"] = trait_plot(analysis)
    return figures | {kind.partition(" ")[0]: error_gallery(analysis, kind) for kind in KINDS}


def difference_plot(analysis: Analysis, measure: str) -> Figure:
    """Paired differences of a measure by group with 95% intervals; the largest groups where there are many."""
    rows = analysis.groups[analysis.groups["measure"] == measure]
    rows = rows.loc[rows["images"].sort_values(ascending=False, kind="stable").head(ROWS).index].sort_index()
    title = f"Task {analysis.task}: {measure}, {analysis.runs[1]} minus {analysis.runs[0]}"
    if rows.empty:
        return no_image(title, "no group with enough images")
    figure, axes = new_figure(1, 1, 8, 0.19 * len(rows) + 1.1)
    axis, places = axes[0, 0], np.arange(len(rows))
    colours = [ORANGE if _excludes_zero(row) else BLUE for _, row in rows.iterrows()]
    axis.hlines(places, rows["from"], rows["to"], color=colours, linewidth=3, alpha=0.5)
    axis.scatter(rows["difference"], places, color=colours, s=14, zorder=3)
    axis.axvline(0, color=GREY, lw=1)
    names = [f"{row['by']}: {row['group']}, {row['class']} ({row['images']})" for _, row in rows.iterrows()]
    axis.set_yticks(places, names, fontsize=7)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"difference of {measure}")
    figure.suptitle(title, fontsize=10)
    return figure


def trait_plot(analysis: Analysis) -> Figure:
    """Effect sizes of traits of wrongly judged images, a panel for each error, a colour for each run."""
    title = f"Task {analysis.task}: traits of wrongly judged images"
    traits = list(dict.fromkeys(analysis.traits["trait"]))
    if not traits:
        return no_image(title, "too few errors to say what marks them")
    figure, axes = new_figure(1, 2, 9, 0.32 * len(traits) + 1.4)
    for label, axis in enumerate(axes[0]):
        for number, (run, colour) in enumerate(zip(analysis.runs, (BLUE, ORANGE), strict=True)):
            rows = analysis.traits[
                (analysis.traits["run"] == run) & (analysis.traits["error"] == error_name(analysis.task, label))
            ]
            places = np.array([traits.index(trait) for trait in rows["trait"]]) + (number - 0.5) * 0.3
            axis.hlines(places, rows["from"], rows["to"], color=colour, linewidth=3, alpha=0.5)
            axis.scatter(rows["effect"], places, color=colour, s=14, zorder=3, label=run)
        axis.axvline(0, color=GREY, lw=1)
        axis.set(xlim=(-1, 1), ylim=(len(traits) - 0.5, -0.5), xlabel="Cliff's delta", title=error_name(analysis.task, label))
        axis.set_yticks(range(len(traits)), traits if label == 0 else [""] * len(traits))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=10)
    return figure


def error_gallery(analysis: Analysis, kind: str) -> Figure:
    """The surest of the images that one run alone, or both, judge wrongly (``KINDS``): authentic ones above, others below."""
    title = f"Task {analysis.task}: {KINDS[kind].format(*analysis.runs)}"
    rows = analysis.images[errors_of(analysis.images) == kind]
    if rows.empty:
        return no_image(title)
    mean = rows[["prob first", "prob second"]].mean(axis=1)
    surest = {label: mean[rows["label"] == label].sort_values(ascending=bool(label), kind="stable") for label in (0, 1)}
    figure, axes = new_figure(2, SHOWN, 1.6 * SHOWN, 4.2)
    hide_axes(axes)
    for label, line in enumerate(axes):
        for axis, place in zip(line, surest[label].index[:SHOWN], strict=False):
            row = rows.loc[place]
            axis.imshow(_thumbnail(row["path"]))
            axis.set_title(f"{row['source']}\n{row['prob first']:.2f}, {row['prob second']:.2f}", fontsize=7)
        line[0].text(-0.1, 0.5, error_name(analysis.task, label), rotation=90, ha="right", va="center", fontsize=7,
                     transform=line[0].transAxes)  # fmt: skip
    figure.suptitle(f"{title} (probabilities of {analysis.runs[0]}, {analysis.runs[1]})", fontsize=9)
    return figure


def _thumbnail(path: str, side: int = 200) -> Image.Image:
    try:
        with open_image(path) as image:
            small = decoded(image)
    except ImageError:  # gone since it was evaluated
        return Image.new("RGB", (side, side), "white")
    small.thumbnail((side, side))
    return small
