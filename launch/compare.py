"""`python -m launch.compare FLAGS` is `esd-jax compare FLAGS`."""

import sys

from esd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
