"""What is computed of images, features and verdicts: pure functions, without models or files."""
