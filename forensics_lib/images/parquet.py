"""Images inside parquet files of hub data sets, read in place.

The path of such an image is ``{file}.parquet#{column}={row}``, and valid wherever an image's path is.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forensics_lib.utils.files import LFS_POINTER, NOT_UTF8, broken_link, is_lfs_pointer, shown

_MEMBER = re.compile(r"(?P<file>.+\.(?i:parquet))#(?P<column>[^#]+)=(?P<row>\d+)", re.DOTALL)


def member_path(file: str | Path, column: str, row: int) -> str:
    return f"{file}#{column}={row}"


def file_of(path: str) -> str:
    """The file on disk: the parquet file of a member's path, else the path itself."""
    if "#" not in path:
        return path
    match = _MEMBER.fullmatch(path)
    return match["file"] if match else path


def member_bytes(path: str) -> bytes | None:
    """The encoded image at the path of a parquet member; None for an ordinary path.

    The current row group is cached: reading in order is fast, reading in random order loads a group per image.
    Raises ``FileNotFoundError`` and ``ValueError``.
    """
    match = _MEMBER.fullmatch(path) if "#" in path else None
    if match is None:
        return None
    _, starts = _opened(match["file"])
    row = int(match["row"])
    group = int(np.searchsorted(starts, row, side="right")) - 1
    value = _column(match["file"], match["column"], group)[row - int(starts[group])].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        raise ValueError("this row holds no image bytes")
    return data


@lru_cache(maxsize=32)
def _opened(file: str) -> tuple[Any, np.ndarray]:
    """An open parquet file and the first row of each of its row groups."""
    opened = pq.ParquetFile(file, memory_map=True, pre_buffer=False)
    counts = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
    return opened, np.concatenate([[0], np.cumsum(counts)])[:-1].astype(int)


@lru_cache(maxsize=1)
def _column(file: str, column: str, group: int) -> Any:
    return _opened(file)[0].read_row_group(group, [column], use_threads=False).column(0)


def damage(file: Path) -> str | None:
    """Why a parquet file cannot be read, by its name and footer; None if it can."""
    if shown(file) != str(file):
        return NOT_UTF8
    if is_lfs_pointer(file):
        return LFS_POINTER
    try:
        pq.read_schema(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        return broken_link(file) or damaged_by(error)
    return None


def damaged_by(error: Exception) -> str:
    """An error of pyarrow as a message with the remedy."""
    return f"damaged, or not downloaded to its end: download it again. {str(error).strip().splitlines()[0]}"


def image_columns(file: Path) -> list[str]:
    """The columns of encoded images: structs with ``bytes``, as the hub writes them, or plain binary."""
    found = []
    for field in pq.read_schema(file):
        kind = field.type
        struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            found.append(field.name)
    return found


def class_names(file: Path, column: str) -> list[str] | None:
    """The class names of a column in the hub's metadata; None if there are none."""
    stored = (pq.read_schema(file).metadata or {}).get(b"huggingface")
    features = json.loads(stored).get("info", {}).get("features", {}) if stored else {}
    return features.get(column, {}).get("names")
