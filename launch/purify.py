"""`python -m launch.purify FLAGS` is `esd-jax purify FLAGS`."""

import sys

from esd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["purify", *sys.argv[1:]]))
