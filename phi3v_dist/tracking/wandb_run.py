"""The W&B run of a training run: a thread follows RUN/metrics.jsonl and sends every line to W&B.

In: the run directory. Out: one W&B run over all starts of the training run, with every step once. The
training loop never waits for W&B. If W&B is slow, the thread falls behind and catches up from the file. If
its service dies (Slurm's SIGTERM ends it first), it is started again. What is still missing at the end is
sent by the next start or by `phi3v report --sync`. wandb is imported inside functions, so that importing this
module is cheap.

Names of wandb that are not documented, checked with wandb 0.31.0 (pinned in pyproject.toml): the settings
`x_primary` and `x_label` in `NodeMetrics` and `start_run`, and the process name wandb-core in `_end_service`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.config import RunConfig
from phi3v_dist.run.layout import CHECKPOINTS, METRICS, RUN_ID, STEP, evaluation_dir
from phi3v_dist.tracking.predictions import read_predictions
from phi3v_dist.tracking.wandb_file import last_step
from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.common.text import first_line

FOLDER = "wandb"
_POLL_S = 1.0
_RESTARTS, _PAUSE_S = 5, 30.0  # of W&B after a failure, and seconds before each
_INIT_TIMEOUT_S = 60.0
_log = logging.getLogger(__name__)


class Mirror:
    """Sends RUN/metrics.jsonl to W&B from a thread of its own, from the constructor to `close`.

    mode: "online" or "offline". about: see `Tracker`. preempting: set it before `close` if the run will
    resume. sent: the last step that W&B has.
    """

    def __init__(self, config: RunConfig, run_dir: Path, mode: str, *, about: dict[str, Any]) -> None:
        self._config, self._run_dir, self._mode, self._about = config, run_dir, mode, about
        self._wake, self._closing = threading.Event(), threading.Event()
        self._gave_up = False
        self._exit_code = 0
        self._best_sent = _pointer(run_dir, checkpoint.BEST)
        self.preempting = False
        self.sent = 0
        self._thread = threading.Thread(target=self._follow, name="wandb", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tells the thread that there is a new line."""
        self._wake.set()

    def close(self, exit_code: int) -> None:
        """Waits until W&B has everything, at most track.close_timeout_s seconds; then gives up.

        exit_code: of the training process, for the W&B run.
        """
        self._exit_code = exit_code
        self._closing.set()
        self._wake.set()
        self._thread.join(self._config.track.close_timeout_s)
        if self._thread.is_alive():
            _log.warning(
                "after %.0f s of waiting W&B has the run only up to step %d; the rest is in %s, "
                "`phi3v report %s --sync` sends it",
                self._config.track.close_timeout_s, self.sent, self._run_dir, self._run_dir,
            )  # fmt: skip
            self._gave_up = True
            _end_service()

    def _follow(self) -> None:
        for restarts in range(_RESTARTS + 1):
            run = None
            try:
                run = start_run(self._config, self._run_dir, self._mode, about=self._about)
                self._send(run)
                return
            except Exception as error:  # nothing that W&B raises may stop training
                if self._gave_up:
                    return
                died = run is not None or isinstance(error, ConnectionError)  # else it cannot start at all
                again = died and restarts < _RESTARTS
                _log.warning(
                    "W&B failed (%s: %s); %s; the metrics are in %s",
                    type(error).__name__, first_line(error),
                    "starting it again" if again else "continuing without it", self._run_dir,
                )  # fmt: skip
                _end_service()
                if not again:
                    return
            self._closing.wait(_PAUSE_S)

    def _send(self, run: Any) -> None:
        """Sends the lines that W&B does not have, then new ones until `close`, then ends the W&B run."""
        self.sent = recorded_step(self._run_dir, run)
        place = 0
        while True:
            closing = self._closing.is_set()  # read before the file, so that the last line is not missed
            lines, place = _new_lines(self._run_dir / METRICS, place)
            for line in lines:
                if line[STEP] > self.sent:
                    run.log(line | _answers_table(self._run_dir, line))
                    self.sent = line[STEP]
            self._send_best(run)
            if closing:
                break
            self._wake.wait(_POLL_S)
            self._wake.clear()
        self._end(run)

    def _end(self, run: Any) -> None:
        last = checkpoint.pointed(self._run_dir / CHECKPOINTS, checkpoint.LATEST)
        if self._exit_code == 0 and last is not None:
            _log_model(run, self._config, last, aliases=["latest"])
        if self.preempting:
            run.mark_preempting()
        run.finish(exit_code=self._exit_code)

    def _send_best(self, run: Any) -> None:
        best = _pointer(self._run_dir, checkpoint.BEST)
        if best is None or best == self._best_sent:
            return
        target = checkpoint.best(self._run_dir / CHECKPOINTS)
        if target is not None:
            _log_model(run, self._config, target, aliases=["best"])
        self._best_sent = best


