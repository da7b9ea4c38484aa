"""Matplotlib, without a display; an extra of the package."""

from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot`. Raises ValueError, with the mend, where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("this draws with matplotlib: pip install 'esd-jax[artwork]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    found.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return found
