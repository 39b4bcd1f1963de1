import json
import os
import subprocess
import sys
import time

import pytest

from forensics_lib.models.checkpoint import read_checkpoint, save_checkpoint
from forensics_lib.models.combined import build_model
from forensics_lib.training.resume import read_history
from forensics_lib.utils.files import atomic_write, locked, project_root, read_json, update_json, write_text


def python(code: str, *arguments) -> subprocess.Popen:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(project_root())}
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def at_once(imports: str, code: str, *arguments) -> None:
    """Run ``code`` in two processes at the same time; their first argument is x and y."""
    code = f"import sys\nfrom pathlib import Path\n{imports}\nprint('ready', flush=True)\nsys.stdin.readline()\n{code}"
    processes = [python(code, name, *arguments) for name in "xy"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=600)
        assert process.returncode == 0


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "x.txt"
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    write_text(path, "all")
    assert path.read_text() == "all"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.txt"]


def test_an_old_file_stays_where_a_new_one_fails(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
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


def test_entries_that_two_processes_set_at_once_are_all_kept(tmp_path):
    code = "for i in range(150): update_json(Path(sys.argv[2]), **{sys.argv[1] + str(i): i})"
    at_once("from forensics_lib.utils.files import update_json", code, tmp_path / "run.json")
    assert len(read_json(tmp_path / "run.json")) == 300


def test_epochs_that_two_tasks_end_at_once_are_all_kept(tiny_run):
    code = """
run = Run(Params(run_name="tiny"), Path("."))
for i in range(50):
    append_history(run, {"task": {"x": "A", "y": "B"}[sys.argv[1]], "step": "head", "epoch": i})
"""
    imports = "from forensics_lib.params import Params; from forensics_lib.run import Run"
    at_once(f"{imports}; from forensics_lib.training.resume import append_history", code)
    for task in "AB":
        assert read_history(tiny_run, task)["epoch"].tolist() == list(range(50))


def test_facts_that_two_processes_add_to_a_checkpoint_are_all_kept(tiny_run, tmp_path):
    path = tmp_path / "m.pth"
    save_checkpoint(path, build_model(tiny_run.params, "A"))
    code = "for i in range(6): add_to_checkpoint(Path(sys.argv[2]), **{sys.argv[1] + str(i): i})"
    at_once("from forensics_lib.models.checkpoint import add_to_checkpoint", code, path)
    assert {f"{name}{i}" for name in "xy" for i in range(6)} <= set(read_checkpoint(path))


WRITER = """
import sys, time
from pathlib import Path
from forensics_lib.utils.files import atomic_write
with atomic_write(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("name", ["model.pth", "no ending", "\N{LATIN SMALL LETTER A WITH DIAERESIS}" * 90 + ".csv", "a~b.txt"])
def test_what_a_killed_process_was_writing_is_removed_by_the_next_one(name, tmp_path):
    killed, lives = python(WRITER, tmp_path / name), python(WRITER, tmp_path / name)
    for process in (killed, lives):
        assert process.stdout.readline() == "writing\n"
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    write_text(tmp_path / "other", "text")
    assert len(list(tmp_path.iterdir())) == 2, "what lives keeps its file"
    lives.communicate("\n", timeout=600)
    assert {path.name for path in tmp_path.iterdir()} == {name, "other"}
    assert (tmp_path / name).read_text() == "half"


def test_another_machine_s_file_goes_when_nobody_changed_it_for_a_day(tmp_path):
    fresh, old, own = tmp_path / ".x~elsewhere~abcd1234.pth", tmp_path / ".x~elsewhere~abcd5678.pth", tmp_path / ".gitignore"
    for path in (fresh, old, own):
        path.write_text("")
        os.utime(path, (time.time() - 90_000,) * 2)
    os.utime(fresh)
    write_text(tmp_path / "y", "")
    assert fresh.exists() and own.exists()
    assert not old.exists()


def test_many_files_in_a_folder_are_not_looked_through_for_each(tmp_path, monkeypatch):
    looks, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: looks.append(1) or time.sleep(0.05) or scandir(folder))
    for number in range(100):
        write_text(tmp_path / str(number), "")
    assert len(looks) < 5


def test_a_killed_process_locks_no_folder(tmp_path):
    code = "import sys; from pathlib import Path; from forensics_lib.utils.files import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"
    other = python(code, tmp_path)
    assert other.stdout.readline() == "held\n"
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass
