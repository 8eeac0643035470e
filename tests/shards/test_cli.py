"""The commands of `phi3v shards`, in processes of their own."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

CALL = [sys.executable, "-c", "from launch.cli_shards import app; app()"]
ENVIRONMENT = {**os.environ, "COLUMNS": "200"}


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*CALL, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)


def test_from_a_drawn_catalogue_to_a_verified_dataset(tmp_path: Path) -> None:
    catalogue, out = tmp_path / "catalogue", tmp_path / "out"
    made = run("sample", "--rows", 30, "--seed", 1, "--out", catalogue)
    assert made.returncode == 0 and made.stdout == f"{catalogue / 'products.csv'}: 30 products\n"
    built = run(
        "build", catalogue / "products.csv", "--out", out, "--serve-dir", catalogue, "--val-fraction", 0.3
    )
    assert built.returncode == 0 and f"{out}: 30 samples in 2 shards" in built.stdout, built.stderr
    good = run("verify", out, "--full")
    assert good.returncode == 0 and "30 images (30 decoded)" in good.stdout
    seen = run("inspect", out)
    assert seen.returncode == 0 and "images per sample: 1: 30" in seen.stdout
    for name in ("index", "ledger", "build.json", "dataset.json"):
        (out / name).rename(tmp_path / name)
    indexed = run("index", out, "--group-by", "product_code")
    assert indexed.returncode == 0 and "30 samples" in indexed.stdout, indexed.stderr
    with (out / "shard-000000.tar").open("r+b") as tar:
        tar.write(b"x")
    bad = run("verify", out)
    assert bad.returncode == 4 and "its sha256 is not that of dataset.json" in bad.stdout


def test_the_catalogue_is_served_until_interrupted(tmp_path: Path) -> None:
    command = [*CALL, "sample", "--rows", "2", "--out", str(tmp_path), "--serve"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    process.stdout.readline()
    url = process.stdout.readline().split(" at ")[1].split()[0]
    assert urllib.request.urlopen(f"{url}/products.csv").read().startswith(b"product_code,")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    process.stdout.close()


def test_faults_of_the_input_leave_as_bad_input_errors(tmp_path: Path) -> None:
    for words in (
        ["build", tmp_path / "no.csv", "--out", tmp_path / "o"],
        ["verify", tmp_path],
        ["inspect", tmp_path],
    ):
        failed = run(*words)
        assert failed.returncode != 0 and "BadInputError" in failed.stderr
