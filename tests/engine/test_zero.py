"""ZeRO-3 on two real ranks: every rank reads its own slices, and training equals one process.

One rank's row has pictures and the other's has none; both call the tower as often.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phi3v_dist.model.hub import build_model, init_random_checkpoint, load_config, load_weights
from phi3v_dist.processor.tokenizer import train_tokenizer
from tests.model.tiny import make_document, pack, tiny_config
from tests.ranks import finish, start

pytestmark = pytest.mark.ranks

RANKS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """The directory after two ranks have run zero3_rank.py in it."""
    directory = tmp_path_factory.mktemp("zero3")
    train_tokenizer(["a b c"], directory / "tokenizer", 40)
    wide = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "type": "su"}
    big = tiny_config(hidden_size=512, intermediate_size=1536, num_hidden_layers=10, rope_scaling=wide)
    for name, config in (("big", big), ("tiny", tiny_config())):
        init_random_checkpoint(
            config,
            directory / name,
            3,
            dtype=torch.float32,
            num_crops=4,
            tokenizer_dir=directory / "tokenizer",
        )
    rows = [
        pack([make_document(1, 20, ((1, 2), (2, 2))), make_document(2, 70)]),
        pack([make_document(3, 30), make_document(4, 90)], pad=5),
    ]
    torch.save([replace(row, vision_calls=3) for row in rows], directory / "rows.pt")
    program = Path(__file__).with_name("zero3_rank.py")
    # Not forks of a warm agent: their memory is measured.
    # The published model's tensors are freed to the system at once; let these small ones be too.
    more = {"PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "262144"}
    code, output = finish(start(RANKS, str(program), str(directory), warm=False, **more), 150)
    assert code == 0, output[-6000:]
    return directory


def results(ranks: Path) -> list[dict]:
    return [json.loads((ranks / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


def test_slices_are_the_right_bits_in_the_right_dtype(ranks) -> None:
    assert all(result["right"] for result in results(ranks))


def test_each_rank_holds_and_reads_about_its_share(ranks) -> None:
    whole = (ranks / "big/model.safetensors").stat().st_size
    assert whole > 100_000_000
    for rank, result in enumerate(results(ranks)):
        private, read = result["private"] / whole, result["read"] / whole
        print(f"rank {rank}: read {read:.2f}, private memory {private:.2f} of {whole / 1e6:.0f} MB")
        assert result["held"] <= whole * 1.01 / RANKS
        assert read <= 1.02 / RANKS  # whole rows of the tensors
        assert private <= 1.25 / RANKS  # its slices and one layer at a time


def test_two_steps_equal_one_process(ranks) -> None:
    rows = torch.load(ranks / "rows.pt", weights_only=False)
    targets = sum(row.num_targets for row in rows)
    model = build_model(load_config(ranks / "tiny"), torch.float32)
    load_weights(model, ranks / "tiny")
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        losses = [model(row=row) for row in rows]
        for loss, result in zip(losses, results(ranks), strict=True):
            assert result["losses"][step] == pytest.approx(loss.item(), rel=1e-5)
        (sum(losses) / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    stored = torch.load(ranks / "weights.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(stored[name], parameter.data, rtol=1e-4, atol=1e-6, msg=name)
