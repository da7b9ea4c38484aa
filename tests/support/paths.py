"""Where things lie, and the kinds of tests."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent  # of the repository
DATA = TESTS / "data"
KINDS = ("unit", "parity", "faults", "end_to_end")  # folders of TESTS, and the markers that their tests get
