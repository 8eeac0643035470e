"""Checkpoints: slices that any number of ranks can read, complete or absent."""
