"""The test cluster as fixtures: started once for all tests, its queue empty before and after each."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.slurm_cluster import NEEDED, SlurmCluster


@pytest.fixture(scope="session")
def slurm_daemons() -> Iterator[SlurmCluster]:
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"system package: no {', '.join(missing)}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("system package: the test cluster's daemons need root")
    # Not pytest's directory: munged runs as another user and must reach its socket.
    directory = Path(tempfile.mkdtemp(prefix="phi3v-slurm-"))
    directory.chmod(0o755)
    cluster = SlurmCluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        monkeypatch.undo()


@pytest.fixture
def cluster(slurm_daemons: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster with an empty queue, before and after."""
    yield slurm_daemons
    slurm_daemons.clear()
