"""Memory, arithmetic and time of a step, computed before a run starts. Pure arithmetic."""
