"""Ranks: `mesh` (which rank is this), `sequence` (Ulysses), `start` (one start from another), `heartbeat`."""
