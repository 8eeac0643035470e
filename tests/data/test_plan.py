"""The plan: every sample once an epoch, rows that fit, an order that no number of ranks changes."""

from pathlib import Path

import numpy as np
import pytest

from phi3v_dist.budget.flops import RowShape, row_flops
from phi3v_dist.config import RunConfig
from phi3v_dist.data import plan_files
from phi3v_dist.data.describe import step_imbalance
from phi3v_dist.data.epoch import Layout, epoch_draws, epoch_samples
from phi3v_dist.data.plan import Plan, RankRows, deal_rows, rank_rows, row_cost, sample_work
from phi3v_dist.data.plan_files import PlanFiles
from phi3v_dist.data.tokens import SampleCosts
from phi3v_dist.model.configuration import Phi3VConfig
from shards.common.errors import BadInputError


def costs(samples: int = 500, seed: int = 0, longest: int = 300) -> SampleCosts:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, longest, samples)
    return SampleCosts(tokens, tokens // 4, rng.integers(0, 9, samples), rng.integers(0, 3, samples))


def log_normal(samples: int, seq_len: int) -> SampleCosts:
    """Lengths of a log-normal mix; a third of the samples is text alone."""
    rng = np.random.default_rng(1)
    tokens = np.minimum(rng.lognormal(6.5, 1, samples).astype(int) + 1, seq_len)
    views = tokens // 200 * (rng.random(samples) < 0.67)
    return SampleCosts(tokens, tokens // 4, views * 4 // 5, views // 5)


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
        if not shuffle:
            firsts = [int(rows.row(r)[0]) for r in range(len(rows))]
            assert firsts == sorted(firsts)
        if not (shuffle or packing):
            assert list(rows.samples) == list(range(500))
    assert packing is False or made.fill(0) > 0.985


def test_it_is_a_function_of_seed_and_epoch() -> None:
    first, again = plan().epoch(2), plan().epoch(2)
    assert np.array_equal(first.samples, again.samples) and np.array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.samples, plan(seed=4).epoch(2).samples)
    assert not np.array_equal(first.samples, plan().epoch(1).samples)


def consumed(made: Plan, dp_size: int, first_row: int, steps: int) -> list[list[tuple[int, ...]]]:
    """What all ranks together eat in each step, as a set of rows."""
    ranks = [
        list(RankRows(made, dp_rank=rank, dp_size=dp_size, vision_chunk=16, first_row=first_row, steps=steps))
        for rank in range(dp_size)
    ]
    each = made.global_batch // dp_size
    return [
        sorted(tuple(m.samples) for rank in ranks for m in rank[step * each : (step + 1) * each])
        for step in range(steps)
    ]


def test_ranks_share_the_same_rows_at_any_number_and_across_an_epoch_edge() -> None:
    made = plan()
    steps = 3 * len(made.epoch(0)) // 8
    alone = consumed(made, 1, 0, steps)
    for dp_size in (2, 4, 8):
        assert consumed(plan(), dp_size, 0, steps) == alone
    # 8 -> 2 -> 4 ranks, restarted in the middle of an epoch, and with row numbers as the only memory
    third = steps // 3
    pieces = [(8, 0, third), (2, third, third), (4, 2 * third, steps - 2 * third)]
    assert [s for dp, first, n in pieces for s in consumed(plan(), dp, first * 8, n)] == alone
    # the first two epochs' samples come twice each, before any comes a third time
    edge = made.end_row(2)
    eaten = [sample for row in range(edge) for sample in made.step(row, row + 1).rows for sample in sample]
    assert np.bincount(eaten, minlength=500).tolist() == [2] * 500
    assert edge % 8, "a step across the edge"


def test_the_documents_of_the_last_step_are_dealt_out_to_all_of_its_rows() -> None:
    made = plan(global_batch=16)
    end = made.end_row(1)
    assert made.steps_of(1) == -(-end // 16) and end % 16
    last = made.step(end - end % 16, end)
    assert last.taken == end % 16 and len(last.rows) == 16
    eaten = np.concatenate([*(made.step(16 * s, end).rows[r] for s in range(end // 16) for r in range(16))])
    assert sorted([*eaten, *np.concatenate(last.rows)]) == list(range(500))
    cost = np.array([row_cost(made.costs, row) for row in last.rows])
    largest = sample_work(made.costs, np.concatenate(last.rows)).max()
    assert cost.max() <= max(1.3 * cost.mean(), largest), "no row holds two where another holds none"
    half = made.end_row(1.5)
    assert end < half < end + len(made.epoch(1))
    # a run that is made longer continues with the first row that was not taken
    assert made.steps_between(end, made.end_row(2)) == -(-len(made.epoch(1)) // 16)


def test_targets_are_those_of_all_rows() -> None:
    made = plan()
    for step in (made.step(40), made.step(made.end_row(1) - 3, made.end_row(1))):
        assert step.targets == sum(made.costs.targets[sample] for row in step.rows for sample in row)


def test_ranks_of_a_micro_step_make_the_same_vision_calls_and_similar_work() -> None:
    made = plan(global_batch=16)
    ranks = [rank_rows(made.step(0), made.costs, dp_rank=r, dp_size=4, vision_chunk=8) for r in range(4)]
    assert all(len(rank) == 4 for rank in ranks)
    for micro in range(4):
        calls = {rank[micro].vision_calls for rank in ranks}
        assert len(calls) == 1
        views = max(
            int(made.costs.tiles[r[micro].samples].sum() + made.costs.images[r[micro].samples].sum())
            for r in ranks
        )
        assert calls == {max(1, -(-views // 8))}
    cost = np.array([row_cost(made.costs, row) for row in made.step(0).rows])
    dealt = deal_rows(cost, 4)
    assert sorted(dealt.ravel()) == list(range(16))
    assert all(cost[micro].min() >= cost[later].max() for micro, later in zip(dealt, dealt[1:], strict=False))


def test_over_long_samples_are_dropped_or_refused() -> None:
    with pytest.raises(
        BadInputError, match=r"of 500 samples are longer than data.seq_len=200 \(longest: 2\d\d\)"
    ):
        plan(seq_len=200)
    made = plan(seq_len=200, over_long="drop")
    assert made.dropped == int((made.costs.tokens > 200).sum()) > 0
    assert len(made.epoch(0).samples) == 500 - made.dropped
    with pytest.raises(BadInputError, match="no sample fits"):
        plan(seq_len=16, over_long="drop")


@pytest.mark.parametrize(("seq_len", "samples"), [(8192, 40_000), (131_072, 400_000)])
def test_a_log_normal_mix_fills_its_rows_and_keeps_ranks_equally_busy(seq_len: int, samples: int) -> None:
    mix = log_normal(samples, seq_len)
    made = Plan(mix, seq_len, 0, global_batch=64)
    assert made.fill(0) > 0.985
    for dp_size in (8, 64):
        imbalance = step_imbalance(made, dp_size, 100)
        assert imbalance.mean() < 1.05
    assert np.quantile(step_imbalance(made, 8, 100), 0.99) < 1.15


def test_a_stretch_of_training_reads_few_shards_and_every_epoch_others_first() -> None:
    mix = log_normal(200_000, 8192)
    layout = Layout((np.arange(200_000) // 500).astype(np.int32), (0, 200_000))
    made = Plan(mix, 8192, 0, global_batch=8, layout=layout)
    firsts = []
    for epoch in (0, 1):
        rows = made.epoch(epoch)
        shards = layout.shards[rows.samples]
        places = [np.flatnonzero(shards == shard) for shard in range(0, 400, 7)]
        # a shard is read within a window and what waits for the next one
        assert np.mean([np.ptp(p) / len(shards) for p in places]) < 0.2
        assert len(np.unique(shards[:2000])) < 50
        firsts.append(set(shards[:2000].tolist()))
    assert len(firsts[0] & firsts[1]) < 25


def test_a_mixture_keeps_its_proportions_and_uses_every_sample_before_any_again() -> None:
    layout = Layout((np.arange(1000) // 50).astype(np.int32), (0, 900, 1000), (1.0, 3.0))
    usable = np.arange(1000)
    assert epoch_draws(layout, usable) == [250, 750]
    used = np.zeros(1000, int)
    for epoch in range(4):
        big, small = epoch_samples(layout, usable, 5, epoch=epoch, shuffle=True)
        assert len(big) == 250 and len(small) == 750 and big.max() < 900 <= small.min()
        used += np.bincount(np.concatenate([big, small]), minlength=1000)
    assert sorted(np.unique(used[:900])) == [1, 2] and used[:900].sum() == 1000
    assert np.unique(used[900:]).tolist() == [30]
    made = plan(costs=costs(1000), layout=layout)
    again = plan(costs=costs(1000), layout=layout)
    assert np.array_equal(made.epoch(1).samples, again.epoch(1).samples)
    assert sum(sample >= 900 for sample in made.epoch(1).samples) == 750
    assert len(plan(costs=costs(1000), layout=Layout(layout.shards, layout.bounds)).epoch(0).samples) == 1000


def test_a_plan_is_kept_and_one_that_is_damaged_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(writer: bool) -> Plan:
        return Plan(
            log_normal(30_000, 8192), 8192, 0, global_batch=8, files=PlanFiles(tmp_path, "key", writer)
        )

    nobody = kept(writer=False)
    nobody.epoch(1)
    assert not list(tmp_path.iterdir())
    first = kept(writer=True)
    end = first.end_row(6)
    rows = first.epoch(5)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [*(f"plan-key.epoch-00000{n}.npy" for n in range(6)), "plan-key.rows.npy"]
    # with room for three: the first three are planned ahead, later ones take the room of those gone by
    size = (tmp_path / names[0]).stat().st_size
    monkeypatch.setattr(plan_files, "_MOST_BYTES", int(3.5 * size))
    for file in tmp_path.iterdir():
        file.unlink()
    small = kept(writer=True)
    small.plan_ahead(end)
    assert [file.name[15:-4] for file in sorted(tmp_path.glob("*.epoch-*"))] == ["000000", "000001", "000002"]
    small._epochs.clear()
    small.epoch(5)
    assert [file.name[15:-4] for file in sorted(tmp_path.glob("*.epoch-*"))] == ["000001", "000002", "000005"]
    again = kept(writer=False)
    again._make = None  # type: ignore[assignment]  # it is not made again
    assert again.end_row(6) == end
    assert np.array_equal(again.epoch(5).samples, rows.samples)
    assert np.array_equal(again.step(end - 8).rows[3], first.step(end - 8).rows[3])
    file = tmp_path / "plan-key.epoch-000005.npy"
    for damage in (file.read_bytes()[:-80], b"", b"not an array"):
        file.write_bytes(damage)
        assert np.array_equal(kept(writer=True).epoch(5).samples, rows.samples)
    (tmp_path / "plan-key.rows.npy").write_bytes(b"?")
    assert kept(writer=True).end_row(6) == end


def test_the_work_of_a_row_follows_the_flops_of_the_published_model() -> None:
    """Linear layers, attention within documents, the tower on every view; without the loss head."""
    run = RunConfig.model_validate(
        {"name": "x", "model": {"config": {}}, "data": {"path": "x"}, "train": {"steps": 1}}
    )
    # samples: text of 1000, 3000 and 60,000 tokens, and one of 2500 with 2 images of 15 tiles in all
    made = SampleCosts(
        np.array([1000, 3000, 60_000, 2500]), np.zeros(4), np.array([0, 0, 0, 15]), np.array([0, 0, 0, 2])
    )
    rows = [[0], [0, 0, 0], [1], [2], [3]]
    flops = []
    for row in rows:
        views = int(sum(made.tiles[n] + made.images[n] for n in row))
        shape = RowShape([int(made.tokens[n]) for n in row], views, targets=0)
        flops.append(row_flops(run, Phi3VConfig(), shape).model)
    work = np.array([row_cost(made, np.array(row)) for row in rows])
    assert work / work[0] == pytest.approx(np.array(flops) / flops[0], rel=0.05)
    assert work[1] < work[2], "three documents never attend to each other"


def test_ranks_get_equal_work() -> None:
    assert deal_rows(np.ones(8), 8).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    cost = np.array([5.0, 1.0, 2.0, 4.0])
    assert cost[deal_rows(cost, 2)].sum(axis=0).tolist() == [6.0, 6.0]
