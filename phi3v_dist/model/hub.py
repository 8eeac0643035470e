"""Checkpoints in the published layout: build a model without weights, load weights, write weights.

A hub directory holds config.json, safetensors (one file, or several with an index), generation_config.json,
preprocessor_config.json and the files of the tokenizer. Loading is strict and reads only what is needed:
under ZeRO-3 each rank reads its own slice of every tensor. Writing takes one tensor at a time and is atomic.
`from_pretrained` and `save_pretrained` of the model read and write the same files.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import __version__ as transformers_version
from transformers import initialization

from phi3v_dist.engine.partition import Partition, fill_slice, full_shape, is_partitioned
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.modeling import EMBEDDING_ALIAS, Phi3VForCausalLM
from phi3v_dist.processor.geometry import tile_side_tokens
from phi3v_dist.processor.preprocessor_config import write_preprocessor_config
from phi3v_dist.processor.tokenizer import load_tokenizer, save_tokenizer_config
from shards.common.errors import BadInputError
from shards.common.text import one_line

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
DEFAULT_SHARD_BYTES = 5_000_000_000


def load_config(directory: str | Path) -> Phi3VConfig:
    """The config of a checkpoint directory. Raises BadInputError if there is none, or not one of Phi-3-V."""
    file = Path(directory) / CONFIG
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError:
        raise BadInputError(f"{directory}: no {CONFIG}; give the directory of a Phi-3-V checkpoint") from None
    except (OSError, json.JSONDecodeError) as error:
        raise BadInputError(f"{file}: not readable as JSON ({error}); download it again") from error
    try:
        return Phi3VConfig.from_dict({"model_type": None, **fields})
    except BadInputError as error:
        raise BadInputError(f"{file}: {error}") from error
    except (TypeError, ValueError) as error:
        raise BadInputError(f"{file}: {one_line(error)}") from error


def build_model(config: Phi3VConfig, dtype: torch.dtype) -> Phi3VForCausalLM:
    """A model with uninitialised weights of `dtype`; its RoPE frequencies are float32 in any case.

    Within `engine.zero.partitioned_parameters` each weight is partitioned as soon as it exists.
    """
    before = torch.get_default_dtype()
    with initialization.no_init_weights():
        torch.set_default_dtype(dtype)
        try:
            return Phi3VForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


def load_weights(model: Phi3VForCausalLM, directory: str | Path) -> None:
    """Fills `model` from the safetensors of `directory`, bit for bit or cast to the dtype of the model.

    Of parameters that ZeRO-3 has partitioned only this rank's slice is read. Raises BadInputError naming the
    tensor or file if one is missing, unexpected, of another shape, or truncated.
    """
    directory = Path(directory)
    files = checkpoint_files(directory)
    parameters = dict(model.named_parameters())
    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in files:
            opened = stack.enter_context(_opened(file))
            for name in opened.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                if name in where:
                    raise BadInputError(
                        f"{directory}: tensor {name} is in two files; remove the outdated one"
                    )
                where[name] = opened
        _check_names(directory, set(where) - {EMBEDDING_ALIAS}, set(parameters))
        for name, parameter in parameters.items():
            shape = tuple(where[name].get_slice(name).get_shape())
            expected = full_shape(parameter)
            if shape != expected:
                raise BadInputError(
                    f"{directory}: tensor {name} has shape {list(shape)}, config.json asks for "
                    f"{list(expected)}; config and weights are of different models"
                )
        with torch.no_grad():
            for name, parameter in parameters.items():
                if is_partitioned(parameter):
                    fill_slice(parameter, partial(_read_slice, where[name], name))
                else:
                    parameter.copy_(where[name].get_tensor(name))


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises BadInputError if there are none, or one is missing."""
    if (directory / INDEX).exists():
        try:
            names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise BadInputError(
                f"{directory / INDEX}: not a safetensors index ({error!r}); download it again"
            ) from error
        for name in names:
            if not (directory / name).exists():
                raise BadInputError(f"{directory}: {INDEX} names {name}, which is not there; download it too")
        return [directory / name for name in names]
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    raise BadInputError(
        f"{directory}: neither {SINGLE} nor {INDEX}; give a directory with safetensors weights"
    )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The open file. Raises BadInputError if it is damaged."""
    try:
        opened = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise BadInputError(
            f"{file}: truncated or not safetensors ({os.path.getsize(file)} bytes; {error}); download again"
        ) from error
    with opened as handle:
        yield handle


def _check_names(directory: Path, found: set[str], expected: set[str]) -> None:
    """Raises BadInputError unless exactly the `expected` tensors were found."""
    for names, what, cause in (
        (expected - found, "is missing", "the checkpoint is incomplete or of another model"),
        (found - expected, "is unexpected", "the checkpoint is of another model, or config.json is"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise BadInputError(f"{directory}: tensor {min(names)} {what}{more}; {cause}")


def _read_slice(opened: Any, name: str, partition: Partition) -> torch.Tensor:
    """The real elements of a rank's slice of a stored tensor, [count].

    Reads only those entries along the first dimension that hold them: safetensors reads no smaller parts.
    """
    view = opened.get_slice(name)
    shape = view.get_shape()
    width = math.prod(shape[1:])  # elements of an entry along the first dimension
    first, last = partition.start // width, -(-partition.stop // width)
    found: torch.Tensor = view[first:last].reshape(-1)
    return found[partition.start - first * width : partition.stop - first * width]


def init_random_checkpoint(
    config: Phi3VConfig,
    directory: str | Path,
    seed: int,
    *,
    dtype: torch.dtype,
    num_crops: int = 16,
    tokenizer_dir: str | Path | None = None,
) -> None:
    """Writes a hub directory with random weights: the initialisation of transformers, reproducible by `seed`.

    tokenizer_dir: where tokenizer.json is; None if it is in `directory` already. Raises BadInputError if
    `directory` holds a model already.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Phi3VForCausalLM(config)
    write_hub_directory(
        directory,
        config,
        model.named_parameters(),
        dtype=dtype,
        num_crops=num_crops,
        tokenizer_dir=directory if tokenizer_dir is None else tokenizer_dir,
    )


