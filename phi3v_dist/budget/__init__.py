"""Memory, arithmetic and time of a step, worked out beforehand. Pure arithmetic."""
