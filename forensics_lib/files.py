"""Writing files whole or not at all, and finding the project's folders."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd


def project_root() -> Path:
    """The checkout's folder: notebooks run from anywhere, so paths start here and not at the working directory."""
    return Path(__file__).resolve().parents[1]


def home() -> Path:
    """Where ``data``, ``outputs`` and ``submission`` lie: the project, or ``FORENSICS_HOME`` where that is set."""
    return Path(os.environ.get("FORENSICS_HOME") or project_root()).resolve()


def from_home(path: str | Path) -> Path:
    """A path as a parameter names it: absolute, with ``~``, or counted from ``home()``."""
    return home() / Path(path).expanduser()


def is_main() -> bool:
    """Whether this process writes what its group found: torchrun numbers the processes of a group in ``RANK``."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; rename it to ``path`` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:60]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o666 & ~_umask())
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write ``table`` as CSV without its index, floats with six decimals, whole or not at all."""
    with whole(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, or an empty one where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def update_json(path: Path, **values: Any) -> None:
    """Set some keys of the JSON object in ``path`` and keep the others."""
    write_json(path, read_json(path) | values)
