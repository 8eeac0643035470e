"""Runs with adapters: plain torch's curve, small checkpoints, resume, export merged and as PEFT's files."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint.restore import find_source, restore
from phi3v_dist.config import load_config
from phi3v_dist.export import export, export_adapter, verify
from shards.common.errors import BadInputError
from tests.ranks import logged, run_ranks
from tests.train.test_train import plain_losses

LORA = ["model.freeze=[vision]", "model.lora.parts=[decoder,projector]", "model.lora.rank=4", "train.lr=1e-2"]


def with_overrides(config: Path, *lines: str) -> Path:
    """A copy of `config` in which the overrides are written down."""
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.load(config), OmegaConf.from_dotlist(list(lines)))
    target = config.with_name("lora.yaml")
    OmegaConf.save(merged, target)
    return target


@pytest.mark.ranks
def test_adapters_learn_on_two_ranks_as_in_plain_torch(tiny_config: Path) -> None:
    config = with_overrides(tiny_config, *LORA)
    run_dir = load_config(config).run_dir
    run_ranks(config, 2)
    init = find_source(run_dir / "init")
    losses = logged(run_dir, "train/loss")
    assert list(losses.values()) == pytest.approx(plain_losses(config, run_dir / "init"), rel=2e-5)
    last = run_dir / "checkpoints/step-000006"
    source = find_source(run_dir)
    merged = dict(checkpoint.read_tensors(last))
    base = dict(restore(init, "cpu", torch.float32).model.named_parameters())

    # what has changed are the linear layers of the parts, and the checkpoint holds no more than the adapters
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    adapters = checkpoint.read_adapters(last)
    assert {f"{name.rpartition('.lora_')[0]}.weight" for name in adapters} == changed
    assert merged.keys() == base.keys() and len(changed) == 2 * 4 + 2
    numel = sum(tensor.numel() for tensor in adapters.values())
    held = sum(file.stat().st_size for file in last.glob("rank-*.safetensors"))
    assert held < numel * 12 * 1.1 + 40_000 < sum(t.numel() for t in base.values()) * 4

    # another number of ranks goes on from it; so does the interrupted run
    run_ranks(config, 1, "train.steps=7")
    resumed = find_source(run_dir)
    assert resumed.step == 7

    # merged: an ordinary model, as transformers loads it
    out = export(source, run_dir / "merged", "float32")
    assert len(verify(source, out, str(load_config(config).data.path), samples=2)) == 2
    taken = dict(restore(find_source(out), "cpu", torch.float32).model.named_parameters())
    assert all(torch.equal(tensor, merged[name]) for name, tensor in taken.items())

    # kept: PEFT puts it on the base model, and it answers as the merged one
    kept = export_adapter(source, run_dir / "adapter")
    assert len(load_file(kept / "adapter_model.safetensors")) == 2 * len(changed)
    adapted = PeftModel.from_pretrained(restore(init, "cpu", torch.float32).model, kept)
    ids = torch.tensor([[1, 5, 9, 12]])
    with torch.no_grad():
        ours = restore(find_source(out), "cpu", torch.float32).model(input_ids=ids).logits
        theirs = adapted(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    with pytest.raises(BadInputError, match="is not an empty directory"):
        export_adapter(source, kept)


@pytest.mark.ranks
def test_adapters_beside_parts_that_learn_in_full(tiny_config: Path) -> None:
    config = with_overrides(
        tiny_config,
        "model.lora.parts=[decoder]",
        "model.lora.rank=2",
        "train.steps=3",
        "parallel.tile_mlp=64",
    )
    run_dir = load_config(config).run_dir
    run_ranks(config, 2)
    assert list(logged(run_dir, "train/loss").values()) == pytest.approx(
        plain_losses(config, run_dir / "init"), rel=2e-5
    )
    with pytest.raises(BadInputError, match="weights were trained beside the adapters"):
        export_adapter(find_source(run_dir), run_dir / "adapter")
    meta = checkpoint.read_meta(find_source(run_dir).directory)
    learnt = [name for name, entry in meta.parameters.items() if not entry.frozen]
    assert all(any(part in name for name in learnt) for part in ("img_projection", "img_processor"))
    assert not [name for name in learnt if name.startswith("model.layers.") and ".lora_" not in name]


def test_a_part_both_frozen_and_adapted_is_refused(tiny_config: Path) -> None:
    with pytest.raises(BadInputError, match="model.freeze and model.lora.parts both name decoder"):
        load_config(tiny_config, ["model.freeze=[decoder]", "model.lora.parts=[decoder]"])
