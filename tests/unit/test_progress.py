"""What long work shows: lines without a terminal, bars with one, and nothing in a program that has not asked."""

import io
import sys

import pytest

from esd_jax import progress

SHOW_CURSOR, ERASE_LINE = "\x1b[?25h", "\x1b[2K"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def steps(clock, seconds, task, note=""):
    for duration in seconds:
        clock[0] += duration
        task.advance(8, note)


def test_without_a_terminal_a_line_now_and_then(clock, capsys):
    """The first step's time, which is compilation, is no part of the estimate: 3 s a step, six of which are left."""
    with progress.shown(), progress.task("sampling", 72, unit="images", start="compiling, once") as task:
        assert capsys.readouterr().err == "sampling 0/72 images  compiling, once\n"
        steps(clock, [5], task)
        assert capsys.readouterr().err == ""
        steps(clock, [3, 3], task, "loss 0.1")
        assert capsys.readouterr().err == "sampling 24/72 images  loss 0.1  11 s, 18 s left\n"
        steps(clock, [3, 3], task)
        assert capsys.readouterr().err == ""
        steps(clock, [60, 60, 3, 3], task)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[-1] == "sampling 72/72 images  2 min"


def test_what_goes_on_within_a_task_has_no_lines_of_its_own_for_ten_seconds(clock, capsys):
    with progress.shown(), progress.task("measuring", 2, start="compiling, once") as outer:
        with progress.task("sampling", 16, start="compiling, once") as inner:
            steps(clock, [1, 1], inner)
        assert capsys.readouterr().err == "measuring 0/2  compiling, once\n"
        with progress.task("sampling", 32, start="compiling, once") as inner:
            steps(clock, [6, 6], inner)
        assert capsys.readouterr().err == "sampling 16/32  12 s, 12 s left\n"
        outer.advance(2)
    assert capsys.readouterr().err == "measuring 2/2  14 s\n"


def test_quick_work_that_waits_for_nothing_is_silent(clock, capsys):
    with progress.shown(), progress.task("loading unet", 16) as task:
        steps(clock, [1, 1], task)
    assert capsys.readouterr().err == ""


def test_a_run_goes_on_where_it_was_and_may_have_no_end(clock, capsys):
    with progress.shown(), progress.task("erasing", 48, done=32, start="compiling") as task:
        steps(clock, [1, 1], task)
    assert capsys.readouterr().err == "erasing 32/48  compiling\nerasing 48/48  2 s\n"
    with progress.shown(), progress.task("searching", start="compiling") as task:
        steps(clock, [11], task)
    assert capsys.readouterr().err == "searching 0  compiling\nsearching 8  11 s\n"


def test_a_label_says_what_it_is_for(capsys):
    with progress.shown(), progress.labelled("placebo"), progress.task("erasing", 2, start="compiling"):
        assert capsys.readouterr().err == "placebo: erasing 0/2  compiling\n"


def test_a_program_sees_what_it_asks_for_alone(capsys, monkeypatch):
    monkeypatch.delattr(sys, "ps1", raising=False)
    with progress.task("sampling", 2, start="compiling"):
        pass
    assert capsys.readouterr().err == ""
    with progress.task("erasing", 2, start="compiling", always=True), progress.task("sampling", 2, start="compiling"):
        pass
    assert capsys.readouterr().err == "erasing 0/2  compiling\n"
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with progress.task("sampling", 2, start="compiling"):
        pass
    assert capsys.readouterr().err == "sampling 0/2  compiling\n"


def test_a_terminal_has_bars_of_which_the_outermost_stays(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    with progress.shown():
        with progress.task("measuring", 16, unit="models", start="compiling, once") as outer:
            with progress.task("sampling", 16, unit="images") as inner:
                steps(clock, [1, 1], inner, "loss 0.25")
            steps(clock, [1, 1], outer)
        with progress.task("loading", 16) as quick:
            steps(clock, [0.1, 0.1], quick)
    text = terminal.getvalue()
    assert "measuring" in text and "16/16" in text and "models" in text
    last = text[text.rindex("measuring") :]
    assert "sampling" not in last[: last.index(SHOW_CURSOR)]
    assert ERASE_LINE in text[text.rindex("loading") :]  # it took less than a second


def test_an_error_ends_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(ValueError, match="no such"), progress.shown(), progress.task("sampling", 2):
        raise ValueError("no such prompt")
    assert SHOW_CURSOR in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min")]
)
def test_times(seconds, text):
    assert progress.left(seconds) == text


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_has_bars_only_where_it_can_draw_them(widgets, monkeypatch):
    """Without ipywidgets rich warns, and leaves an empty output for each bar."""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: sys if widgets else None)
    assert isinstance(progress._default(), progress._Bars if widgets else progress._Lines)
