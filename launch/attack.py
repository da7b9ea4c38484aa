"""`python -m launch.attack FLAGS` is `esd-jax attack FLAGS`."""

import sys

from esd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["attack", *sys.argv[1:]]))
