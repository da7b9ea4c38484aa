"""`python -m launch VERB FLAGS` is `esd-jax VERB FLAGS`."""

import sys

from esd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
