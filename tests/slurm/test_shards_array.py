"""`sbatch --array slurm/shards.sh`: four tasks build the directory that one process builds, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shards.format.index import read_index
from shards.sample import make_catalogue
from tests.slurm.slurm_cluster import SlurmCluster, wait_for

pytestmark = pytest.mark.system

SHARDS = str(Path(__file__).resolve().parents[2] / "slurm" / "shards.sh")
PHI3V = str(Path(sys.executable).with_name("phi3v"))


def files(directory: Path) -> dict[str, bytes]:
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_four_tasks_build_what_one_process_builds(cluster: SlurmCluster, tmp_path: Path) -> None:
    make_catalogue(tmp_path / "the catalogue", 60, seed=1)
    source = str(tmp_path / "the catalogue" / "products.csv")
    options = ["--group-by", "product_code", "--shard-samples", "10"]
    together, alone = tmp_path / "built together", tmp_path / "built alone"
    environment = {"PHI3V": PHI3V}
    build = ["--array=1-4", SHARDS, source, "--out", str(together), *options]
    job = cluster.submit(*build, cwd=tmp_path, environment=environment)
    close = cluster.submit(
        f"--dependency=afterok:{job}", SHARDS, "--close", str(together), cwd=tmp_path, environment=environment
    )
    command = [PHI3V, "shards", "build", source, "--out", str(alone), *options]
    subprocess.run(command, check=True, capture_output=True)
    wait_for(lambda: cluster.state(close) in ("COMPLETED", "FAILED"), 90, "the end", cluster.logs)
    assert cluster.state(close) == "COMPLETED", cluster.output(close)
    assert read_index(str(alone)).num_rows == 60
    assert files(together) == files(alone)
