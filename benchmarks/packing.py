"""Useful tokens a second: packed rows against the seed's recipe, one sample a batch, padded to 512.

    python benchmarks/packing.py [--samples 96] [--json PATH]

The same model (configs/tiny.yaml) and the same synthetic samples, forward and backward in one process, in
plain torch. Useful tokens are those of documents, not padding. Both ways compute the loss on the answers
alone, which the recipe of the seed does not. One thread; the ways take turns; medians.
"""

import argparse
import dataclasses
import logging
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks.record import Comparison, report
from phi3v_dist.config import load_config
from phi3v_dist.data.collate import Document, collate
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.modeling import Phi3VForCausalLM
from phi3v_dist.model.row import PackedRow
from phi3v_dist.processor.geometry import image_token_count, tile_side_tokens, vision_calls_needed

PADDED, ROW, VISION_CHUNK = 512, 4096, 64


def documents(count: int, tile: int, tokens_of_image: int) -> list[Document]:
    """One-tile images with a short question and answer, as in the catalogue: 100 to 140 tokens."""
    random = np.random.RandomState(0)
    found = []
    for _ in range(count):
        text = int(random.randint(60, 100))
        ids = [1, *([-1] * tokens_of_image), *random.randint(5, 500, size=text).tolist()]
        labels = [-100] * (len(ids) - 40) + ids[-40:]
        tiles = random.randint(0, 256, size=(1, 3, tile, tile), dtype=np.uint8)
        found.append(Document(ids, labels, tiles, [(1, 1)]))
    return found


def packed(samples: list[Document], tile: int) -> list[PackedRow]:
    """The samples in rows of at most ROW positions."""
    rows: list[list[Document]] = [[]]
    for sample in samples:
        if sum(len(each.input_ids) for each in rows[-1]) + len(sample.input_ids) > ROW:
            rows.append([])
        rows[-1].append(sample)
    calls = [vision_calls_needed(len(row), len(row), VISION_CHUNK) for row in rows]
    return [collate(row, 0, tile, vision_calls=count) for row, count in zip(rows, calls, strict=True)]


def padded(samples: list[Document], tile: int) -> list[PackedRow]:
    """Each sample in a row of its own, padded to PADDED positions; the padding takes part in attention."""
    rows = []
    for sample in samples:
        short = PADDED - len(sample.input_ids)
        whole = dataclasses.replace(
            sample, input_ids=[*sample.input_ids, *[0] * short], labels=[*sample.labels, *[-100] * short]
        )
        rows.append(collate([whole], 0, tile, vision_calls=vision_calls_needed(1, 1, VISION_CHUNK)))
    return rows


def main() -> int:
    """Measures both ways. Returns the exit status."""
    parser = argparse.ArgumentParser(description="packing against padding")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)

    fields = load_config(Path(__file__).parents[1] / "configs/tiny.yaml").model.config
    config = Phi3VConfig(**{"vocab_size": 512, "pad_token_id": 0, **(fields or {})})
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Phi3VForCausalLM(config).train()
    model.vision_chunk = VISION_CHUNK
    tile = config.tile
    samples = documents(options.samples, tile, image_token_count(1, 1, tile_side_tokens(tile)))
    ways = {"packed": packed(samples, tile), "padded": padded(samples, tile)}
    useful = sum(len(sample.input_ids) for sample in samples)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(options.rounds + 1):
        for way, rows in ways.items():
            start = time.perf_counter()
            for row in rows:
                model(row=row).backward()
            model.zero_grad()
            if turn:
                seconds[way].append(time.perf_counter() - start)
    ours, theirs = (useful / statistics.median(seconds[way]) for way in ("packed", "padded"))
    comparison = Comparison(
        f"useful tokens a second, forward and backward, {options.samples} products",
        f"batch 1 padded to {PADDED} (the seed's recipe)",
        ours,
        theirs,
        "tokens/s",
        ours / theirs,
        "faster",
        ours > theirs,
    )
    return report("packing", [comparison], options.json)


if __name__ == "__main__":
    sys.exit(main())
