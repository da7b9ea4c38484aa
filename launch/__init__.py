"""`python -m launch.VERB` is `esd-jax VERB`; besides, the demo and the benchmark."""
