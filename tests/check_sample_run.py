"""Check a finished sample run: its archives are valid to an outsider, and its scores are above what the sample promises.

Run after ``make run-constrained`` on a machine without the official data:  python tests/check_sample_run.py
"""

import sys

from forensics_lib.submission.validate import validate_submission
from forensics_lib.utils.files import home, read_json

PROMISES = {"taskA_validation": ("auc", 0.85), "taskB_validation": ("iou_manipulated", 0.20)}
ARCHIVES = {"teamname_constrained_sample.zip": "A", "teamname_localization_masks_sample.zip": "B"}
REPORT_BYTES = 5_000_000


def main() -> int:
    """Print each finding; returns 1 where one is not as it should be."""
    record = home() / "outputs" / "constrained_sample" / "run.json"
    facts, failures = read_json(record), 0
    missing = [part for part in PROMISES if part not in facts]
    if missing:
        print(f"{record} has no {', '.join(missing)}: run make run-constrained to its end first")
        return 1
    for part, (metric, least) in PROMISES.items():
        value = facts[part][metric]
        failures += value < least
        print(f"{part} {metric} {value:.3f} (at least {least})")
    for name, task in ARCHIVES.items():
        result = validate_submission(home() / "submission" / name, task, home() / "data" / "sample" / "test" / f"task{task}")
        failures += not result.valid
        print(result.report())
    size = (home() / "outputs" / "constrained_sample" / "report.html").stat().st_size
    failures += size >= REPORT_BYTES
    print(f"report of {size / 1e6:.1f} MB (below {REPORT_BYTES / 1e6:.0f})")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
