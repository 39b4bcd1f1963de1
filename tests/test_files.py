import json
import os

import pytest

from forensics_lib.files import read_json, update_json, whole, write_text
from forensics_lib.progress import progress


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "x.txt"
    with pytest.raises(RuntimeError), whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    write_text(path, "all")
    assert path.read_text() == "all"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.txt"]


def test_an_old_file_stays_where_a_new_one_fails(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), whole(path) as temporary:
        temporary.write_text("new, but")
        raise RuntimeError
    assert path.read_text() == "old"


def test_files_have_the_usual_permissions(tmp_path):
    write_text(tmp_path / "x", "")
    (tmp_path / "y").touch()
    assert os.stat(tmp_path / "x").st_mode == os.stat(tmp_path / "y").st_mode  # noqa: PTH116


def test_updates_keep_other_keys(tmp_path):
    path = tmp_path / "x.json"
    update_json(path, a=1)
    update_json(path, b=2)
    assert json.loads(path.read_text()) == read_json(path) == {"a": 1, "b": 2}


def test_progress_speaks_in_lines_where_nobody_watches(monkeypatch, capsys):
    monkeypatch.setattr("forensics_lib.progress.LINE_SECONDS", 0)
    bar = progress(range(3), "work")
    for _ in bar:
        bar.note("loss 1")
    assert "work: 1/3" in capsys.readouterr().out


def test_progress_passes_everything_on():
    assert list(progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
