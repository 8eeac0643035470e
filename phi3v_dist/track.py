"""Where the numbers go: metrics.jsonl always, W&B when it can, one line for whoever watches.

In: dicts of metrics with the optimizer step. Called by the train loop on the main rank. W&B never stops a
run: its failures are logged once and it is left alone from then on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from pathlib import Path
from typing import Any

from phi3v_dist.config import RunConfig
from shards.atomic import write_atomically

METRICS = "metrics.jsonl"
_RUN_ID = "wandb_id"
_log = logging.getLogger(__name__)


class Tracker:
    """The metrics of a run; `log`, `log_predictions`, `close`.

    from_step: the step that the run goes on from; lines of later steps, left by a killed process, are cut
    off. about: what the W&B run's configuration holds beside the resolved configuration.
    """

    def __init__(self, config: RunConfig, run_dir: Path, from_step: int, about: dict[str, Any]) -> None:
        self._path = run_dir / METRICS
        self._cut_after(from_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._run: Any = None
        self._table: Any = None
        mode = config.track.mode
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
            return
        try:
            self._run = _start_wandb(config, run_dir, mode, about)
        except Exception as error:  # whatever W&B raises must not stop training
            self._give_up(error)

    @property
    def wandb_dir(self) -> str | None:
        """The directory of the W&B run's files, None without one."""
        return str(Path(self._run.dir).parent) if self._run is not None else None

    def log(self, step: int, metrics: dict[str, float | int | None]) -> None:
        """Writes one line of metrics at optimizer step `step`; None values are left out."""
        finite = {k: v for k, v in metrics.items() if v is not None and math.isfinite(v)}
        self._file.write(json.dumps({"train/global_step": step, **finite}) + "\n")
        self._file.flush()
        if self._run is not None:
            try:
                self._run.log({"train/global_step": step, **finite})
            except Exception as error:
                self._give_up(error)

    def log_predictions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Adds rows to the table eval/predictions: picture (PIL image), prompt, truth, prediction,
        price_error.
        """
        if self._run is None:
            return
        try:
            import wandb

            columns = ["step", "picture", "prompt", "truth", "prediction", "price_error"]
            if self._table is None:
                self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL")
            for row in rows:
                self._table.add_data(
                    step,
                    wandb.Image(row["picture"]),
                    row["prompt"],
                    row["truth"],
                    row["prediction"],
                    row["price_error"],
                )
            self._run.log({"train/global_step": step, "eval/predictions": self._table})
        except Exception as error:
            self._give_up(error)

    def close(self, exit_code: int = 0) -> None:
        self._file.close()
        if self._run is not None:
            try:
                self._run.finish(exit_code=exit_code)
            except Exception as error:
                self._give_up(error)

    def preempting(self) -> None:
        """Tells W&B that this run was stopped from outside and will go on."""
        if self._run is not None:
            try:
                self._run.mark_preempting()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        first = next(iter(str(error).splitlines()), "")
        _log.warning("W&B failed (%s: %s); going on without it", type(error).__name__, first)
        self._run = None

    def _cut_after(self, step: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["train/global_step"] <= step
        ]
        if kept != lines:
            write_atomically(self._path, "".join(kept).encode())


def _start_wandb(config: RunConfig, run_dir: Path, mode: Any, about: dict[str, Any]) -> Any:
    import wandb

    # Pictures of tables are staged there for upload; by default in the home, which nodes may not share.
    os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb" / "data").absolute()))
    record = run_dir / _RUN_ID
    if not record.exists():
        write_atomically(record, secrets.token_hex(4).encode())
    run = wandb.init(
        project=config.track.project,
        entity=config.track.entity,
        group=config.track.group,
        tags=config.track.tags,
        name=config.name,
        id=record.read_text().strip(),
        resume="allow",
        mode=mode,
        dir=str(run_dir),
        config={**config.model_dump(mode="json"), **about},
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    return run
