"""What judges images: detectors, classifiers, likeness and features, each with its name, version and hash."""
