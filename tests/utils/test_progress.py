from forensics_lib.utils.progress import progress


def test_progress_speaks_in_lines_where_nobody_watches(monkeypatch, capsys):
    monkeypatch.setattr("forensics_lib.utils.progress.LINE_SECONDS", 0)
    bar = progress(range(3), "work")
    for _ in bar:
        bar.note("loss 1")
    assert "work: 1/3" in capsys.readouterr().out


def test_progress_passes_everything_on():
    assert list(progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
