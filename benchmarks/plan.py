"""Planning: how full the rows are, how equal the work of the ranks, how much time and memory it takes.

    python benchmarks/plan.py [--large 10000000] [--json PATH]

Lengths: a log-normal mix (mean 1,100 tokens, two thirds with images), and those of the sample catalogue
(drawn at random from its 2,000 products). The peer packs samples greedily in shuffled order and gives rows to
ranks in turn. Planning and resuming are measured in processes of their own, from costs and shard numbers in
memory to the rows of a step; they are compared with the bar only. CPU seconds, because the machine may have
other work.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks.record import Comparison, report
from phi3v_dist.data.describe import step_imbalance
from phi3v_dist.data.epoch import Layout
from phi3v_dist.data.plan import Plan, sample_work
from phi3v_dist.data.plan_files import PlanFiles
from phi3v_dist.data.tokens import SampleCosts

BATCH = 64
SMALL_BATCH = 8  # makes step 100,000 the sixth epoch or so


def log_normal(samples: int, seq_len: int) -> SampleCosts:
    """Lengths as those of chats: median 665 tokens, two thirds with images."""
    random = np.random.default_rng(0)
    tokens = np.minimum(random.lognormal(6.5, 1, samples).astype(np.int64) + 1, seq_len)
    views = tokens // 200 * (random.random(samples) < 0.67)
    return SampleCosts(tokens, tokens // 5, views * 16 // 17, views - views * 16 // 17)


def catalogue(samples: int, tile: int, num_crops: int) -> SampleCosts:
    """Costs of samples drawn at random from the sample catalogue."""
    from phi3v_dist.data.samples import read_samples
    from phi3v_dist.data.tokens import Counter, sample_costs
    from phi3v_dist.processor.tokenizer import load_tokenizer, train_tokenizer
    from shards.build import BuildOptions, build
    from shards.sample import make_catalogue

    with tempfile.TemporaryDirectory() as folder:
        table = make_catalogue(Path(folder) / "catalogue", 2000)
        build(str(table), f"{folder}/shards", BuildOptions(group_by="product_code"))
        drawn = read_samples([f"{folder}/shards"], "train")
        messages = (m for record in drawn.records(range(len(drawn))) for m in record.messages)
        train_tokenizer((m["content"] for m in messages), Path(folder) / "tokenizer", 512)
        tokenizer = load_tokenizer(Path(folder) / "tokenizer")
        costs = sample_costs(drawn, Counter(tokenizer, num_crops, tile))
    chosen = np.random.default_rng(0).integers(0, len(costs), samples)
    return SampleCosts(*(getattr(costs, n)[chosen] for n in ("tokens", "targets", "tiles", "images")))


def greedy(costs: SampleCosts, seq_len: int) -> tuple[float, dict[int, np.ndarray]]:
    """Fill, and the imbalance of each step by number of ranks, of rows packed in shuffled order."""
    order = np.random.default_rng(0).permutation(len(costs))
    rows, used = np.zeros(len(order), np.int64), 0
    row = 0
    for place, need in enumerate(costs.tokens[order].tolist()):
        if used + need > seq_len:
            row, used = row + 1, 0
        used += need
        rows[place] = row
    work = np.bincount(rows, sample_work(costs)[order])
    steps = work[: len(work) // BATCH * BATCH].reshape(-1, BATCH)
    found = {}
    for ranks in (8, 64):
        sums = steps.reshape(len(steps), -1, ranks).sum(axis=1)
        found[ranks] = sums.max(axis=1) / sums.mean(axis=1)
    return float(costs.tokens.sum() / ((row + 1) * seq_len)), found


def quality(name: str, costs: SampleCosts, seq_len: int) -> list[Comparison]:
    """Fill of the rows and balance of the ranks, against greedy packing."""
    plan = Plan(costs, seq_len, 0, global_batch=BATCH)
    fill, theirs = plan.fill(0), greedy(costs, seq_len)
    peer = "greedy in shuffled order"
    found = [
        Comparison(f"fill, {name}, {seq_len}", peer, fill, theirs[0], "of positions", fill / theirs[0],
                   f"ours {fill:.4f}, at least 0.985", fill >= 0.985)
    ]  # fmt: skip
    for ranks in (8, 64):
        ours = step_imbalance(plan, ranks, 10**9)[:-1]  # the last step is that of a run which ends there
        if not len(ours):
            continue
        for what, one, other, bar in (
            ("mean", ours.mean(), theirs[1][ranks].mean(), 1.05),
            ("worst 1%", np.quantile(ours, 0.99), np.quantile(theirs[1][ranks], 0.99), 1.15),
        ):
            found.append(
                Comparison(
                    f"busiest of {ranks} ranks, {what}, {name}, {seq_len}", peer, float(one), float(other),
                    "x mean work", float(other / one), f"ours {one:.3f} x the mean work, at most {bar}",
                    bool(one <= bar),
                )
            )  # fmt: skip
    return found


def plan_alone(samples: int) -> dict[str, float]:
    """Planning, then resuming at steps 0 and 100,000 from the files. Runs in a process of its own."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    costs = log_normal(samples, 8192)
    layout = Layout((np.arange(samples) // 1000).astype(np.int32), (0, samples))
    with tempfile.TemporaryDirectory() as folder:

        def plan(batch: int) -> Plan:
            files = PlanFiles(Path(folder), f"batch-{batch}", True)
            return Plan(costs, 8192, 0, global_batch=batch, layout=layout, files=files)

        began, wall = time.process_time(), time.perf_counter()
        plan(BATCH).step(0)
        found = {"cpu": time.process_time() - began, "wall": time.perf_counter() - wall}
        found["memory"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        if samples <= 1_000_000:
            for row in (0, 100_000 * SMALL_BATCH):
                plan(SMALL_BATCH).step(row)
                times = []
                for _ in range(3):
                    began = time.perf_counter()
                    plan(SMALL_BATCH).step(row)
                    times.append(time.perf_counter() - began)
                found[f"step {row // SMALL_BATCH}"] = min(times)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", type=int, default=10_000_000, help="samples of the large plan; 0: none")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(plan_alone(options.alone)))
        return 0
    found = []
    for samples, seconds in ((1_000_000, 20.0), (options.large, 240.0)):
        if not samples:
            continue
        command = [sys.executable, __file__, "--alone", str(samples)]
        took = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{samples:,} samples: {took['cpu']:.1f} CPU s, {took['wall']:.1f} s by the clock")
        found.append(
            Comparison(f"planning {samples:,} samples", "the bar", took["cpu"], seconds, "CPU s",
                       seconds / took["cpu"], f">= 1 ({seconds:g} CPU s)", took["cpu"] <= seconds)
        )  # fmt: skip
        if samples == 1_000_000:
            ours, first = took["step 100000"], took["step 0"]
            found.append(
                Comparison("memory of that", "the bar", took["memory"], 1.5, "GiB", 1.5 / took["memory"],
                           ">= 1 (1.5 GiB)", took["memory"] <= 1.5)
            )  # fmt: skip
            found.append(
                Comparison("resuming at step 100,000", "at step 0", ours, first, "s",
                           first / ours, "each below 1 s", ours <= 1.0)
            )  # fmt: skip
    for seq_len in (8192, 131_072):
        found += quality("log-normal mix", log_normal(1_000_000, seq_len), seq_len)
    found += quality("catalogue, tiny.yaml", catalogue(400_000, 112, 1), 8192)
    found += quality("catalogue, num_crops 16", catalogue(200_000, 336, 16), 131_072)
    return report("plan", found, options.json)


if __name__ == "__main__":
    sys.exit(main())
