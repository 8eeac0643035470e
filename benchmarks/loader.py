"""The loader against webdataset with the published image steps, on the same shards and cores.

    python benchmarks/loader.py [--samples 400] [--rounds 3] [--json PATH]

Photos of 1200 x 900 px, num_crops 16, two worker processes each way. Theirs: a webdataset pipeline that
streams the tars, tokenises, and makes float32 views with the steps of the published processor (see
image_processor.py), in a torch DataLoader. Ours: the plan's packed rows from `load_rows`. Both end with
tensors for the model in the main process. The second comparison reads the bytes of every image once and
decodes nothing: ours by ranged reads in the plan's shuffled order, theirs one tar after the other; small
images, warm page cache, one process. The ways take turns, so that other load slows both; medians.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.image_processor import photo, published
from benchmarks.record import Comparison, report
from phi3v_dist.data.epoch import Layout
from phi3v_dist.data.loader import RowMaker, load_rows
from phi3v_dist.data.plan import Plan, RankRows
from phi3v_dist.data.reader import SampleReader
from phi3v_dist.data.samples import Samples, keep_samples, open_samples, read_samples
from phi3v_dist.data.tokens import Counter, sample_costs
from phi3v_dist.processor.geometry import hd_grid, image_token_count
from phi3v_dist.processor.prompt import encode
from phi3v_dist.processor.tokenizer import load_tokenizer, train_tokenizer
from shards.build import BuildOptions, build

NUM_CROPS, SEQ_LEN, WORKERS = 16, 16_384, 2
GRID = hd_grid(1200, 900, NUM_CROPS)
IMAGE_TOKENS = image_token_count(GRID.rows, GRID.cols)
SPEED_BAR, READ_BAR = 2.5, 5.0


def dataset(folder: Path, samples: int, images: list[bytes]) -> Path:
    """Shards of `samples` samples that use the images in turn; no two files have equal bytes."""
    (folder / "images").mkdir(parents=True)
    lines = ["image,name"]
    for number in range(samples):
        data = images[number % len(images)]
        comment = b"%012d" % number
        data = data[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + data[2:]
        (folder / f"images/{number:06d}.jpg").write_bytes(data)
        lines.append(f"images/{number:06d}.jpg,image number {number} of many")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    options = BuildOptions(
        ("image",), "What is it?", "{name}", decode="none", val_fraction=0.0, shard_samples=200
    )
    build(str(folder / "table.csv"), str(folder / "shards"), options)
    return folder / "shards"


def opened(root: Path) -> Samples:
    """The samples as in training: mapped from a file."""
    keep_samples(read_samples([str(root)], "train"), root.parent / "samples.arrow")
    return open_samples([str(root)], root.parent / "samples.arrow")


class Theirs:
    """What a webdataset user maps over the samples. A class, because the workers receive it by pickle."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, sample: dict[str, bytes]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        text = encode(self._tokenizer, json.loads(sample["json"])["messages"], [IMAGE_TOKENS])
        pixels = published(sample["jpg"], NUM_CROPS)
        return torch.tensor(text.input_ids), torch.tensor(text.labels), pixels


def pipeline(root: Path, tokenizer: Any) -> int:
    """Runs the webdataset pipeline over all shards; returns the number of samples."""
    tars = sorted(str(tar) for tar in root.glob("*.tar"))
    stream = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).map(Theirs(tokenizer))
    loader = DataLoader(stream, batch_size=None, num_workers=WORKERS, multiprocessing_context="forkserver")
    return sum(1 for _ in loader)


def packed(maker: RowMaker, plan: Plan) -> int:
    """Runs our loader over one epoch; returns the number of samples."""
    rows = RankRows(
        plan,
        dp_rank=0,
        dp_size=1,
        vision_chunk=64,
        first_row=0,
        steps=plan.steps_of(1),
        end_row=plan.end_row(1),
    )
    return sum(loaded.samples for loaded in load_rows(maker, rows, WORKERS, prefetch=2, timeout_s=600))


def throughput(folder: Path, samples: int, rounds: int) -> Comparison:
    """Photos decoded and tiled: our loader against a webdataset pipeline."""
    root = dataset(folder, samples, [photo(1200, 900) for _ in range(4)])
    kept = opened(root)
    tokenizer = _small_tokenizer(folder, kept)
    maker = RowMaker(kept, tokenizer, NUM_CROPS, tile=336)
    costs = sample_costs(kept, Counter(tokenizer, NUM_CROPS, 336))
    plan = Plan(costs, SEQ_LEN, 0, global_batch=4, layout=Layout(kept.shard_numbers(), kept.bounds()))
    speeds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for place, way in enumerate((lambda: packed(maker, plan), lambda: pipeline(root, tokenizer))):
            began = time.perf_counter()
            assert way() == samples
            if number:  # the first round starts servers and fills caches
                speeds[place].append(samples / (time.perf_counter() - began))
    ours, theirs = map(statistics.median, speeds)
    return Comparison(
        f"model-ready images, {WORKERS} workers", "webdataset + published steps", ours, theirs, "samples/s",
        ours / theirs, f"{SPEED_BAR} or more", ours / theirs >= SPEED_BAR,
    )  # fmt: skip


def raw_reads(folder: Path, samples: int, rounds: int) -> Comparison:
    """Small images, not decoded: reads in the order of the plan against reads of whole tars."""
    small = io.BytesIO()
    Image.open(io.BytesIO(photo(1200, 900))).resize((320, 240)).save(small, "JPEG", quality=85)
    root = dataset(folder, samples, [small.getvalue()])
    kept = opened(root)
    order = Plan(
        sample_costs(kept, Counter(_small_tokenizer(folder, kept), 1, 336)), 8192, 0, global_batch=4
    ).epoch(0).samples  # fmt: skip
    tars = sorted(str(tar) for tar in root.glob("*.tar"))

    def ours() -> int:
        reader = SampleReader(kept.roots, kept.shards)
        return sum(len(reader.images(record)) for record in kept.records(order, texts=False))

    def theirs() -> int:
        return sum(1 for _ in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))

    speeds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for place, way in enumerate((ours, theirs)):
            began = time.perf_counter()
            assert way() == samples
            if number:
                speeds[place].append(samples / (time.perf_counter() - began))
    fast, slow = map(statistics.median, speeds)
    return Comparison(
        "bytes of an image, shuffled", "webdataset, one tar after the other", fast, slow, "samples/s",
        fast / slow, f"{READ_BAR} or more", fast / slow >= READ_BAR,
    )  # fmt: skip


def _small_tokenizer(folder: Path, kept: Samples) -> Any:
    records = kept.records(range(min(40, len(kept))))
    train_tokenizer((m["content"] for r in records for m in r.messages), folder / "t", 400)
    return load_tokenizer(folder / "t")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            throughput(Path(folder) / "photos", options.samples, options.rounds),
            raw_reads(Path(folder) / "small", 10 * options.samples, options.rounds),
        ]
    return report("loader", found, options.json)


if __name__ == "__main__":
    sys.exit(main())