def write_hub_directory(
    out: str | Path,
    config: Phi3VConfig,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_crops: int = 16,
    tokenizer_dir: str | Path,
) -> None:
    """Writes a hub directory: `out` is complete at the end, or not written at all.

    named_tensors: all tensors of the model in any order, taken one at a time. max_shard_bytes: the size of a
    weight file, and so of the memory that is needed. `out` may exist and hold a tokenizer. Raises
    BadInputError if it holds a model already, or if a tensor is missing, unexpected or of another shape.
    """
    out = Path(out)
    if (out / CONFIG).exists() or (out / SINGLE).exists() or (out / INDEX).exists():
        raise BadInputError(f"{out}: holds a model already; choose another directory, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_weights(staging, config, named_tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)
        _write_configs(staging, config, Path(tokenizer_dir), dtype=dtype, num_crops=num_crops)
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def expected_shapes(config: Phi3VConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint, without memory for them."""
    with torch.device("meta"), initialization.no_init_weights():
        model = Phi3VForCausalLM(copy.deepcopy(config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _write_weights(
    directory: Path,
    config: Phi3VConfig,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Writes the weights: one file, or several and their index. Raises BadInputError."""
    expected = expected_shapes(config)
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    held = 0
    total = 0

    def flush() -> None:
        save_file(pending, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(sorted(pending))
        pending.clear()

    written: set[str] = set()
    for name, tensor in named_tensors:
        if name not in expected or name in written:
            raise BadInputError(
                f"tensor {name} is {'given twice' if name in written else 'not one of Phi-3-V'}"
            )
        if tuple(tensor.shape) != expected[name]:
            raise BadInputError(
                f"tensor {name} has shape {list(tensor.shape)}, the config asks for {list(expected[name])}"
            )
        # A copy, because the caller may free or reuse a tensor before the file is written.
        kept = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        size = kept.numel() * kept.element_size()
        if pending and held + size > max_shard_bytes:
            flush()
            held = 0
        pending[name] = kept
        written.add(name)
        held += size
        total += size
    _check_names(directory, written, set(expected))
    flush()
    if len(shards) == 1:
        (directory / "part-0").rename(directory / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_configs(
    directory: Path, config: Phi3VConfig, source: Path, *, dtype: torch.dtype, num_crops: int
) -> None:
    tokenizer = load_tokenizer(source)
    config = copy.deepcopy(config)
    config.dtype = dtype
    (directory / CONFIG).write_text(config.to_json_string())
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        # Turns end with these; the model never generates </s>, which config.json names.
        "eos_token_id": [tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|endoftext|>")],
        "pad_token_id": tokenizer.pad_token_id,
        "transformers_version": transformers_version,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_preprocessor_config(directory, num_crops, tile_side_tokens(config.tile) ** 2)
    save_tokenizer_config(directory)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def _publish(staging: Path, out: Path) -> None:
    """Moves the files of `staging` to `out`, config.json last: without it nothing loads them."""
    mask = _umask()
    for file in staging.iterdir():
        file.chmod(0o666 & ~mask)  # safetensors lets only the owner read them
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if not out.exists():
        staging.chmod(0o777 & ~mask)
        staging.rename(out)
        return
    for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG):
        file.replace(out / file.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
