"""Ranks and how the work is spread over them: `mesh` (who am I), `zero` (the DeepSpeed configuration)."""
