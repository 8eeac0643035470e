"""The names of the files in a run directory, by which all others know them."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
DATA = "plan"  # the plan and what it is made from; made again where it is missing
METRICS, STEP = "metrics.jsonl", "train/global_step"  # STEP: in each of its lines, the optimizer step
STARTS = "starts.jsonl"
RUN_ID = "wandb_id"
EVALUATIONS, BEST_FILE = "eval", "best.json"  # BEST_FILE: in EVALUATIONS, the best of them
# In the directory of each evaluation; PREDICTIONS_TABLE: the answers with small images.
SCORES, PREDICTIONS, PREDICTIONS_TABLE = "scores.json", "predictions.jsonl", "predictions.parquet"


def evaluation_dir(run_dir: Path, step: int) -> Path:
    """RUN/eval/step-N."""
    return run_dir / EVALUATIONS / f"step-{step:06d}"
