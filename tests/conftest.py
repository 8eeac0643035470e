"""What holds for every test: a test that needs system packages skips where they are missing, and fails
instead of skipping where PHI3V_REQUIRE_SYSTEM=1 says that they were installed (.ci/run).
"""

import logging
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from shards.build import BuildOptions, build
from shards.sample import make_catalogue

# Tests of several processes, and Slurm's beside them, share few cores: threads that wait for each other would
# spin. What the tests start inherits it.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport | None]:
    report = yield
    must_run = os.environ.get("PHI3V_REQUIRE_SYSTEM") == "1" and item.get_closest_marker("system") is not None
    if must_run and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped, but PHI3V_REQUIRE_SYSTEM=1: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 60 drawn products, train and val; read only."""
    root = tmp_path_factory.mktemp("products")
    make_catalogue(root / "catalogue", 60, seed=1)
    options = BuildOptions(group_by="product_code", shard_samples=25)
    build(str(root / "catalogue/products.csv"), str(root / "shards"), options)
    return root / "shards"


def tiny_tree(products: Path, runs: Path) -> dict[str, Any]:
    """configs/tiny.yaml, smaller still, on `products`; the run is called tiny."""
    tree: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "configs/tiny.yaml").read_text())
    tree["name"], tree["runs_dir"] = "tiny", str(runs)
    tree["model"]["config"] |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    factors = tree["model"]["config"]["rope_scaling"]
    tree["model"]["config"]["rope_scaling"] = {
        k: v[:8] if isinstance(v, list) else v for k, v in factors.items()
    }
    tree["model"]["config"]["clip_vision_config"] |= {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
    }
    tree["data"] |= {"path": str(products), "seq_len": 256}
    tree["train"] |= {"steps": 6, "warmup_steps": 2}
    tree["checkpoint"] = {"every_steps": 3}
    tree["eval"] |= {"every_steps": 0, "loss_samples": 6, "generate_samples": 3, "max_new_tokens": 8}
    tree["track"] = {"log_every": 1, "mode": "disabled"}
    return tree


@pytest.fixture
def tiny_config(products: Path, tmp_path: Path) -> Path:
    """`tiny_tree` as a file; its run directory is tmp_path/runs/tiny."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(products, tmp_path / "runs")))
    return file


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 64 MB, that can be filled up; for tests marked `system`, as it needs root."""
    place = tmp_path / "small disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server on loopback (moto)."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, as a URL: s3://NAME. Keys and endpoint are in the environment, so that processes
    that a test starts reach it too; no network but loopback."""
    import fsspec

    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    filesystem.mkdir(bucket)
    yield f"s3://{bucket}"
    filesystem.rm(bucket, recursive=True)
    type(filesystem).clear_instance_cache()
