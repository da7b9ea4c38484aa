"""Noise schedules, samplers and guidance: pure functions over `denoise(x, t)`."""
