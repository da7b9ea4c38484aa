"""`python -m launch.erase FLAGS` is `esd-jax erase FLAGS`."""

import sys

from esd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["erase", *sys.argv[1:]]))
