"""How the embedded model and its probe are trained from scratch, in pure functions that `launch/` runs."""
