"""The plan: every sample once an epoch, rows that fit, an order that no number of ranks changes."""

import numpy as np
import pytest

from phi3v_dist.data.plan import Plan, RankRows, epoch_rows, rank_rows
from phi3v_dist.data.tokens import SampleCosts
from shards.format import BadInputError


def costs(samples: int = 500, seed: int = 0, longest: int = 300) -> SampleCosts:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, longest, samples)
    return SampleCosts(tokens, tokens // 4, rng.integers(0, 9, samples), rng.integers(0, 3, samples))


def plan(**changes: object) -> Plan:
    options: dict = {"costs": costs(), "seq_len": 1024, "seed": 3, "global_batch": 8, **changes}
    return Plan(**options)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_sample_once_and_rows_fit(shuffle: bool, packing: bool) -> None:
    made = plan(shuffle=shuffle, packing=packing)
    for epoch in (0, 1):
        rows = made.epoch(epoch)
        assert sorted(rows.samples) == list(range(500))
        lengths = [made.costs.tokens[rows.row(r)].sum() for r in range(len(rows))]
        assert max(lengths) <= 1024
        assert min(len(rows.row(r)) for r in range(len(rows))) >= 1
        if not packing:
            assert len(rows) == 500
        if not (shuffle or packing):
            assert list(rows.samples) == list(range(500))
    assert packing is False or made.fill(0) > 0.985


def test_it_is_a_function_of_seed_and_epoch() -> None:
    first, again = plan().epoch(2), plan().epoch(2)
    assert np.array_equal(first.samples, again.samples) and np.array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.samples, plan(seed=4).epoch(2).samples)
    assert not np.array_equal(first.samples, plan().epoch(1).samples)


def consumed(made: Plan, dp_size: int, steps: range, end_row: int | None = None) -> list[tuple[int, ...]]:
    """What all ranks together eat in each step, as a set of rows."""
    found = []
    for step in steps:
        ranks = [rank_rows(made.step(step, end_row), made.costs, r, dp_size, 16) for r in range(dp_size)]
        found.append(sorted(tuple(micro.samples) for rank in ranks for micro in rank))
    return found


def test_ranks_share_the_same_rows_at_any_number_and_across_an_epoch_edge() -> None:
    made = plan()
    steps = range(0, 3 * len(made.epoch(0)) // 8)
    alone = consumed(made, 1, steps)
    for dp_size in (2, 4, 8):
        assert consumed(plan(), dp_size, steps) == alone
    # 8 -> 2 -> 4 ranks with restarts
    third = len(steps) // 3
    pieces = [(8, steps[:third]), (2, steps[third : 2 * third]), (4, steps[2 * third :])]
    assert [s for dp, part in pieces for s in consumed(plan(), dp, part)] == alone
    # the first two epochs' samples come twice each, before any comes a third time
    eaten = [sample for step in alone for row in step for sample in row]
    two = [sample for step in consumed(made, 1, steps, made.end_row(2)) for row in step for sample in row]
    assert np.bincount(two, minlength=500).tolist() == [2] * 500
    assert len(eaten) > len(two)


def test_the_last_step_is_filled_up_with_empty_rows() -> None:
    made = plan()
    rows = len(made.epoch(0))
    assert made.end_row(1) == rows and made.steps_of(1) == -(-rows // 8)
    last = made.step(made.steps_of(1) - 1, made.end_row(1))
    assert len(last.rows) == 8
    assert sum(len(row) == 0 for row in last.rows) == -rows % 8
    half = made.end_row(1.5)
    assert rows < half < rows + len(made.epoch(1))


def test_targets_are_those_of_all_rows() -> None:
    made = plan()
    step = made.step(5)
    assert step.targets == sum(made.costs.targets[sample] for row in step.rows for sample in row)


def test_ranks_of_a_micro_step_make_the_same_vision_calls_and_similar_work() -> None:
    made = plan(global_batch=16)
    ranks = [rank_rows(made.step(0), made.costs, r, 4, 8) for r in range(4)]
    assert all(len(rank) == 4 for rank in ranks)
    for micro in range(4):
        calls = {rank[micro].vision_calls for rank in ranks}
        assert len(calls) == 1
        views = max(
            int(made.costs.tiles[r[micro].samples].sum() + made.costs.pictures[r[micro].samples].sum())
            for r in ranks
        )
        assert calls == {max(1, -(-views // 8))}


def test_rank_rows_are_found_again_from_any_step() -> None:
    made = plan()
    whole = RankRows(made, 1, 2, 16, 0, 12)
    later = RankRows(plan(), 1, 2, 16, 7, 12)
    assert len(whole) == 48 and len(later) == 20
    assert [tuple(m.samples) for m in later] == [tuple(whole[i].samples) for i in range(28, 48)]


def test_over_long_samples_are_dropped_aloud_or_refused() -> None:
    with pytest.raises(
        BadInputError, match=r"of 500 samples are longer than data.seq_len=200 \(longest: 2\d\d\)"
    ):
        plan(seq_len=200)
    made = plan(seq_len=200, over_long="drop")
    assert made.dropped == int((made.costs.tokens > 200).sum()) > 0
    assert len(made.epoch(0).samples) == 500 - made.dropped
    with pytest.raises(BadInputError, match="no sample fits"):
        plan(seq_len=16, over_long="drop")


def test_lengths_of_a_log_normal_mix_fill_their_rows() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.5, 1, 20_000).astype(int) + 1, 8192)
    rows = epoch_rows(lengths, np.arange(20_000), 8192, 0, 0, True, True)
    assert lengths.sum() / (len(rows) * 8192) > 0.985
