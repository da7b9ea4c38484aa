"""`python -m esd_jax.cli VERB` is `esd-jax VERB`."""

import sys

from esd_jax.cli import console

if __name__ == "__main__":
    sys.exit(console())
