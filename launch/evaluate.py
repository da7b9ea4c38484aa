"""`python -m launch.evaluate FLAGS` is `esd-jax evaluate FLAGS`."""

import sys

from esd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
