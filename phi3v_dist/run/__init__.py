"""The run directory and what is checked before a run starts."""
