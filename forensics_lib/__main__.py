"""``python -m forensics_lib``: what the notebooks do, from a shell; ``train`` and ``infer`` also under torchrun."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forensics_lib.utils.files import home, write_traceback

if TYPE_CHECKING:
    from forensics_lib.run import Run

DEFAULT = "params/constrained.yaml"  # as of make run-constrained and of the notebooks


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.do(options)
    except KeyboardInterrupt as stopped:
        print(stopped or "stopped: the same command goes on", file=sys.stderr)
        return 130
    except Exception as error:
        print(_told(error), file=sys.stderr)
        return 1


def _told(error: Exception) -> str:
    """What to say of an error: its message where it is meant for the reader, else where its traceback was written."""
    own = type(error).__module__.startswith("forensics_lib.")
    raised_here = Path(__file__).parent in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents
    if own or isinstance(error, OSError) or (raised_here and isinstance(error, (ValueError, RuntimeError))):
        return str(error)
    try:
        path = write_traceback(home() / "outputs", error)
    except (OSError, ValueError):  # nowhere to write it
        return "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}\nThis was not foreseen; the traceback is in {path}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m forensics_lib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (do, text, example) in COMMANDS.items():
        epilog = f"example: python -m forensics_lib {name} {example}"
        added = commands.add_parser(name, help=text, description=text, epilog=epilog)
        added.set_defaults(do=do)
        _add_options(added, name)
    return parser


def _add_options(parser: argparse.ArgumentParser, command: str) -> None:
    if command in ("run", "train", "infer", "submit", "report", "check-data"):
        parser.add_argument("--params", default=DEFAULT, help=f"parameter file (default: {DEFAULT})")
        parser.add_argument("--data", default="", help="data root instead of the parameter file's")
        text = "further parameters to change, each once; several --set add up"
        parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help=text)
    if command == "run":
        parser.add_argument("--from", dest="start", default="", help="notebook to begin with, such as 03_train_taskB or 03")
    if command in ("train", "infer", "submit"):
        parser.add_argument("--tasks", nargs="+", choices=["A", "B"], help="default: all tasks of the parameter file")
    if command == "ensemble":
        parser.add_argument("runs", nargs="+", help="names of trained runs in outputs/")
        parser.add_argument("--name", required=True, help="name of the new run")
    if command == "export":
        parser.add_argument("run", help="name of a trained run in outputs/")
    if command == "compare":
        parser.add_argument("runs", nargs="+", help="names of runs in outputs/")
    if command == "analyze":
        parser.add_argument("runs", nargs="*", help="names of two runs in outputs/ (default: latest constrained, latest open)")
    if command in ("reproduce", "doctor"):
        parser.add_argument("run", help="name of a run in outputs/")
    if command == "predict":
        parser.add_argument("images", nargs="+", help="picture files and folders")
        parser.add_argument("--checkpoint", help="the ..._finetuned_model.pth of an evaluated run")
        parser.add_argument("--out", type=Path, required=True, help="folder of the table and the masks")
        parser.add_argument("--report", action="store_true", help="write a page, predictions.html, too")
    if command == "validate":
        parser.add_argument("archive", type=Path)
        parser.add_argument("--task", choices=["A", "B"], required=True)
        parser.add_argument("--images", type=Path, required=True, help="folder of the test images")
    if command == "score":
        parser.add_argument("archive", type=Path)
        text = "folder of true masks (<image>.png, <image>_mask.png), or a CSV with image_id and mask_path"
        parser.add_argument("--truth", type=Path, required=True, help=text)


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The parameters that the command line changes.  Raises ``SettingError`` where it sets one of them twice."""
    from forensics_lib.params import SettingError, parse_settings

    overrides = parse_settings(options.set)
    data = options.data and str(Path(options.data).expanduser().resolve())
    for option, key, value in (("--data", "data_root", data), ("--tasks", "tasks", getattr(options, "tasks", None))):
        if value and overrides.setdefault(key, value) != value:
            raise SettingError(f"{key} is set twice: {option} says {value}, --set says {overrides[key]}; leave one of them out")
    return overrides


def _run(options: argparse.Namespace) -> int:
    from forensics_lib.pipeline import NOTEBOOKS, run_pipeline

    starts = [name for name in NOTEBOOKS if name.startswith(options.start)]
    if not starts:
        raise ValueError(f"--from {options.start}: no such notebook; there are {', '.join(NOTEBOOKS)}")
    run_pipeline(options.params, _overrides(options), starts[0])
    return 0


def _open(options: argparse.Namespace) -> Run:
    """The run of a command, opened by every process of its group; its tasks are those of the command line."""
    from forensics_lib.run import open_run
    from forensics_lib.utils.processes import join_group, main_process_first

    join_group()
    overrides = _overrides(options)
    run = main_process_first(lambda: open_run(options.params, overrides))
    run.describe()
    return run


def _train(options: argparse.Namespace) -> int:
    from forensics_lib.data.manifest import build_manifest
    from forensics_lib.evaluation.evaluate import evaluate, evaluate_held_out
    from forensics_lib.reports.doctor import diagnose
    from forensics_lib.training.loop import train
    from forensics_lib.utils.processes import launched, leave_group, main_process_first

    run = _open(options)
    for task in run.params.tasks:
        manifest = main_process_first(partial(build_manifest, run, task))
        train(run, task, manifest)
        if not launched():  # a notebook goes on by itself
            print(evaluate(run, task, manifest).summary().to_string())
            held_out = evaluate_held_out(run, task, manifest)
            if held_out is not None:
                print(f"held out:\n{held_out.summary().to_string()}")
            print(diagnose(run, task, manifest))
    leave_group()
    return 0


