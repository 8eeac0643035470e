"""The arithmetic of a row, held against PyTorch's own count of a real forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phi3v_dist.config import RunConfig
from phi3v_dist.flops import Flops, RowShape, known_peak, row_flops, shape_of, utilisation
from phi3v_dist.model.configuration import Phi3VConfig
from tests.model.conftest import make_document, pack, tiny_config, tiny_model


def run(**model: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "model": {"path": "m", "gradient_checkpointing": False, **model},
            "data": {"path": "d"},
            "train": {"steps": 1},
        }
    )


def test_linear_layers_are_counted_as_pytorch_counts_them() -> None:
    """Tower, projector and decoder; all but the two separators and the odd end."""
    model = tiny_model(attn_implementation="eager").train()
    document = make_document(2, 40, ((2, 2), (1, 2)))
    row = pack([document])
    with FlopCounterMode(display=False) as counter:
        hidden = model._embed_row(row, slice(0, len(row.input_ids)))
        rotation = model.model.rope.packed(row.position_ids, row.cu_seqlens, hidden.dtype)
        mask = torch.zeros(1, 1, len(hidden), len(hidden))
        model.model.decode(hidden[None], rotation, attention_mask=mask).sum().backward()
    length = len(document.input_ids)
    shape = RowShape([length], len(row.tiles) + len(row.grids), 0)
    ours = row_flops(run(), tiny_config(), shape).model
    ours += 6 * 2 * 64 * length**2  # eager attention does the whole square
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.002)


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
    assert saving.hardware / saving.model == pytest.approx(1.4, abs=0.08)  # the tower twice
    assert row_flops(run(freeze=["vision"]), model, shape).model < plain.model


def test_utilisation_and_the_table_of_peaks() -> None:
    metrics = utilisation(Flops(989e12, 2 * 989e12), 2.0, 2, 989.0)
    assert metrics["perf/mfu"] == pytest.approx(0.25) and metrics["perf/hfu"] == pytest.approx(0.5)
    assert utilisation(Flops(1e12, 1e12), 1.0, 1, None)["perf/mfu"] is None
    assert known_peak("NVIDIA H100 80GB HBM3") == 989.0 and known_peak("NVIDIA H100 PCIe") == 756.0
    assert known_peak("NVIDIA L40S") == 362.0 and known_peak("Some GPU") is None
    assert known_peak("NVIDIA RTX A1000") is None and known_peak("NVIDIA A10G") is None
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312.0 and known_peak("NVIDIA GH200 480GB") == 989.0
