"""Exports a trained model to a directory in the published layout, and checks it by loading it again.

In: a run or a checkpoint of any world size. Out: safetensors with the official names, config, tokenizer,
preprocessor and generation config, and README.md, which says where it comes from and how good it is. One
tensor at a time is in memory beside the shard being written, so one machine without a GPU is enough.
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
    """Writes `source`, a checkpoint, to the directory `out`; returns it.

    dtype: a name in model.dtypes; None: the one that the run trained in. max_shard_bytes: of a weight file,
    and so of the memory that is needed. Raises BadInputError if `source` is no checkpoint or `out` holds
    something.
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
    """Writes what a LoRA run has learnt to the directory `out` in PEFT's format; returns it.

    Raises BadInputError if `source` is no checkpoint of such a run, if other weights have learnt beside the
    adapters (these must be merged), or if `out` holds something.
    """
    meta = _checked(source, out)
    adapters = checkpoint.read_adapters(source.directory)
    if not adapters:
        raise BadInputError(f"{source.directory}: the run had no model.lora; leave out --adapter")
    learnt = [name for name, entry in meta.parameters.items() if not entry.frozen and name not in adapters]
    if learnt:
        raise BadInputError(
            f"{source.directory}: {len(learnt)} weights have learnt in full beside the adapters, such as "
            f"{learnt[0]}, and would be lost; leave out --adapter to export all of it merged"
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
    write_atomically(out / "adapter_config.json", json.dumps(config, indent=1).encode())  # last: it is whole
    return out


def _checked(source: Source, out: Path) -> CheckpointMeta:
    """What the checkpoint `source` says of itself. Raises BadInputError if it is not a checkpoint
    or `out` holds something.
    """
    if not source.is_checkpoint:
        raise BadInputError(
            f"{source.directory}: is a model directory already; export takes a run or a checkpoint"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInputError(f"{out}: is not an empty directory; choose another or remove it")
    return checkpoint.read_meta(source.directory)


def verify(source: Source, out: Path, dataset: str | None = None, *, samples: int = 4) -> list[str]:
    """Loads `out` again through transformers and compares with `source`: every weight, bit for bit, and the
    answers to `samples` questions of `dataset` (its val split, else train; None: to a question without a
    picture). Returns the answers.

    Raises BadInputError naming the first tensor or answer that differs.
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
                f"{out}: {name} is not what {source.directory} holds; remove it, export again"
            )
    if found:
        raise BadInputError(f"{out}: has a tensor {min(found)} that {source.directory} has not")
    again = restore(find_source(out), "cpu", dtype)
    again = type(again)(theirs, again.config, again.processor, again.device, dtype)
    answers = []
    for question in _some_questions(dataset, samples):
        one, other = (generate(model, [question], _VERIFY_TOKENS)[0] for model in (ours, again))
        if one != other:
            raise BadInputError(
                f"{out}: answers {other!r} to {question.key!r} where {source.directory} answers {one!r}"
            )
        answers.append(one)
    return answers


def _some_questions(dataset: str | None, samples: int) -> list[Prompt]:
    if dataset is None:
        return [Prompt("hello", "<|user|>\nHello<|end|>\n<|assistant|>\n", truth="", images=())]
    for split in ("val", "train"):
        chosen = read_split([dataset], split, samples, may_lack=True)
        if len(chosen):
            return Prompts(chosen).read(range(len(chosen)))
    raise BadInputError(f"{dataset}: neither a split val nor train to verify with")


def _card(source: Source, meta: CheckpointMeta) -> str:
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
            '`phi3v ask THIS_DIRECTORY picture.jpg --prompt "What is this?"`.',
            "",
            *_scores(source),
            "## Made from",
            "",
            f"- data: fingerprint `{run['data_fingerprint']}`, split `{data['train_split']}`",
            f"- started from: `{config['model']['path'] or 'new weights'}`",
            f"- code: {f'commit `{commit}`' if commit else 'no git checkout'}",
            f"- seen: {meta.progress.tokens:,} tokens, {meta.progress.images:,} pictures",
            f"- versions: {json.dumps(run['versions'])}",
            "",
            "```json",
            json.dumps(config, indent=1),
            "```",
            "",
        ]
    )


def _scores(source: Source) -> list[str]:
    """The evaluation in training at this step, as a table."""
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
