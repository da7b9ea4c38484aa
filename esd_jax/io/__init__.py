"""Checkpoints on disk: diffusers folders, single files, the hub, deltas. The only place that transposes tensors."""
