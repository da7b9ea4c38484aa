"""`python -m launch VERB FLAGS` is `esd-jax VERB FLAGS`."""

import sys

from esd_jax.cli import console

if __name__ == "__main__":
    sys.exit(console())
