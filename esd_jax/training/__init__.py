"""Training: one jitted step for every method, and the loop, checkpoints and logs around it."""
