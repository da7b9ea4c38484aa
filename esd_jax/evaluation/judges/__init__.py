"""Detectors and metric models: classifiers, perceptual distance and features, each with its name, version and hash."""
