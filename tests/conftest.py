"""What holds for every test, and the fixtures that several packages share.

Markers are exceptions: `ranks` for tests that start training ranks (torchrun), `system` for those that need
system packages, a browser or root. `--fast` (make test-fast) leaves both out; tests/guard holds that the rest
start neither. A test may skip only for a reason in SKIPS; any other skip is a failure.
"""

import logging
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import tests.guard.sitecustomize as guard
from shards.build import BuildOptions, build
from shards.sample import make_catalogue

# Tests of several processes, and Slurm's beside them, share few cores: threads that wait for each other would
# spin. What the tests start inherits it.
os.environ["OMP_NUM_THREADS"] = "1"
# The processes that tests start import tests/guard/sitecustomize.py.
GUARD = str(Path(guard.__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join([GUARD, *filter(None, [os.environ.get("PYTHONPATH")])])

SKIPS = {
    "system package": "Slurm, munge, Chromium, compiler or root missing; PHI3V_REQUIRE_SYSTEM=1 forbids it",
    "kubectl": "kubectl is missing; no distribution has it, so nothing requires it",
    "on request": "takes many minutes; an environment variable asks for it",
}
"""Why a test marked `system` may skip: the beginning of the text of the skip, up to a colon."""

# Files that take longest, longest first: workers that get them first finish together (see together.py).
LONGEST = (
    "tests/train/test_faults.py",
    "tests/train/test_train.py",
    "tests/train/test_planted_faults.py",
    "tests/parallel/test_parity.py",
    "tests/data/test_damage.py",
    "tests/test_docs.py",
    "tests/k8s/test_pods.py",
    "tests/launch/test_node.py",
    "tests/launch/test_demo.py",
    "tests/train/test_lora_runs.py",
    "tests/parallel/test_sequence_runs.py",
    "tests/tracking/test_tracker.py",
    "tests/engine/test_zero.py",
    "tests/evaluation/test_evaluate.py",
    "tests/fuzz/test_fuzz.py",
    "tests/launch/test_cli.py",
    "tests/shards/test_build.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out tests marked `ranks` or `system`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest files first; with --fast the marked tests are left out."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))
    if config.getoption("--fast"):
        slow = [item for item in items if _marked(item)]
        counts = {"fast": len(items) - len(slow), "all": len(items)}
        config.stash[COUNTS] = counts
        if hasattr(config, "workeroutput"):  # the controller of pytest-xdist collects nothing itself
            config.workeroutput["counts"] = counts
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not _marked(item)]


COUNTS = pytest.StashKey[dict[str, int]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if "counts" in getattr(node, "workeroutput", {}):
        node.config.stash[COUNTS] = node.workeroutput["counts"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if COUNTS in config.stash:
        counts = config.stash[COUNTS]
        terminalreporter.write_line(f"test-fast: {counts['fast']} of {counts['all']} tests")


def _marked(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) is not None for name in ("ranks", "system"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Around an unmarked test the audit hook of tests/guard refuses ranks, Slurm and browsers."""
    if _marked(item):
        return (yield)
    with tempfile.NamedTemporaryFile(prefix="phi3v-unmarked-") as notes:
        os.environ[guard.UNMARKED] = notes.name
        try:
            return (yield)
        finally:
            os.environ.pop(guard.UNMARKED, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport | None]:
    """A skip without a known reason fails, and so does an unmarked test that started what needs a marker."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        problem = _fault_of_skip(item, text.removeprefix("Skipped: "))
        if problem:
            report.outcome, report.longrepr = "failed", f"{item.nodeid}: {problem}"
    notes = os.environ.get(guard.UNMARKED)
    if notes and not report.failed and (text := Path(notes).read_text()):
        report.outcome, report.longrepr = "failed", f"{item.nodeid}: {text}"
        Path(notes).write_text("")  # once a test
    return report


def _fault_of_skip(item: pytest.Item, text: str) -> str | None:
    reason = text.partition(":")[0]
    if reason not in SKIPS:
        return f"skipped for a reason that conftest.py does not know ({', '.join(SKIPS)}): {text}"
    if item.get_closest_marker("system") is None:
        return f"skipped without the marker `system`: {text}"
    if reason == "system package" and os.environ.get("PHI3V_REQUIRE_SYSTEM") == "1":
        return f"skipped, but PHI3V_REQUIRE_SYSTEM=1: {text}"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[pytest.CollectReport]:
    """A file that skips as a whole would take its tests out of sight."""
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"{collector.nodeid} skips as a whole: {report.longrepr}"
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
        pytest.skip(f"system package: cannot mount a small disk here: {mounted.stderr.strip()}")
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
