"""Sequence parallelism and the memory features change nothing: loss, every gradient, and 20 steps of training
equal one process in plain torch, on 2 and 4 real ranks.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phi3v_dist.model.hub import build_model, init_random_checkpoint, load_config, load_weights
from phi3v_dist.model.row import PackedRow
from phi3v_dist.processor.tokenizer import train_tokenizer
from tests.model.tiny import make_document, pack, tiny_config
from tests.parallel.parity_rank import CASES
from tests.ranks import finish, start

pytestmark = pytest.mark.timeout(420)  # one launch serves many tests; ranks that share cores are slow


def make_rows() -> list[PackedRow]:
    """Four rows. Documents of more than 64 positions have the long RoPE factors.

    Many pictures beside text; no picture; targets at the very end alone (so that some slices have none); a
    length that neither 2 nor 4 divides. Documents cross the edges of slices in all of them.
    """
    many = [make_document(1, 20, ((1, 2), (2, 2))), make_document(2, 110, ((1, 1),)), make_document(3, 40)]
    late = pack([make_document(4, 120, ((2, 1),)), make_document(5, 33)])
    labels = late.labels.clone()
    labels[: -len(make_document(5, 33).labels)] = -100
    return [
        pack(many),
        pack([make_document(6, 30), make_document(7, 97), make_document(8, 64)], pad=5),
        replace(late, labels=labels),
        pack([make_document(9, 70), make_document(10, 21, ((1, 3), (1, 1), (1, 1)))], pad=2),
    ]


def short_rows() -> list[PackedRow]:
    return [
        pack([make_document(20 + n, 40, ((1, 1),) * (n % 2)), make_document(30 + n, 70)]) for n in range(4)
    ]


def launch(directory: Path, ranks: int) -> dict:
    program = Path(__file__).with_name("parity_rank.py")
    more = {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(Path(__file__).parents[2])}
    code, output = finish(start(ranks, str(program), str(directory), **more), 400)
    assert code == 0, output[-6000:]
    return torch.load(directory / f"world-{ranks}.pt", weights_only=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("parity")
    train_tokenizer(["a b c"], made / "tokenizer", 40)
    clip = {**(tiny_config().clip_vision_config or {}), "num_hidden_layers": 2}
    changes: dict[str, dict[str, object]] = {
        "model": {},
        "grouped": {"num_key_value_heads": 2},
        "small": {"num_hidden_layers": 1, "clip_vision_config": clip},
    }
    for name, change in changes.items():
        config = tiny_config(initializer_range=0.06, **change)
        init_random_checkpoint(
            config, made / name, 3, dtype=torch.float32, num_crops=4, tokenizer_dir=made / "tokenizer"
        )
    torch.save(make_rows(), made / "rows.pt")
    torch.save(short_rows(), made / "short.pt")
    return made


@pytest.fixture(scope="module")
def four(directory: Path) -> dict:
    return launch(directory, 4)


@pytest.fixture(scope="module")
def two(directory: Path) -> dict:
    return launch(directory, 2)


class OneProcess:
    """Plain torch, a row at a time."""

    def __init__(self, directory: Path) -> None:
        self.model = build_model(load_config(directory), torch.float32)
        load_weights(self.model, directory)
        self.model.train()

    def step(self, rows: list[PackedRow]) -> float:
        """Leaves the gradients of the mean over the targets of `rows`; returns it."""
        self.model.zero_grad()
        targets = sum(row.num_targets for row in rows)
        losses = [self.model(row=row) / targets for row in rows]
        for loss in losses:
            loss.backward()
        return float(sum(loss.detach() for loss in losses))


def check(directory: Path, found: dict, world: int, sp: int, name: str, features: str, accumulation: int):
    one = OneProcess(directory / name)
    rows = (make_rows() * 3)[: world // sp * accumulation]
    expected = one.step(rows)
    loss, gradients = found["steps"][name, sp, features, accumulation]
    assert loss == pytest.approx(expected, rel=1e-6)
    learning = {n: p for n, p in one.model.named_parameters() if p.requires_grad}
    assert gradients.keys() == learning.keys()
    errors = {
        n: float((gradients[n] - p.grad).norm() / p.grad.norm())
        for n, p in learning.items()
        if not n.endswith("k_proj.bias")  # zero by the nature of softmax; what is left is rounding
    }
    worst = max(errors, key=lambda n: errors[n])
    print(f"world {world} sp {sp} {features} x {accumulation}: {worst} {errors[worst]:.1e}")
    assert errors[worst] <= 1e-6, worst


@pytest.mark.ranks
@pytest.mark.parametrize(("features", "accumulation"), CASES[4])
@pytest.mark.parametrize("sp", [1, 2, 4])
def test_four_ranks_equal_one_process(directory, four, sp: int, features: str, accumulation: int) -> None:
    check(directory, four, 4, sp, "model", features, accumulation)


@pytest.mark.ranks
@pytest.mark.parametrize(("features", "accumulation"), CASES[2])
def test_two_ranks_equal_one_process(directory, two, features: str, accumulation: int) -> None:
    check(directory, two, 2, 2, "model", features, accumulation)


@pytest.mark.ranks
def test_fewer_key_value_heads(directory, two) -> None:
    check(directory, two, 2, 2, "grouped", "all", 1)


@pytest.mark.ranks
def test_twenty_steps_draw_the_same_curve(directory, four) -> None:
    one = OneProcess(directory / "small")
    learning = [p for p in one.model.parameters() if p.requires_grad]
    matrices = [p for p in learning if sum(side > 1 for side in p.shape) > 1]
    vectors = [p for p in learning if sum(side > 1 for side in p.shape) <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    rows = short_rows()
    curve = []
    for step in range(20):
        curve.append(one.step(rows[step % 3 :] + rows[: step % 3]))
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    assert curve[-1] < curve[0] - 0.1
    for sp in (1, 2, 4):
        assert four["curves"][sp] == pytest.approx(curve, rel=1e-5), sp


def test_the_rows_hold_what_they_promise() -> None:
    rows = make_rows()
    assert [len(row.grids) > 0 for row in rows] == [True, False, True, True]
    assert any(len(row.input_ids) % 4 for row in rows) and any(len(row.input_ids) % 2 for row in rows)
    late = rows[2].padded(4)
    quarters = late.targets().view(4, -1)
    assert [bool((quarter != -100).any()) for quarter in quarters] == [False, False, False, True]
    for row in rows:
        row = row.padded(2)
        middle = len(row.input_ids) // 2
        assert middle not in row.cu_seqlens.tolist()  # a document lies across the edge of the slices
    assert any(int(row.cu_seqlens.diff().max()) > 64 for row in rows)
