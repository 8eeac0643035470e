"""The arithmetic of a row, held against PyTorch's own count of a real forward and backward."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from phi3v_dist.budget.flops import Flops, RowShape, known_peak, row_flops, shape_of, utilisation
from phi3v_dist.config import RunConfig
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.groups import choose_learning
from phi3v_dist.model.memory import save_memory
from phi3v_dist.processor.geometry import vision_calls_needed
from tests.model.tiny import make_document, pack, tiny_config, tiny_model


class Counter(TorchDispatchMode):
    """What PyTorch's own table says of every product, in forward, backward and what is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = flop_registry.get(func._overloadpacket)
        self.total += rule(*args, **(kwargs or {}), out_val=out) if rule else 0
        return out


def run(tile_mlp: int = 0, **model: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "model": {"path": "m", "gradient_checkpointing": False, **model},
            "data": {"path": "d"},
            "train": {"steps": 1},
            "parallel": {"tile_mlp": tile_mlp},
        }
    )


@pytest.mark.parametrize("tile_mlp", [0, 8])
@pytest.mark.parametrize("frozen", [[], ["vision"], ["vision", "projector"], ["decoder"]])
@pytest.mark.parametrize("chunk", [64, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_what_pytorch_counts(checkpointing: bool, chunk: int, frozen: list[str], tile_mlp: int) -> None:
    """Tower, projector and decoder, forward, backward and again; all but the separators and the odd end."""
    config = run(tile_mlp, gradient_checkpointing=checkpointing, vision_chunk=chunk, freeze=frozen)
    model = tiny_model(attn_implementation="eager").train()
    model.vision_chunk = chunk
    save_memory(model, config)
    choose_learning(model, config.model, 0)
    document = make_document(2, 40, ((2, 2), (1, 2)))
    row, length = pack([document]), len(document.input_ids)
    shape = RowShape([length], len(row.tiles) + len(row.grids), 0)
    row = replace(row, vision_calls=vision_calls_needed(shape.views, 0, chunk))
    with Counter() as counter:
        hidden = model._embed_row(row, slice(0, len(row.input_ids)))
        rotation = model.model.rope.packed(row.position_ids, row.cu_seqlens, hidden.dtype)
        mask = torch.zeros(1, 1, len(hidden), len(hidden))
        model.model.decode(hidden[None], rotation, attention_mask=mask).sum().backward()
    ours = row_flops(config, tiny_config(), shape).hardware
    ours += (3 + checkpointing) * 2 * 2 * 64 * length**2  # eager attention does the whole square
    assert counter.total == pytest.approx(ours, rel=0.001)


def test_documents_do_not_pay_for_each_other() -> None:
    model = Phi3VConfig()
    config = run()
    one = row_flops(config, model, RowShape([131072], 0, 1000)).model
    many = row_flops(config, model, RowShape([4096] * 32, 0, 1000)).model
    assert one - many == pytest.approx(6 * 32 * 3072 * (131072**2 - 32 * 4096**2))
    assert one == pytest.approx(13.1e15, rel=0.05)  # attention is 77 % of it
    assert 6 * 32 * 3072 * 131072**2 / one == pytest.approx(0.77, abs=0.02)


def test_padding_counts_for_nothing() -> None:
    documents = [make_document(1, 20), make_document(2, 30, ((1, 2),))]
    tokens = sum(len(d.input_ids) for d in documents)
    assert shape_of(pack(documents), tokens) == shape_of(pack(documents, pad=9), tokens)


def test_recomputation_is_counted_apart() -> None:
    model, shape = Phi3VConfig(), RowShape([8192], 170, 1000)
    plain = row_flops(run(), model, shape)
    saving = row_flops(run(gradient_checkpointing=True), model, shape)
    assert plain.model == saving.model < plain.hardware < saving.hardware
    assert row_flops(run(freeze=["vision"]), model, shape).model < plain.model


def test_utilisation_and_the_table_of_peaks() -> None:
    metrics = utilisation(Flops(989e12, 2 * 989e12), 2.0, 2, peak=989.0)
    assert metrics["perf/mfu"] == pytest.approx(0.25) and metrics["perf/hfu"] == pytest.approx(0.5)
    assert utilisation(Flops(1e12, 1e12), 1.0, 1, peak=None)["perf/mfu"] is None
    assert known_peak("NVIDIA H100 80GB HBM3") == 989.0 and known_peak("NVIDIA H100 PCIe") == 756.0
    assert known_peak("NVIDIA L40S") == 362.0 and known_peak("Some GPU") is None
    assert known_peak("NVIDIA RTX A1000") is None and known_peak("NVIDIA A10G") is None
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312.0 and known_peak("NVIDIA GH200 480GB") == 989.0
