"""What measures the figures in README.md and docs/, on the embedded model; and runs of several concepts."""
