"""Writing files whole or not at all, and finding the project's folders."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
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
    """Where ``data``, ``outputs`` and ``submission`` lie: the project, or ``FORENSICS_HOME`` where that is set.

    Raises ``ValueError`` where that is relative: notebooks run in another folder than the command that starts them.
    """
    chosen = Path(os.environ.get("FORENSICS_HOME") or project_root()).expanduser()
    if not chosen.is_absolute():
        raise ValueError(
            f"FORENSICS_HOME is {str(chosen)!r}, which is another folder in every working directory, and notebooks have "
            f"their own: set it absolute, such as FORENSICS_HOME={shlex.quote(str(chosen.resolve()))}"
        )
    return chosen.resolve()


def from_home(path: str | Path) -> Path:
    """A path as a parameter names it: absolute, with ``~``, or counted from ``home()``."""
    return home() / Path(path).expanduser()


def is_main() -> bool:
    """Whether this process writes what its group found: torchrun numbers the processes of a group in ``RANK``."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; rename it to ``path`` only when the block ends well.

    Raises ``WriteError`` where the disk is full or the folder cannot be written to.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:60]}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        if cause := _why_not_written(path, temporary, error):
            raise WriteError(f"{path} was not written: {cause}. Earlier results are whole; the same command goes on") from error
        raise
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


class WriteError(OSError):
    """A file cannot be written; the message says which, why, and what is needed."""


def _why_not_written(path: Path, temporary: Path | None, error: Exception) -> str | None:
    """The cause where it lies with the disk or the folder, else None."""
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return f"{path.parent} cannot be written to ({error.strerror}); give permission, or choose another place"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if temporary and temporary.exists() and (full or not isinstance(error, OSError)):
        free, written = shutil.disk_usage(path.parent).free, temporary.stat().st_size
        if full or free < 1 << 20:
            return f"the disk is full ({free:,} bytes are free, and more than {written:,} are needed for it); make room"
    return "the disk is full; make room" if full else None


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
