"""Where a run starts: the directory with its first weights and its tokenizer, made on the spot for a new
model.

In: the configuration. Out: `Origin`. For `model.path` nothing is copied. For `model.config`, RUN/init gets a
directory in the published layout with weights drawn from the seed and, without `model.tokenizer`, a tokenizer
trained on the train split. Called by the train loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.config import RunConfig
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import init_random_checkpoint, load_config
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.processor.tokenizer import load_tokenizer, train_tokenizer
from shards.format import BadInputError, read_index

INIT = "init"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Origin:
    """model_dir: first weights in the published layout. tokenizer_dir: holds tokenizer.json."""

    model_dir: Path
    model_config: Phi3VConfig
    tokenizer_dir: Path
    tokenizer: Any


def prepare_origin(config: RunConfig, run_dir: Path, mesh: Mesh) -> Origin:
    """Makes what is missing on the main rank, then reads it on all.

    Raises BadInputError: no such directory, not a Phi-3-V checkpoint, a vocabulary smaller than the
    tokenizer.
    """
    model_dir, tokens = mesh.on_main(lambda: _make(config, run_dir))
    model_config = load_config(model_dir)
    tokenizer = load_tokenizer(tokens)
    if len(tokenizer) > model_config.vocab_size:
        raise BadInputError(
            f"{tokens}: {len(tokenizer)} tokens, more than the model's vocab_size "
            f"{model_config.vocab_size}; use the model's own tokenizer"
        )
    return Origin(model_dir, model_config, tokens, tokenizer)


def model_config_of(config: RunConfig) -> Phi3VConfig:
    """The sizes of the model before anything is there: of model.path if it exists, else as published."""
    if config.model.config is not None:
        return Phi3VConfig(**{"pad_token_id": None, **config.model.config})
    assert config.model.path is not None
    if (Path(config.model.path) / "config.json").exists():
        return load_config(config.model.path)
    return Phi3VConfig()


def _make(config: RunConfig, run_dir: Path) -> tuple[Path, Path]:
    """(model_dir, tokenizer_dir), made where they are missing."""
    tokens = tokenizer_dir(config, run_dir)
    if config.model.path is not None:
        load_config(config.model.path)
        load_tokenizer(tokens)
        return Path(config.model.path), tokens
    if not (run_dir / INIT / "config.json").exists():
        init_random_checkpoint(
            _new_config(config.model.config or {}, load_tokenizer(tokens)),
            run_dir / INIT,
            seed=config.seed,
            dtype=torch.float32,
            num_crops=config.data.num_crops,
            tokenizer_dir=tokens,
        )
    return run_dir / INIT, tokens


def tokenizer_dir(config: RunConfig, run_dir: Path) -> Path:
    """The directory of the run's tokenizer; trained there, into RUN/tokenizer, if the run brings none."""
    if config.model.tokenizer is not None:
        return Path(config.model.tokenizer)
    if config.model.path is not None:
        return Path(config.model.path)
    made = run_dir / TOKENIZER
    if not (made / "tokenizer_config.json").exists():
        indices = [read_index(path, config.data.train_split, ["messages"]) for path in config.data.paths]
        texts = (m["content"] for i in indices for messages in i["messages"].to_pylist() for m in messages)
        vocab_size = int((config.model.config or {}).get("vocab_size", 1024))
        train_tokenizer(texts, made, vocab_size)
    return made


def _new_config(fields: dict[str, Any], tokenizer: Any) -> Phi3VConfig:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|end|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        return Phi3VConfig(**{**ids, **fields})
    except (TypeError, ValueError) as error:
        raise BadInputError(f"model.config: {' '.join(str(error).split())}") from error
