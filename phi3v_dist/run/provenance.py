"""What made a run: code, data, configuration, versions, the job. For checkpoints, W&B and exported models.

In: the configuration, the fingerprint of the data. Out: a dict of plain values without secrets.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phi3v_dist import __version__
from phi3v_dist.config import RunConfig, config_json
from phi3v_dist.engine.package import PACKAGE

_JOB = (  # names of variables that say which job of a scheduler this is
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST",
    "SLURM_CLUSTER_NAME", "SLURM_JOB_PARTITION", "KUBERNETES_SERVICE_HOST", "POD_NAME", "POD_NAMESPACE",
    "JOB_NAME", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip


def provenance(config: RunConfig, data_fingerprint: str) -> dict[str, Any]:
    """config, digests of config and data, git commit, versions, job identifiers, host."""
    return {
        "config": config.model_dump(mode="json"),
        "config_digest": hashlib.sha256(config_json(config).encode()).hexdigest()[:16],
        "data_fingerprint": data_fingerprint,
        "git": git_state(),
        "versions": versions(),
        "job": {name: os.environ[name] for name in _JOB if name in os.environ},
        "host": socket.gethostname(),
    }


def versions() -> dict[str, str]:
    """Versions of this program and of what decides its numbers."""
    return {
        "phi3v-dist": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", PACKAGE)},
    }


def git_state() -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout that this code lies in; nulls outside one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if commit is None or git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
