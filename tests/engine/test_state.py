"""The slice rule of ZeRO-3, and the state of optimizers that this project does not know."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from phi3v_dist.engine.partition import Partition, join
from phi3v_dist.engine.state import OptimizerState, _try_optimizer


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_slices_cover_a_tensor_once_and_padding_is_at_the_end(numel: int, ranks: int) -> None:
    width = -(-numel // ranks)
    parts = [Partition(numel, rank, width) for rank in range(ranks)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(numel))
    assert all(part.count + part.padding == width and part.count >= 0 for part in parts)
    assert sum(part.padding for part in parts) == ranks * width - numel
    values = torch.arange(ranks * width).view(ranks, width)
    assert join(values, numel).tolist() == list(range(numel))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), {"exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.SGD(p, lr=0.1), set()),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), {"square_avg"}),
    ],
)
def test_state_is_found_whatever_the_optimizer(make: Callable, names: set[str]) -> None:
    parameter = torch.nn.Parameter(torch.ones(5))
    optimizer = make([parameter])
    before = copy.deepcopy(optimizer.state_dict())
    state = OptimizerState(engine_around(optimizer))
    assert {each.name for each in state.tensors} == names
    assert all(each.initial == 0.0 and each.dtype == torch.float32 for each in state.tensors)
    assert optimizer.state_dict() == before and torch.equal(parameter, torch.ones(5)), "only a copy was tried"


def test_state_that_a_checkpoint_cannot_hold_is_refused() -> None:
    optimizer = torch.optim.NAdam([torch.nn.Parameter(torch.ones(5))])
    assert "mu_product" in _try_optimizer(optimizer, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="NAdam keeps mu_product"):
        OptimizerState(engine_around(optimizer))


class CountsSteps(torch.optim.Optimizer):
    """Keeps nothing but a step count, made by `first(parameter)`."""

    def __init__(self, parameters: list, first: Callable) -> None:
        super().__init__(parameters, {})
        self.first = first

    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("step", self.first(parameter))
            self.state[parameter]["step"] += 1


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), torch.tensor(7.0)),
        (lambda p: torch.optim.AdamW(p), torch.tensor(7.0)),
        (lambda p: CountsSteps(p, lambda _: 0), 7),
        (lambda p: CountsSteps(p, lambda _: torch.zeros((), dtype=torch.int64)), torch.tensor(7)),
    ],
)
def test_a_step_count_is_set_as_the_optimizer_keeps_it(make: Callable, kept: object) -> None:
    parameter = torch.nn.Parameter(torch.ones(5))
    optimizer = make([parameter])
    OptimizerState(engine_around(optimizer)).set_step(SimpleNamespace(master=parameter), 7.0)  # type: ignore[arg-type]
    found = optimizer.state[parameter]["step"]
    assert (
        type(found) is type(kept)
        and found == kept
        and getattr(found, "dtype", None) == getattr(kept, "dtype", None)
    )


@pytest.mark.parametrize(
    ("first", "device"),
    [(lambda p: torch.zeros((), device=p.device), "meta"), (lambda p: torch.zeros(()), "cpu")],
)
def test_a_step_count_is_set_on_the_device_where_the_optimizer_keeps_it(first: Callable, device: str) -> None:
    """As fused AdamW on a GPU (beside the parameter), and AdamW without fused (on the CPU)."""
    parameter = torch.nn.Parameter(torch.ones(5, device="meta"))
    optimizer = CountsSteps([parameter], first)
    OptimizerState(engine_around(optimizer)).set_step(SimpleNamespace(master=parameter), 7.0)  # type: ignore[arg-type]
    assert optimizer.state[parameter]["step"].device.type == device


def engine_around(optimizer: torch.optim.Optimizer) -> SimpleNamespace:
    masters = optimizer.param_groups[0]["params"]
    return SimpleNamespace(
        optimizer=SimpleNamespace(optimizer=optimizer, fp32_partitioned_groups_flat=masters)
    )
