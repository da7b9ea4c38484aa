"""`python -m launch.report FLAGS` is `esd-jax report FLAGS`."""

import sys

from esd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
