"""Where a run starts: a directory with its first weights, and one with its tokenizer.

In: the configuration. Out: `Pretrained`. With `model.path` both are that directory, and nothing is copied.
With `model.config` random weights are written to RUN/init in the published layout and, without
`model.tokenizer`, a tokenizer that is trained on the train split to RUN/tokenizer. Each of these directories
records what it was made from, and is made again when that has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig

from phi3v_dist.config import RunConfig
from phi3v_dist.data.prepare import data_fingerprint
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import init_random_checkpoint, load_config
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.processor.tokenizer import load_tokenizer, train_tokenizer
from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.common.nearest import did_you_mean
from shards.common.text import one_line
from shards.format.index import read_index

INIT = "init"
TOKENIZER = "tokenizer"
_MADE_OF = "made-of.json"  # written last


@dataclass(frozen=True)
class Pretrained:
    """model_dir: the first weights, in the published layout. tokenizer_dir: holds tokenizer.json."""

    model_dir: Path
    model_config: Phi3VConfig
    tokenizer_dir: Path
    tokenizer: Any


def prepare_pretrained(config: RunConfig, run_dir: Path, mesh: Mesh) -> Pretrained:
    """Makes on the main rank what is missing, then reads it on every rank. All ranks call it.

    Raises BadInputError on every rank if a directory is missing or not a Phi-3-V checkpoint, or if the
    tokenizer has more tokens than the model.
    """
    model_dir, tokens = mesh.on_main(lambda: _make(config, run_dir))
    return mesh.everywhere(lambda: _read(model_dir, tokens))


def _read(model_dir: Path, tokens: Path) -> Pretrained:
    model_config = load_config(model_dir)
    tokenizer = load_tokenizer(tokens)
    if len(tokenizer) > model_config.vocab_size:
        raise BadInputError(
            f"{tokens}: {len(tokenizer)} tokens, more than the model's vocab_size "
            f"{model_config.vocab_size}; use the model's own tokenizer"
        )
    return Pretrained(model_dir, model_config, tokens, tokenizer)


def model_config_of(config: RunConfig) -> Phi3VConfig:
    """The model's configuration before `prepare_pretrained`: of model.config, or of model.path; as published
    if that directory does not exist.
    """
    if config.model.config is not None:
        return _new_config(config.model.config, pad_token_id=None)
    assert config.model.path is not None
    if (Path(config.model.path) / "config.json").exists():
        return load_config(config.model.path)
    return Phi3VConfig()


def _make(config: RunConfig, run_dir: Path) -> tuple[Path, Path]:
    """(model_dir, tokenizer_dir); what is missing is made first."""
    tokens = tokenizer_dir(config, run_dir)
    if config.model.path is not None:
        load_config(config.model.path)
        load_tokenizer(tokens)
        return Path(config.model.path), tokens
    made, tokenizer = run_dir / INIT, load_tokenizer(tokens)
    new = _new_config(
        config.model.config or {},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    of = {
        "config": new.to_dict(),
        "seed": config.seed,
        "num_crops": config.data.num_crops,
        "tokenizer": hashlib.sha256((tokens / "tokenizer.json").read_bytes()).hexdigest(),
    }
    if not _is_made(made, of):
        shutil.rmtree(made, ignore_errors=True)
        init_random_checkpoint(
            new,
            made,
            config.seed,
            dtype=torch.float32,
            num_crops=config.data.num_crops,
            tokenizer_dir=tokens,
        )
        _note_made(made, of)
    return made, tokens


def tokenizer_dir(config: RunConfig, run_dir: Path) -> Path:
    """The directory of the run's tokenizer. If `config` names none, it is trained into RUN/tokenizer."""
    if config.model.tokenizer is not None:
        return Path(config.model.tokenizer)
    if config.model.path is not None:
        return Path(config.model.path)
    made = run_dir / TOKENIZER
    vocab_size = int((config.model.config or {}).get("vocab_size", 1024))
    of = {"data": data_fingerprint(config), "split": config.data.train_split, "vocab_size": vocab_size}
    if not _is_made(made, of):
        indices = [read_index(path, config.data.train_split, ["messages"]) for path in config.data.paths]
        texts = (m["content"] for i in indices for messages in i["messages"].to_pylist() for m in messages)
        shutil.rmtree(made, ignore_errors=True)
        train_tokenizer(texts, made, vocab_size)
        _note_made(made, of)
    return made


def _is_made(directory: Path, of: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((directory / _MADE_OF).read_text()) == json.loads(json.dumps(of)))
    except (OSError, ValueError):
        return False


def _note_made(directory: Path, of: dict[str, Any]) -> None:
    write_atomically(directory / _MADE_OF, (json.dumps(of, indent=1) + "\n").encode())


def _new_config(fields: dict[str, Any], **defaults: int | None) -> Phi3VConfig:
    """The configuration in model.config. Raises BadInputError, also for an unknown key."""
    clip = fields.get("clip_vision_config")
    _check_keys(fields, Phi3VConfig, "model.config")
    if isinstance(clip, dict):
        _check_keys(clip, CLIPVisionConfig, "model.config.clip_vision_config")
    try:
        return Phi3VConfig(**{**defaults, **fields})
    except (TypeError, ValueError) as error:
        raise BadInputError(f"model.config: {one_line(error)}") from error


def _check_keys(found: dict[str, Any], kind: type, where: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in found:
        if key not in known:
            raise BadInputError(f"unknown key {where}.{key}; {did_you_mean(key, known, otherwise='it has')}")
