"""Exports a trained model to a directory in the published layout, and verifies it by loading it again.

In: a run, or a checkpoint of any world size. Out: safetensors with the published names, config, tokenizer,
preprocessor and generation config, and README.md, which records data, settings, versions and scores. Only one
tensor and one weight file are in memory at a time, so a machine without a GPU is enough.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from phi3v_dist import __version__
from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint.meta import CheckpointMeta
from phi3v_dist.checkpoint.restore import Source, find_source, model_config, restore
from phi3v_dist.evaluation.generate import generate
from phi3v_dist.evaluation.prompts import Prompt, Prompts, read_split
from phi3v_dist.model.dtypes import torch_dtype
from phi3v_dist.model.hub import DEFAULT_SHARD_BYTES, write_hub_directory
from shards.common.errors import BadInputError
from shards.common.files import write_atomically

_VERIFY_TOKENS = 32


def export(
    source: Source, out: Path, dtype: str | None = None, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Path:
    """Writes `source`, a checkpoint, to the directory `out`; returns `out`.

    dtype: a name in model.dtypes; None for that of the run. max_shard_bytes: the size of a weight file, and
    so of the memory that is needed. Raises BadInputError if `source` is not a checkpoint, or `out` is not
    empty.
    """
    meta = _checked(source, out)
    write_hub_directory(
        out,
        model_config(source),
        checkpoint.read_tensors(source.directory),
        dtype=torch_dtype(dtype or meta.run["config"]["model"]["dtype"]),
        max_shard_bytes=max_shard_bytes,
        num_crops=meta.num_crops,
        tokenizer_dir=source.directory,
    )
    write_atomically(out / "README.md", _card(source, meta).encode())
    return out


def export_adapter(source: Source, out: Path) -> Path:
    """Writes the adapters of a LoRA run to the directory `out` in PEFT's format; returns `out`.

    Raises BadInputError if `source` is not a checkpoint of such a run, if other weights were trained beside
    the adapters (PEFT's format cannot hold these), or if `out` is not empty.
    """
    meta = _checked(source, out)
    adapters = checkpoint.read_adapters(source.directory)
    if not adapters:
        raise BadInputError(f"{source.directory}: the run had no model.lora; leave out --adapter")
    trained = [name for name, entry in meta.parameters.items() if not entry.frozen and name not in adapters]
    if trained:
        raise BadInputError(
            f"{source.directory}: {len(trained)} weights were trained beside the adapters, such as "
            f"{trained[0]}, and would be lost; leave out --adapter to export everything merged"
        )
    lora = meta.run["config"]["model"]["lora"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": meta.run["config"]["model"]["path"] or meta.model_dir,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".lora_")[0] for name in adapters}),
        "inference_mode": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapters.items()}
    write_atomically(out / "adapter_model.safetensors", safetensors.torch.save(tensors))
    write_atomically(out / "README.md", _card(source, meta).encode())
    write_atomically(out / "adapter_config.json", json.dumps(config, indent=1).encode())  # last: complete
    return out


def _checked(source: Source, out: Path) -> CheckpointMeta:
    """The meta.json of `source`. Raises BadInputError if it is not a checkpoint, or `out` is not empty."""
    if not source.is_checkpoint:
        raise BadInputError(
            f"{source.directory}: is a model directory already; export takes a run or a checkpoint"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInputError(f"{out}: is not an empty directory; choose another or remove it")
    return checkpoint.read_meta(source.directory)


def verify(source: Source, out: Path, dataset: str | None = None, *, samples: int = 4) -> list[str]:
    """Loads `out` with transformers and compares every weight with `source`, bit for bit, and the answers to
    some prompts. Returns the answers.

    dataset: where the first `samples` prompts of the split val, or else train, are taken; None for one prompt
    without an image. Raises BadInputError naming the first tensor or answer that differs.
    """
    from transformers import AutoModelForCausalLM

    import phi3v_dist.model  # noqa: F401 - registers the model with transformers

    written = json.loads((out / "config.json").read_text())
    dtype = torch_dtype(str(written.get("dtype") or written.get("torch_dtype")))
    ours = restore(source, "cpu", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()
    found = dict(theirs.named_parameters())
    for name, parameter in ours.model.named_parameters():
        other = found.pop(name, None)
        if other is None or not torch.equal(parameter, other):
            raise BadInputError(
                f"{out}: {name} differs from {source.directory}; remove {out} and export again"
            )
    if found:
        raise BadInputError(f"{out}: holds a tensor {min(found)} that {source.directory} does not have")
    again = restore(find_source(out), "cpu", dtype)
    again = type(again)(theirs, again.config, again.processor, again.device, dtype)
    answers = []
    for prompt in _some_prompts(dataset, samples):
        one, other = (generate(model, [prompt], _VERIFY_TOKENS)[0] for model in (ours, again))
        if one != other:
            raise BadInputError(
                f"{out}: answers {other!r} to sample {prompt.key!r}, {source.directory} answers {one!r}"
            )
        answers.append(one)
    return answers


def _some_prompts(dataset: str | None, samples: int) -> list[Prompt]:
    if dataset is None:
        return [Prompt("hello", "<|user|>\nHello<|end|>\n<|assistant|>\n", truth="", images=())]
    for split in ("val", "train"):
        chosen = read_split([dataset], split, samples, may_lack=True)
        if len(chosen):
            return Prompts(chosen).read(range(len(chosen)))
    raise BadInputError(
        f"{dataset}: has neither a val nor a train split to verify with; give another --dataset"
    )


def _card(source: Source, meta: CheckpointMeta) -> str:
    """The README.md of an exported model."""
    run, config = meta.run, meta.run["config"]
    data = config["data"]
    commit = (run.get("git") or {}).get("commit")
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
            "Load it with phi3v-dist installed: `import phi3v_dist.model`, then",
            "`AutoModelForCausalLM.from_pretrained(...)` and `AutoProcessor.from_pretrained(...)`, or:",
            '`phi3v ask THIS_DIRECTORY image.jpg --prompt "What is this?"`.',
            "",
            *_scores(source),
            "## Made from",
            "",
            f"- data: fingerprint `{run['data_fingerprint']}`, split `{data['train_split']}`",
            f"- started from: `{config['model']['path'] or 'new weights'}`",
            f"- code: {f'commit `{commit}`' if commit else 'no git checkout'}",
            f"- seen: {meta.progress.tokens:,} tokens, {meta.progress.images:,} images",
            f"- versions: {json.dumps(run['versions'])}",
            "",
            "```json",
            json.dumps(config, indent=1),
            "```",
            "",
        ]
    )


def _scores(source: Source) -> list[str]:
    """A table of the scores of the evaluation at this step of training; empty without one."""
    file = source.directory.parent.parent / "eval" / source.directory.name / "scores.json"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return []
    lines = [
        f"## Evaluation at step {source.step}",
        "",
        "| metric | value | 95 % interval |",
        "|---|---|---|",
    ]
    for name, value in found["scores"].items():
        between = found.get("intervals", {}).get(name)
        shown = "-" if value is None else f"{value:.4g}"
        lines.append(f"| {name} | {shown} | {f'{between[0]:.4g} .. {between[1]:.4g}' if between else ''} |")
    return [*lines, ""]
