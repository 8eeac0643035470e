"""What a run reports: metrics.jsonl, W&B, the progress line, the report page."""
