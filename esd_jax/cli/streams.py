"""Standard output and error for a command whose reader may leave: `esd-jax sample --help | head -1`."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Streams that outlast their reader: what is written to nobody is lost, and the work goes on.

    Their encoding, a locale's, may lack letters of a concept: those are written as escapes.
    """
    before = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = map(_lasting, before)
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if sys.stdout:  # there is none where it was closed
                sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: Any) -> Any:
    """A stream over the same file; the stream itself where it stands for none, as in a notebook or a test."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        file = _Unread(stream.fileno(), "w", closefd=False)
    except OSError:
        stream.reconfigure(errors="backslashreplace")
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    at_once = stream.line_buffering or stream.write_through  # the latter alone by PYTHONUNBUFFERED
    options = {"encoding": stream.encoding, "line_buffering": at_once, "write_through": True}
    return io.TextIOWrapper(io.BufferedWriter(file), errors="backslashreplace", **options)


class _Unread(io.FileIO):
    """A file to which everything can be written, whether or not anybody reads it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes
