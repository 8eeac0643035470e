"""The commands of `phi3v shards`."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from launch.cli.shards import app
from shards.common.errors import BadInputError


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_from_a_drawn_catalogue_to_a_verified_dataset(tmp_path: Path) -> None:
    catalogue, out = tmp_path / "catalogue", tmp_path / "out"
    made = run("sample", "--rows", 30, "--seed", 1, "--out", catalogue)
    assert made.exit_code == 0 and made.stdout == f"{catalogue / 'products.csv'}: 30 products\n"
    built = run(
        "build", catalogue / "products.csv", "--out", out, "--serve-dir", catalogue, "--val-fraction", 0.3
    )
    assert built.exit_code == 0 and f"{out}: 30 samples in 2 shards" in built.stdout, built.stderr
    good = run("verify", out, "--full")
    assert good.exit_code == 0 and "30 images (30 decoded)" in good.stdout
    seen = run("inspect", out)
    assert seen.exit_code == 0 and "images per sample: 1: 30" in seen.stdout
    for name in ("index", "ledger", "build.json", "dataset.json"):
        (out / name).rename(tmp_path / name)
    indexed = run("index", out, "--group-by", "product_code")
    assert indexed.exit_code == 0 and "30 samples" in indexed.stdout, indexed.stderr
    with (out / "shard-000000.tar").open("r+b") as tar:
        tar.write(b"x")
    bad = run("verify", out)
    assert bad.exit_code == 4 and "its sha256 is not that of dataset.json" in bad.stdout


def test_a_recipe_and_tasks(tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text("group_by: product_code\nmin_success: 1\n")
    table = tmp_path / "catalogue/products.csv"
    assert run("sample", "--rows", 9, "--out", table.parent).exit_code == 0
    for task in ("0/2", "1/2"):
        done = run("build", table, "--out", out, "--recipe", recipe, "--task", task)
        assert done.exit_code == 0 and f"task {task} is done" in done.stdout, done.stderr
    closed = run("verify", out)
    assert closed.exit_code == 0 and "good: " in closed.stdout, closed.stderr
    assert run("build", table, "--out", out, "--recipe", recipe, "--retry-failed").exit_code == 0


def test_the_catalogue_is_served_until_interrupted(tmp_path: Path) -> None:
    code = "from launch.cli.shards import app; app()"
    command = [sys.executable, "-c", code, "sample", "--rows", "2", "--out", str(tmp_path), "--serve"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell's background job ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        url = process.stdout.readline().split(" at ")[1].split()[0]
        assert urllib.request.urlopen(f"{url}/products.csv").read().startswith(b"product_code,")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
    process.stdout.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "TABLE", "--out", "OUT/o"], "no such file"),
        (["build", "TABLE"], "--out is missing"),
        (["build", "--out", "OUT/o"], "SOURCE .and no recipe that names one. is missing"),
        (["build", "TABLE", "--out", "OUT/o", "--task", "1"], "--task 1: must be I/N, such as 0/8"),
        (["build", "TABLE", "--out", "OUT/o", "--task", "0/2", "--retry-failed"], "first close the dataset"),
        (["build", "TABLE", "--out", "OUT/o", "--recipe", "none"], "none: no such recipe"),
        (["verify", "OUT"], "no dataset.json, so the dataset is incomplete"),
        (["inspect", "OUT"], "no dataset.json, so the dataset is incomplete"),
        (["index", "OUT"], "no .tar files to index"),
    ],
)
def test_faults_of_the_input_leave_as_bad_input_errors(
    tmp_path: Path, words: list[str], message: str
) -> None:
    failed = run(
        *(word.replace("OUT", str(tmp_path)).replace("TABLE", f"{tmp_path}/no.csv") for word in words)
    )
    assert isinstance(failed.exception, BadInputError)
    with pytest.raises(BadInputError, match=message):
        raise failed.exception
