"""`python -m launch.sample FLAGS` is `esd-jax sample FLAGS`."""

import sys

from esd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