def sync(run_dir: Path) -> str:
    """Uploads what all starts of a run have recorded, in order, with `wandb sync`. Out: a line for the user.

    Raises BadInputError if nothing is recorded or `wandb sync` fails.
    """
    folders = sorted((run_dir / FOLDER).glob("*run-*-*"))
    folders = [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]
    if not folders:
        raise BadInputError(f"{run_dir}: nothing recorded for W&B ({run_dir / FOLDER} holds no run)")
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", *map(str, folders)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    except subprocess.TimeoutExpired as error:
        raise BadInputError(f"{run_dir}: `wandb sync` has not ended after {error.timeout:.0f} s") from error
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        raise BadInputError(
            f"{run_dir}: `wandb sync` failed: {lines[-1] if lines else 'no message'}; is WANDB_API_KEY set?"
        )
    return f"{run_dir}: {len(folders)} part(s) uploaded to W&B"


class NodeMetrics:
    """Records system metrics of another node, as a second writer of the same W&B run (shared mode, online).

    node: its label in W&B. `close` ends it.
    """

    def __init__(self, config: RunConfig, run_dir: Path, node: str) -> None:
        self._done = threading.Event()
        self._arguments = (config, run_dir, node)
        self._thread = threading.Thread(target=self._run, name="wandb-node", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the recording; waits at most 10 s."""
        self._done.set()
        self._thread.join(10)

    def _run(self) -> None:
        config, run_dir, node = self._arguments
        try:
            record = run_dir / RUN_ID
            while not record.exists():  # the main rank's thread writes it
                if self._done.wait(_POLL_S):
                    return
            run = _init(config, run_dir, "shared", about={}, x_primary=False, x_label=node)  # wandb 0.31.0
            self._done.wait()
            run.finish()
        except Exception as error:
            _log.warning("W&B failed (%s); no system metrics of this node", type(error).__name__)


def start_run(config: RunConfig, run_dir: Path, mode: str, *, about: dict[str, Any]) -> Any:
    """Opens the W&B run of this training run; its id is the same at every start. Out: a wandb.Run.

    mode: "online" (offline if the server cannot be reached) or "offline". Raises what wandb raises.
    """
    import wandb

    record = run_dir / RUN_ID
    if not record.exists():
        write_atomically(record, secrets.token_hex(4).encode())
    try:
        if mode == "online" and config.track.node_metrics:
            # x_ settings: wandb 0.31.0
            run = _init(config, run_dir, "shared", about=about, x_primary=True, x_label="node-0")
        else:
            run = _init(config, run_dir, mode, about=about)
    except wandb.errors.Error as error:
        if mode != "online":
            raise
        _log.warning(
            "W&B is not reached (%s: %s); recording offline, `phi3v report %s --sync` uploads it",
            type(error).__name__, first_line(error), run_dir,
        )  # fmt: skip
        run = _init(config, run_dir, "offline", about=about)
    run.define_metric(STEP, hidden=True)
    run.define_metric("*", step_metric=STEP)
    if config.eval.best_metric:
        summary = config.eval.best_mode
        run.define_metric(config.eval.best_metric, step_metric=STEP, summary=summary)
    return run


def recorded_step(run_dir: Path, run: Any) -> int:
    """The last step of this run that W&B has, on disk from any start or on the server. run: a wandb.Run."""
    on_disk = last_step(run_dir / FOLDER, (run_dir / RUN_ID).read_text().strip())
    try:
        return max(on_disk, int(run.summary.get(STEP) or 0))
    except (TypeError, ValueError):
        return on_disk


def _init(config: RunConfig, run_dir: Path, mode: str, *, about: dict[str, Any], **settings: Any) -> Any:
    import wandb

    # Images of tables are staged there for upload. The default is the home, which nodes may not share.
    os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / FOLDER / "data").absolute()))
    more = {name: value for name, value in about.items() if name != "config"}
    return wandb.init(
        project=config.track.project,
        entity=config.track.entity,
        group=config.track.group,
        tags=config.track.tags,
        name=config.track.name or config.name,
        id=(run_dir / RUN_ID).read_text().strip(),
        resume=None if mode == "shared" else "allow",
        mode=mode,  # type: ignore[arg-type]
        dir=str(run_dir),
        config={**config.model_dump(mode="json"), **more},
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=config.track.close_timeout_s,
            **settings,
        ),
    )


def _new_lines(path: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of `path` from byte `place` on, and the byte at which they end."""
    try:
        with path.open("rb") as stream:
            stream.seek(place)
            data = stream.read()
    except FileNotFoundError:
        return [], place
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], place + len(whole)


