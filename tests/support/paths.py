"""Where things lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent  # of the repository
DATA = TESTS / "data"
