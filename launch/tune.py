"""`python -m launch.tune FLAGS` is `esd-jax tune FLAGS`."""

import sys

from esd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