def _ensemble(options: argparse.Namespace) -> int:
    from forensics_lib.evaluation.ensemble import make_ensemble

    params = make_ensemble(options.runs, options.name)
    options.params, options.data, options.set, options.tasks = str(params), "", [], None
    _train(options)
    print(f"go on with: python -m forensics_lib infer --params {params}, then submit; or notebooks 04 and 05 with it")
    return 0


def _infer(options: argparse.Namespace) -> int:
    from forensics_lib.inference.shards import infer
    from forensics_lib.utils.processes import leave_group

    run = _open(options)
    for task in run.params.tasks:
        print(f"Task {task}: {len(infer(run, task))} images, written to {run.test_probs(task)}")
    leave_group()
    return 0


def _submit(options: argparse.Namespace) -> int:
    from forensics_lib.reports.report import build_report
    from forensics_lib.submission.build import build_submission

    run = _open(options)
    for task in run.params.tasks:
        print(build_submission(run, task).report())
    print(f"report: {build_report(run)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from forensics_lib.reports.report import build_report

    print(build_report(_open(options)))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from forensics_lib.reports.compare import compare, comparison_figure
    from forensics_lib.reports.figures import write_figure

    tables = compare(options.runs)
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(index=name in ('parameters', 'cost')) if len(table) else 'none'}")
    target = home() / "outputs" / f"comparison_{'_'.join(options.runs)}"
    write_figure(comparison_figure(tables), target)
    print(f"\n{target}.png and .svg")
    return 0


def _analyze(options: argparse.Namespace) -> int:
    from forensics_lib.reports.analysis import analyze
    from forensics_lib.reports.analysis_page import answer, write_analysis

    analyses = analyze(options.runs)
    for analysis in analyses:
        print(f"Task {analysis.task}", *answer(analysis), sep="\n  ")
    print(write_analysis(analyses))
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from forensics_lib.pipeline import reproduce

    table = reproduce(options.run)
    if not table["equal"].all():
        print(table[~table["equal"]].to_string(index=False))
    print(f"{table['equal'].sum()} of {len(table)} results are equal to the last byte")
    return 0 if table["equal"].all() else 1


def _doctor(options: argparse.Namespace) -> int:
    from forensics_lib.reports.doctor import diagnose_run

    print(*diagnose_run(options.run), sep="\n\n")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from forensics_lib.reports.pictures import predict_pictures

    verdicts = predict_pictures(options.images, options.checkpoint, options.out, report=options.report)
    return 0 if any(verdict.answer.error is None for verdict in verdicts) else 1


def _export(options: argparse.Namespace) -> int:
    from forensics_lib.inference.export import export, run_to_export

    run, tasks = run_to_export(options.run)
    for task in tasks:
        export(run, task)
    return 0


def _sample(_: argparse.Namespace) -> int:
    from forensics_lib.synthesis.sample import build_sample

    print(f"sample data in {build_sample(home() / 'data' / 'sample')}")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from forensics_lib.data.check import check_data
    from forensics_lib.params import load_params
    from forensics_lib.run import Run
    from forensics_lib.utils.files import from_home

    params = load_params(options.params, _overrides(options))
    result = check_data(Run(params, from_home(params.data_root)))
    print(result.report())
    return 0 if result.complete else 1


def _validate(options: argparse.Namespace) -> int:
    from forensics_lib.submission.validate import validate_submission

    result = validate_submission(options.archive, options.task, options.images)
    print(result.report())
    return 0 if result.valid else 1


def _score(options: argparse.Namespace) -> int:
    from forensics_lib.submission.score import score_archive, summary

    print(summary(score_archive(options.archive, options.truth)).round(4).to_string(na_rep="-"))
    return 0


# Per command: its function, what it does, and an example of its arguments
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, str]] = {
    "run": (
        _run,
        "execute the notebooks of a run and leave its archives in submission/",
        "--params params/constrained.yaml --data /path/to/data --set batch_size=32",
    ),
    "train": (
        _train,
        "train both steps and choose thresholds on validation (as notebooks 02 and 03)",
        "--params params/constrained.yaml --tasks A",
    ),
    "ensemble": (
        _ensemble,
        "average trained runs: a run with thresholds of its own, for infer, submit and compare",
        "constrained constrained_seed1 --name both",
    ),
    "infer": (_infer, "predict the test images (as notebook 04)", "--params params/constrained.yaml --tasks A"),
    "submit": (_submit, "build the archives and the report (as notebook 05)", "--params params/constrained.yaml --tasks A"),
    "report": (_report, "write a run's report.html again", "--params params/constrained.yaml"),
    "compare": (
        _compare,
        "scores, differences with intervals, parameters and cost of several runs side by side",
        "constrained open",
    ),
    "analyze": (
        _analyze,
        "compare two runs by group, error and trait of images: a page, and tables in CSV and LaTeX for a paper",
        "constrained open",
    ),
    "doctor": (_doctor, "tell why a run's scores are what they are: what is wrong or doubtful, and what to do", "constrained"),
    "reproduce": (_reproduce, "do a run again from its run.json and compare the results", "constrained"),
    "predict": (
        _predict,
        "what a trained model says of any pictures, and whether that survives recompression and shrinking",
        "holiday.jpg folder --checkpoint outputs/constrained_finetuned_model.pth --out predictions --report",
    ),
    "export": (_export, "write a run's models as ONNX files, checked against the library's answers", "constrained"),
    "sample": (_sample, "make the built-in sample data in data/sample", ""),
    "check-data": (_check_data, "count what a run needs against what the official sets hold", "--data /path/to/data"),
    "validate": (
        _validate,
        "check a submission archive against the test images",
        "submission/x.zip --task B --images data/test/taskB",
    ),
    "score": (
        _score,
        "score a Task B archive against true masks: IoU as TGIF's authors compute it, and F1",
        "submission/x.zip --truth masks/",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
