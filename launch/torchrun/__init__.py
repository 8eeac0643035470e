"""torchrun and the ranks below it, on one node."""