def _answers_table(run_dir: Path, line: dict[str, Any]) -> dict[str, Any]:
    """{"eval/predictions": wandb.Table} with the answers of the evaluation at this line's step; {} if there
    was none.
    """
    if not any(key.startswith("eval/") for key in line):
        return {}
    answers = read_predictions(evaluation_dir(run_dir, line[STEP]))
    if not answers:
        return {}
    import wandb
    from PIL import Image

    metrics = list(answers[0].values)
    table = wandb.Table(columns=["step", "picture", "key", "prompt", "truth", "prediction", *metrics])
    for answer in answers:
        image = None if answer.image is None else wandb.Image(Image.open(io.BytesIO(answer.image)))
        texts = (answer.key, answer.prompt, answer.truth, answer.prediction)
        table.add_data(line[STEP], image, *texts, *(answer.values[name] for name in metrics))
    return {"eval/predictions": table}


def _pointer(run_dir: Path, name: str) -> str | None:
    """The text of the pointer file `name` among the checkpoints, None if there is none."""
    try:
        return (run_dir / CHECKPOINTS / name).read_text().strip()
    except OSError:
        return None


def _log_model(run: Any, config: RunConfig, target: Path, *, aliases: list[str]) -> None:
    """Logs the checkpoint `target` as a W&B artifact, by reference or with its files, with metadata."""
    if config.track.artifacts == "none":
        return
    import wandb

    meta = checkpoint.read_meta(target)
    step = meta.progress.step
    made = meta.run
    metadata = {
        "step": step,
        "metric": config.eval.best_metric,
        "value": _value_at(target.parent.parent, step, config.eval.best_metric),
        "data_fingerprint": made.get("data_fingerprint"),
        "config_digest": made.get("config_digest"),
        "path": str(target.absolute()),
    }
    artifact = wandb.Artifact(f"{config.name}-{run.id}", type="model", metadata=metadata)
    if config.track.artifacts == "files":
        artifact.add_dir(str(target), policy="immutable")
    else:
        artifact.add_reference(target.absolute().as_uri(), checksum=False)
    run.log_artifact(artifact, aliases=[*aliases, f"step-{step}"])


def _value_at(run_dir: Path, step: int, metric: str | None) -> float | None:
    """The value of `metric` in the line of `step`, None without one."""
    lines, _ = _new_lines(run_dir / METRICS, 0)
    found = [line[metric] for line in lines if line[STEP] == step and metric in line]
    return found[-1] if found else None


def _end_service() -> None:
    """Ends the W&B service that this process started, so that the process does not wait for it at exit.

    wandb 0.31.0 has no public way to end a service that hangs: `teardown` waits for it. Its process is a
    child of ours named wandb-core.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("wandb-core" in part for part in child.cmdline()):
                child.kill()
    leaving = threading.Thread(target=_tear_down, name="wandb-end", daemon=True)
    leaving.start()
    leaving.join(5)


def _tear_down() -> None:
    """Without this, wandb 0.31.0 tears down at exit and prints a traceback because the service is gone."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()
