"""The names of the files in a run directory, by which all others know them."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
DATA = "plan"
"""The plan and what it is made from; made again where it is missing."""
METRICS = "metrics.jsonl"
STEP = "train/global_step"
"""The key of the optimizer step in every line of METRICS."""
STARTS = "starts.jsonl"
RUN_ID = "wandb_id"
EVALUATIONS = "eval"
BEST_FILE = "best.json"
"""In EVALUATIONS: the best evaluation so far."""
SCORES, PREDICTIONS, PREDICTIONS_TABLE = "scores.json", "predictions.jsonl", "predictions.parquet"
"""In the directory of each evaluation; PREDICTIONS_TABLE: the answers with small images."""


def evaluation_dir(run_dir: Path, step: int) -> Path:
    """RUN/eval/step-N."""
    return run_dir / EVALUATIONS / f"step-{step:06d}"
