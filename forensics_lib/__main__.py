"""``python -m forensics_lib``: runs, the sample and the validator from a shell."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from forensics_lib.files import home


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m forensics_lib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="execute the notebooks of a run and leave its archives in submission/")
    run.add_argument("params", help="parameter file, such as params/constrained.yaml")
    run.add_argument("--data", default="", help="data root instead of the parameter file's")
    run.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further parameters to change")
    run.add_argument("--from", dest="start", default="", help="notebook to begin with, such as 03_train_taskB or 03")

    commands.add_parser("sample", help="make the built-in sample data in data/sample")

    check = commands.add_parser("check-data", help="count what a run needs against what the official sets hold")
    check.add_argument("params", nargs="?", default="params/constrained.yaml")
    check.add_argument("--data", default="", help="data root instead of the parameter file's")

    validate = commands.add_parser("validate", help="check a submission archive against the test images")
    validate.add_argument("archive", type=Path)
    validate.add_argument("--task", choices=["A", "B"], required=True)
    validate.add_argument("--images", type=Path, required=True, help="folder of the test images")

    options = parser.parse_args(arguments)
    try:
        return {"run": _run, "sample": _sample, "check-data": _check_data, "validate": _validate}[options.command](options)
    except (OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    from forensics_lib.pipeline import NOTEBOOKS, run_pipeline

    starts = [name for name in NOTEBOOKS if name.startswith(options.start)]
    if not starts:
        raise ValueError(f"--from {options.start}: no such notebook; there are {', '.join(NOTEBOOKS)}")
    overrides = parse_settings(options.set)
    if options.data:
        overrides["data_root"] = str(Path(options.data).resolve())
    run_pipeline(options.params, overrides, starts[0])
    return 0


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``["batch_size=8", "tasks=[A]"]`` to a dict, values read as YAML."""
    pairs = [setting.partition("=") for setting in settings]
    for key, sign, _ in pairs:
        if not sign or not key:
            raise ValueError(f"a setting is KEY=VALUE, such as batch_size=8; found {key!r}")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def _sample(_: argparse.Namespace) -> int:
    from forensics_lib.sample import build_sample

    print(f"sample data in {build_sample(home() / 'data' / 'sample')}")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from forensics_lib.files import from_home
    from forensics_lib.official import check_data
    from forensics_lib.params import load_params
    from forensics_lib.runs import Run

    params = load_params(options.params, {"data_root": str(Path(options.data).resolve())} if options.data else {})
    result = check_data(Run(params, from_home(params.data_root)))
    print(result.report())
    return 0 if result.complete else 1


def _validate(options: argparse.Namespace) -> int:
    from forensics_lib.submission import validate_submission

    result = validate_submission(options.archive, options.task, options.images)
    print(result.report())
    return 0 if result.valid else 1


if __name__ == "__main__":
    sys.exit(main())
