"""Settings that every test shares; they must stand before jax is imported."""

import os
from collections import Counter

import pytest
from paths import KINDS, ROOT, TESTS

# Compiled programs are kept between runs: XLA compiles slowly on a CPU.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import checked
import jaxtyping

if os.environ.get("CHECK_TYPES", "1") != "0":  # it takes about a tenth of the time
    checked.install("esd_jax")

# Tests that take more than about four seconds on two idle cores, but for those that nothing quicker stands for.
SLOW = frozenset((TESTS / "support" / "slow.txt").read_text().splitlines())
PARTS = 3  # of the slow tests: a check that cannot run all of them in its time begins with another part each time

_collected: set[str] = set()
_finished: set[str] = set()
# Of each kind: under xdist, too, where the reports of all processes arrive in the one that sums up.
_tests: Counter[str] = Counter()
_seconds: Counter[str] = Counter()  # setup, call and teardown


@pytest.fixture
def unchecked(monkeypatch):
    """For stand-ins that return, or are given, other types than what they stand for."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_addoption(parser):
    parser.addoption("--turn", type=int, default=0, help=f"Begin with this part of {PARTS} of the tests (modulo).")


def pytest_collection_modifyitems(config, items):
    """Marks every test with its kind, and the slow ones; begins with the file at which the part of this turn begins."""
    names = {item: f"{item.path.name}::{item.name}" for item in items}
    for item, name in names.items():
        item.add_marker(item.path.relative_to(TESTS).parts[0])
        if name in SLOW:
            item.add_marker("slow")
    least = config.getoption("--turn") % PARTS * len(items) // PARTS
    first = next((i for i in range(least, len(items)) if items[i].path != items[i - 1].path), 0) if least else 0
    items[:] = items[first:] + items[:first]


def pytest_collection_finish(session):
    _collected.update(item.nodeid for item in session.items)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _finished.add(report.nodeid)
    kind = next(kind for kind in KINDS if kind in report.keywords)
    _tests[kind] += report.when == "setup"
    _seconds[kind] += report.duration


def pytest_terminal_summary(terminalreporter):
    """Says what each kind took, and after an interruption (a time limit, Ctrl-C) which tests it left out."""
    if _tests:
        took = (f"{kind}: {_tests[kind]} tests, {_seconds[kind]:.0f} s" for kind in KINDS if _tests[kind])
        terminalreporter.write_line("; ".join(took))
    for name in sorted(_collected - _finished) if _tests else ():
        terminalreporter.write_line(f"left out: {name}")
