"""Matplotlib, without a display; an extra of the package."""

from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot`. Raises ValueError, with the fix, where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("this draws with matplotlib: pip install 'esd-jax[artwork]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt
