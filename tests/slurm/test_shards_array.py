"""`sbatch --array slurm/shards.sh`: the samples of four tasks are those that one process builds, byte for
byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shards.format import read_index
from shards.sample import make_catalogue
from tests.slurm.slurm_cluster import SlurmCluster, wait_for

pytestmark = pytest.mark.system

SHARDS = str(Path(__file__).resolve().parents[2] / "slurm" / "shards.sh")
PHI3V = str(Path(sys.executable).with_name("phi3v"))


def samples(directory: Path) -> dict[str, tuple[str, str, bytes]]:
    """Key -> split, meta and the bytes of all members in the tar."""
    found = {}
    for row in read_index(str(directory)).to_pylist():
        with (directory / row["shard"]).open("rb") as stream:
            stream.seek(row["offset"])
            found[row["key"]] = (row["split"], row["meta"], stream.read(row["length"]))
    return found


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
    assert len(samples(alone)) == 60
    assert samples(together) == samples(alone)
