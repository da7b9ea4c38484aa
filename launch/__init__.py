"""`python -m launch.VERB`: the verbs of `esd-jax` as modules, for launchers that start one Python process per host."""
