"""A trained model as others load it: a directory in the published layout, checked by loading it again.

In: a run, a checkpoint or a model directory. Out: safetensors with the official names, config, tokenizer,
preprocessor and generation config, and README.md that says where it comes from. One tensor at a time is in
memory beside the shard being written. Called by `phi3v export`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from phi3v_dist import __version__, checkpoint
from phi3v_dist.model.hub import write_hub_directory
from phi3v_dist.restore import Source, model_config
from shards.atomic import write_atomically
from shards.format import BadInputError

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export(source: Source, out: Path, dtype: str | None = None, max_shard_bytes: int = 5_000_000_000) -> Path:
    """Writes `source`, a checkpoint, to the directory `out`; returns it.

    dtype: "bfloat16" or "float32"; None: the one that the run trained in. Raises BadInputError if `source` is
    no checkpoint or `out` holds something.
    """
    if not source.is_checkpoint:
        raise BadInputError(
            f"{source.directory}: is a model directory already; export takes a run or a checkpoint"
        )
    if out.exists() and any(out.iterdir()):
        raise BadInputError(f"{out}: is not empty; choose another directory or remove it")
    meta = checkpoint.read_meta(source.directory)
    trained_in = meta["run"]["config"]["model"]["dtype"]
    write_hub_directory(
        out,
        model_config(source),
        checkpoint.read_tensors(source.directory),
        _DTYPES[dtype or trained_in],
        max_shard_bytes=max_shard_bytes,
        num_crops=meta["num_crops"],
        tokenizer_dir=source.directory,
    )
    write_atomically(out / "README.md", _card(source, meta["run"]).encode())
    return out


def _card(source: Source, run: dict) -> str:
    config = run["config"]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: image-text-to-text",
            "---",
            f"# {config['name']}",
            "",
            f"Phi-3-Vision, fine-tuned with phi3v-dist {__version__}; step {source.step}.",
            "",
            f"- data: fingerprint `{run['data_fingerprint']}`, split `{config['data']['train_split']}`",
            f"- started from: `{config['model']['path'] or 'new weights'}`",
            f"- versions: {json.dumps(run['versions'])}",
            "",
            "```json",
            json.dumps(config, indent=1),
            "```",
            "",
        ]
    )
