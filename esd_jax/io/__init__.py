"""Checkpoints on disk: diffusers folders, the hub, deltas. The only place that transposes tensors."""
