"""The parts of `python -m launch.benchmark`."""
