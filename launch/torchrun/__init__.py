"""torchrun and its ranks, on one node."""
