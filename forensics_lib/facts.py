"""What files say of themselves, read in parallel and kept: a file is read again only when its size or time changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from joblib import Parallel, delayed

from forensics_lib.disk import Looks
from forensics_lib.files import whole
from forensics_lib.images import facts_of, hashes_of
from forensics_lib.layouts import pandas_type
from forensics_lib.parquet import file_of
from forensics_lib.progress import progress

FACT_TYPES = {
    "width": pa.float64(),
    "height": pa.float64(),
    "format": pa.large_string(),
    "jpeg_quality": pa.float64(),
    "camera": pa.bool_(),
    "bytes": pa.float64(),
    "error": pa.large_string(),
}
FILE_COLUMNS = list(FACT_TYPES)
_FEW = 4_000  # of fewer files the reading is done before other processes have started
_CHUNK = 10_000

Reading = Callable[[list[str]], list[tuple]]


def file_facts(paths: list[str], cache: Path, looks: Looks | None = None) -> pd.DataFrame:
    """``FILE_COLUMNS`` and ``identity`` of each path, by headers alone; ``error``, else missing, says why it cannot be read.

    ``looks`` may have begun to look at the files.
    """
    return _kept(paths, cache, looks or Looks(), FACT_TYPES, facts_of, "reading headers")


def image_hashes(paths: list[str], cache: Path) -> pd.Series:
    """The perceptual hash of each image as UInt64, missing where it means nothing."""
    return _kept(paths, cache, Looks(), {"hash": pa.uint64()}, hashes_of, "hashing images")["hash"]


def _kept(
    paths: list[str], cache: Path, looks: Looks, types: dict[str, pa.DataType], read: Reading, title: str
) -> pd.DataFrame:
    """The columns of ``types`` for every path: from ``cache`` where size and time are the same, else read and kept."""
    keys = _keys(paths, looks)
    known = _load(cache, [*keys.column_names, *types])
    rows = _rows_of(keys, known)
    if known is not None and len(rows) == len(known) and (rows == np.arange(len(rows))).all():
        return known.select([*types, "identity"]).to_pandas(types_mapper=pandas_type)
    new = np.flatnonzero(rows < 0)
    values = list(chain.from_iterable(_in_parallel(read, keys.column("path").take(pa.array(new)).to_pylist(), title)))
    columns = zip(*values, strict=True) if values else [()] * len(types)
    fresh = pa.table({name: pa.array(list(column), kind) for (name, kind), column in zip(types.items(), columns, strict=True)})
    both = fresh if known is None else pa.concat_tables([known.select(list(types)), fresh])
    rows[new] = np.arange(len(new)) + (0 if known is None else len(known))
    facts = both.take(pa.array(rows))
    table = pa.table({name: part.column(name) for part in (keys, facts) for name in part.column_names})
    with whole(cache) as temporary:
        pq.write_table(table, temporary)
    return table.select([*types, "identity"]).to_pandas(types_mapper=pandas_type)


def _keys(paths: list[str], looks: Looks) -> pa.Table:
    """Path, size, time of change and identity of each file."""
    size, time, identity = looks.at([file_of(path) if "#" in path else path for path in paths]).T
    return pa.table({"path": pa.array(paths, pa.large_string()), "size": size, "time": time, "identity": identity})


def _load(cache: Path, columns: list[str]) -> pa.Table | None:
    """The kept facts; None where there are none, or of another version."""
    try:
        table = pq.read_table(cache)
    except (OSError, pa.ArrowException):
        return None
    return table if table.column_names == columns else None


def _rows_of(keys: pa.Table, known: pa.Table | None) -> np.ndarray:
    """For every key the row of ``known`` with the same path, size and time, else -1."""
    if known is None:
        return np.full(len(keys), -1)
    if keys.column("path").equals(known.column("path")):
        rows = np.arange(len(keys))
    else:
        rows = pd.Index(known.column("path").to_pandas(types_mapper=pandas_type)).get_indexer(keys.column("path").to_pandas())
    for name in ("size", "time"):
        now, then = keys.column(name).to_numpy(), known.column(name).to_numpy()
        rows[(now != then[rows]) | (rows < 0)] = -1
    return rows


def _in_parallel(function: Callable, items: list[str], title: str) -> Iterator:
    """``function`` of chunks of ``items``, in order, in as many processes as there are cores."""
    if len(items) <= _FEW:
        yield from (function(items[i : i + 500]) for i in progress(range(0, len(items), 500), title))
        return
    parts = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
    results = Parallel(n_jobs=-1, return_as="generator")(delayed(function)(part) for part in parts)
    yield from progress(results, title, total=len(parts))
