"""LoRA on parts by name: learns on packed rows, merges back, exports as an ordinary checkpoint."""

import pytest
import torch
from safetensors.torch import load_file

from phi3v_dist.model import Phi3VForCausalLM
from phi3v_dist.model.hub import write_hub_directory
from phi3v_dist.model.lora import PARTS, adapter_shapes, add_lora, lora_targets, merge_lora, plain_name
from phi3v_dist.processor.tokenizer import train_tokenizer
from shards.common.errors import BadInputError


def test_parts_cover_the_linear_layers_that_feed_something(tiny) -> None:
    model = tiny.model()
    found = {part: lora_targets(model, [part]) for part in PARTS}
    assert {name.rsplit(".", 1)[1] for name in found["decoder"]} == {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }
    assert [name.rsplit(".", 1)[1] for name in found["projector"]] == ["0", "2"]
    assert len(found["decoder"]) == 4 * 2 and len(found["vision"]) == 6 * 2  # the third tower layer is dead
    assert not [name for name in found["vision"] if ".layers.2." in name]
    with pytest.raises(BadInputError, match="no part 'head'"):
        lora_targets(model, ["head"])


@pytest.mark.parametrize("parts", [["decoder"], ["vision"], ["projector"], list(PARTS)])
def test_learns_merges_and_exports(tiny, tmp_path, parts) -> None:
    model = tiny.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    row = tiny.pack([tiny.document(1, 20), tiny.document(2, 30, ((1, 2),))])
    targets = set(lora_targets(model, parts))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    adapted = add_lora(model, parts, rank=4)
    learning = {plain_name(n): tuple(p.shape) for n, p in adapted.named_parameters() if p.requires_grad}
    assert learning == adapter_shapes(shapes, parts, 4)
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(row=row)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    with torch.no_grad():
        expected = adapted(row=row, return_logits=True)
    merged = merge_lora(adapted)
    state = merged.state_dict()
    assert set(state) == set(before)
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], state[name])}
    assert changed == targets
    train_tokenizer(["a b c"], tmp_path / "tokenizer", 40)
    write_hub_directory(
        tmp_path / "out",
        merged.config,
        state.items(),
        dtype=torch.float32,
        tokenizer_dir=tmp_path / "tokenizer",
    )
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(before)
    with torch.no_grad():
        found = Phi3VForCausalLM.from_pretrained(tmp_path / "out")(row=row, return_logits=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_with_gradient_checkpointing_and_generation(tiny) -> None:
    adapted = add_lora(tiny.model(), ["decoder", "vision"], rank=2)
    adapted.gradient_checkpointing_enable()
    adapted.train()
    row = tiny.pack([tiny.document(2, 30, ((1, 2),))])
    adapted(row=row).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    inputs = tiny.published(tiny.document(2, 30, ((1, 2),)))
    del inputs["labels"]
    answer = adapted.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
