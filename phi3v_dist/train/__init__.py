"""The training run: `loop` is its front door."""
