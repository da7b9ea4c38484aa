"""A local web page for erasing, comparing, attacking and exporting; `esd-jax studio` opens it."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, which would ask its servers otherwise
