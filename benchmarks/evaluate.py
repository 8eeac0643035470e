"""Generation under ZeRO-3: weights gathered once, against layers gathered for every token.

    python benchmarks/evaluate.py [--ranks 2] [--samples 8] [--tokens 64] [--json PATH]

The model of configs/tiny.yaml with its initial weights answers questions about generated products, on ranks
that communicate over gloo. Ours: a complete copy is gathered from the partitioned engine (this time is
counted), then each rank answers its share in batches. First peer: generate() on the partitioned model, one
question at a time, as the published processor makes them. Second peer: the same in batches, so that only the
gathering differs. The script checks that all answers are equal. One thread per rank; the ways take turns;
medians.
"""

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.record import Comparison, report

BAR = 5.0


def rank(folder: Path, samples: int, tokens: int, rounds: int) -> None:
    """Runs on every rank. Rank 0 prints the seconds of each round: ours, first peer, second peer."""
    import torch

    from phi3v_dist.checkpoint.restore import Restored, find_source, restore_partitioned
    from phi3v_dist.config import load_config
    from phi3v_dist.engine.zero import prepare_deepspeed
    from phi3v_dist.evaluation.generate import generate_all
    from phi3v_dist.evaluation.prompts import Prompts, read_split
    from phi3v_dist.evaluation.whole import gather_weights
    from phi3v_dist.parallel.mesh import open_mesh
    from phi3v_dist.pretrained import prepare_pretrained

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    recipe = Path(__file__).resolve().parents[1] / "configs/tiny.yaml"
    config = load_config(recipe, [f"runs_dir={folder}", f"data.path={folder / 'shards'}"])
    with open_mesh(600) as mesh:
        pretrained = prepare_pretrained(config, config.run_dir, mesh)
        prepare_deepspeed(mesh)
        parts = restore_partitioned(find_source(pretrained.model_dir), mesh.device, torch.float32)
        prompts = Prompts(read_split([str(folder / "shards")], "train", samples))
        for turn in range(rounds + 1):
            seconds, answers = [], []
            for way, batch in (("whole", 8), ("parts", 1), ("parts", 8)):
                mesh.barrier()
                began = time.perf_counter()
                restored = parts
                if way == "whole":
                    engine = SimpleNamespace(module=parts.model)
                    copy = gather_weights(engine, parts.config, torch.float32, device=mesh.device)
                    restored = Restored(copy, parts.config, parts.processor, mesh.device, torch.float32)
                answers.append(
                    generate_all(restored, prompts, mesh, batch_size=batch, max_new_tokens=tokens)[0]
                )
                mesh.barrier()
                seconds.append(time.perf_counter() - began)
            if answers[0] != answers[1] or answers[0] != answers[2]:
                raise SystemExit("the ways give different answers")
            if mesh.is_main and turn:
                print("seconds", *seconds, flush=True)


def main() -> int:
    """Measures all ways. Returns the exit status."""
    parser = argparse.ArgumentParser(description="generation under ZeRO-3")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.rank_in is not None:
        rank(options.rank_in, options.samples, options.tokens, options.rounds)
        return 0
    from shards.build import BuildOptions, build
    from shards.sample import make_catalogue

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_catalogue(folder / "catalogue", 4 * options.samples, seed=0)
        table = str(folder / "catalogue/products.csv")
        build(table, str(folder / "shards"), BuildOptions(group_by="product_code"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={options.ranks}", str(Path(__file__).resolve()), "--rank-in", scratch]
        command += ["--samples", str(options.samples), "--tokens", str(options.tokens)]
        command += ["--rounds", str(options.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    rounds = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("seconds")]
    if done.returncode or len(rounds) != options.rounds:
        print(done.stdout[-2000:], done.stderr[-6000:], file=sys.stderr)
        return 1
    ours, *theirs = (statistics.median(float(r[way]) for r in rounds) for way in (0, 1, 2))
    ratios = [statistics.median(float(r[way]) / float(r[0]) for r in rounds) for way in (1, 2)]
    what = f"{options.samples} answers of {options.tokens} tokens on {options.ranks} ranks, gathered once"
    naive = "every layer gathered for every token of every question"
    bar = f">= {BAR:g} times faster"
    found = [
        Comparison(what, naive, ours, theirs[0], "s", ratios[0], bar, ratios[0] >= BAR),
        Comparison(what, "the same, in our batches", ours, theirs[1], "s", ratios[1]),
    ]
    return report("evaluate", found, options.json)


if __name__ == "__main__":
    sys.exit(main())
