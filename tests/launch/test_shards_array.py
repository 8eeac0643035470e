"""`phi3v launch shards`: the batch script, and what reaches sbatch and runs in the jobs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli.main import app
from launch.shards_array import ArraySize, ShardsTask, launch_shards
from shards.common.errors import BadInputError
from shards.format.index import read_index
from shards.sample import make_catalogue
from shards.verify import verify

SBATCH = """#!/bin/bash
echo "$@" >> "{log}"
cp "${{@: -1}}" "{log}.$(wc -l < "{log}")"
echo "Submitted batch job $((40 + $(wc -l < "{log}")))"
"""


def test_the_batch_script_is_an_array_that_requeues(tmp_path: Path) -> None:
    words = [
        "launch",
        "shards",
        "table.csv",
        "--out",
        "data",
        "--tasks",
        "16",
        "--cpus",
        "4",
        "--minutes",
        "60",
    ]
    words += ["--logs", str(tmp_path), "--partition", "cpu", "--group-by", "code", "--print"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    for line in ("--array=0-15%16", "--cpus-per-task=4", "--time=60", "--partition=cpu", "--requeue"):
        assert f"#SBATCH {line}" in shown.output
    assert re.search(r"#SBATCH --signal=USR2@\d+", shown.output) or "#SBATCH --signal=USR1@" in shown.output


def test_the_array_and_the_closing_job_are_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for sbatch keeps what it is given; submitit's own files say what the jobs will run."""
    from submitit.core.utils import DelayedSubmission

    bin_dir, log = tmp_path / "bin", tmp_path / "sbatch.log"
    bin_dir.mkdir()
    for name, text in (("sbatch", SBATCH.format(log=log)), ("srun", "#!/bin/bash\n")):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:/usr/bin:/bin")
    source, out = make_catalogue(tmp_path / "catalogue", 24, seed=3), tmp_path / "out"
    options = ["--group-by", "product_code", "--shard-samples", "5"]
    assert launch_shards(str(source), str(out), options, size=ArraySize(3), logs=str(tmp_path / "logs")) == 0
    said = capsys.readouterr().out
    assert "job 41: 3 tasks" in said and "job 42: then closes" in said
    assert "--array=0-2%3" in Path(f"{log}.1").read_text()
    assert "--dependency=afterok:41" in Path(f"{log}.2").read_text()
    pickles = [*sorted((tmp_path / "logs").glob("41_*_submitted.pkl")), tmp_path / "logs/42_submitted.pkl"]
    assert len(pickles) == 4
    for pickle in pickles:
        DelayedSubmission.load(pickle).result()
    assert read_index(str(out)).num_rows == 24 and verify(str(out), decode=1).faults == ()


def test_a_task_that_fails_is_a_failed_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task = ShardsTask(("shards", "build", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out")))
    with pytest.raises(RuntimeError, match="phi3v shards build ended with exit code 2"):
        task()
    assert "none.csv: no such file" in capfd.readouterr().err
    assert task.checkpoint().function == task


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tasks", "0"], "0 tasks"),
        (["--task", "0/2"], "--task is not for"),
        (["--gruop-by", "code"], "No such option: --gruop-by"),
        (["--shard-samples", "many"], "shard-samples"),
        (["--minutes", "2"], "leaves no time to build"),
        ([], "no sbatch on the PATH"),
    ],
)
def test_what_cannot_be_submitted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["launch", "shards", "t.csv", "--out", "out", "--logs", str(tmp_path / "logs"), *more]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, BadInputError) and words in str(refused.exception)
