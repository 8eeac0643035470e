"""From a dataset directory to packed rows: counts agree with what is made, damage is contained."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from phi3v_dist.data.collate import Document, collate
from phi3v_dist.data.loader import LoadedRow, RowMaker, load_rows
from phi3v_dist.data.plan import Plan
from phi3v_dist.data.reader import SampleReader
from phi3v_dist.data.samples import keep_samples, open_samples, read_samples, samples_fingerprint
from phi3v_dist.data.tokens import Counter, SampleCosts, keep_costs, load_costs, sample_costs
from phi3v_dist.processor.tokenizer import load_tokenizer, train_tokenizer
from shards.common.errors import BadInputError
from shards.format.index import read_index
from tests.data.only_rank import only_rank

TILE = 112


@pytest.fixture(scope="module")
def maker(products: Path, tmp_path_factory: pytest.TempPathFactory) -> RowMaker:
    folder = tmp_path_factory.mktemp("tokenizer")
    index = read_index(str(products), "train", ["messages"])
    train_tokenizer((m["content"] for ms in index["messages"].to_pylist() for m in ms), folder, 400)
    tokenizer = load_tokenizer(folder)
    keep_samples(read_samples([str(products)], "train"), folder / "samples.arrow")
    samples = open_samples([str(products)], folder / "samples.arrow")
    return RowMaker(samples, tokenizer, 4, tile=TILE)


@pytest.fixture(scope="module")
def costs(maker: RowMaker) -> SampleCosts:
    return sample_costs(maker.samples, Counter(maker.tokenizer, 4, TILE))


def rows(maker: RowMaker, costs: SampleCosts, workers: int = 0) -> list[LoadedRow]:
    plan = Plan(costs, 700, 0, global_batch=2)
    mine = only_rank(plan)
    return list(load_rows(maker, mine, workers, prefetch=2, timeout_s=60))


def test_counts_from_the_index_are_those_of_the_made_rows(maker: RowMaker, costs: SampleCosts) -> None:
    made = rows(maker, costs)
    assert sum(row.tokens for row in made) == costs.tokens.sum()
    assert sum(row.row.num_targets for row in made) == costs.targets.sum()
    assert sum(len(row.row.tiles) for row in made) == costs.tiles.sum()
    assert sum(row.images for row in made) == costs.images.sum() == len(maker.samples)
    assert sum(len(row.row.image_positions) for row in made) == sum(
        (r * c + 1) * 16 + 1 + (r + 1) * 4 for row in made for r, c in row.row.grids.tolist()
    )
    for loaded in made:
        row = loaded.row
        bounds = row.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(row.input_ids) and len(row.input_ids) % 64 == 0
        for start, end in zip(bounds, bounds[1:], strict=False):
            assert row.position_ids[start:end].tolist() == list(range(end - start))
            assert row.labels[start] == -100
        assert row.tiles.dtype == torch.uint8
        learnt = row.labels != -100
        assert torch.equal(row.labels[learnt], row.input_ids[learnt])


def test_labels_are_the_reply_and_its_end(maker: RowMaker) -> None:
    (record,) = maker.samples.records([3])
    loaded = maker.document(record, maker.reader())
    assert loaded.bad is None and loaded.masked == 0
    learnt = [token for token in loaded.document.labels if token != -100]
    assert maker.tokenizer.decode(learnt).strip() == record.messages[-1]["content"] + "<|end|>"


def test_workers_change_nothing(maker: RowMaker, costs: SampleCosts) -> None:
    here, there = rows(maker, costs), rows(maker, costs, workers=2)
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        for name in ("input_ids", "labels", "cu_seqlens", "tiles", "grids"):
            assert torch.equal(getattr(one.row, name), getattr(other.row, name))


def test_counts_are_the_same_from_several_processes_and_from_a_file(
    maker: RowMaker, costs: SampleCosts, tmp_path: Path
) -> None:
    counter = Counter(maker.tokenizer, 4, TILE)
    shards = maker.samples.shard_numbers()
    keep_costs(costs, shards, tmp_path / "costs.npy")
    kept, kept_shards = load_costs(tmp_path / "costs.npy")
    for other in (sample_costs(maker.samples, counter, processes=2), kept):
        assert all(
            np.array_equal(a, b) for a, b in zip(vars(other).values(), vars(costs).values(), strict=True)
        )
    assert np.array_equal(shards, kept_shards)
    assert len(np.unique(shards)) == len({r.shard for r in maker.samples.records(range(len(shards)))})
    (tmp_path / "costs.npy").write_bytes(b"half")
    with pytest.raises(BadInputError, match="damaged"):
        load_costs(tmp_path / "costs.npy")


def test_files_are_named_after_all_that_shapes_them(maker: RowMaker, products: Path, tmp_path: Path) -> None:
    counter = Counter(maker.tokenizer, 4, TILE)
    assert counter.key() == Counter(maker.tokenizer, 4, TILE).key()
    assert len({Counter(maker.tokenizer, n, t).key() for n in (1, 4) for t in (112, 336)}) == 4
    whole = samples_fingerprint([str(products)], "train")
    assert whole != samples_fingerprint([str(products)], "val")
    assert whole != samples_fingerprint([str(products)] * 2, "train")
    shutil.copytree(products, tmp_path / "copy")
    assert samples_fingerprint([str(tmp_path / "copy")], "train") == whole
    part = next((tmp_path / "copy/index").glob("*.parquet"))
    part.write_bytes(part.read_bytes() + b" ")
    assert samples_fingerprint([str(tmp_path / "copy")], "train") != whole


def test_two_data_sets_are_numbered_one_after_the_other(maker: RowMaker, products: Path) -> None:
    both = read_samples([str(products), str(products)], "train")
    half = len(both) // 2
    assert both.bounds() == (0, half, 2 * half)
    assert len(np.unique(both.shard_numbers())) == 2 * len(np.unique(maker.samples.shard_numbers()))
    first, second = both.records([1, half + 1])
    assert replace(second, source=0) == first and second.source == 1
    assert list(both.take([half + 1]).records([0])) == [second]
    reader = SampleReader(both.roots, both.shards)
    assert reader.images(first) == reader.images(second)
    assert len(read_samples([str(products)], "none", may_lack=True)) == 0


def test_the_reader_reads_any_fsspec_store_alike_and_stays_in_its_directory(products: Path) -> None:
    record = next(read_samples([str(products)], "train").records([0]))
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe(f"/set/{record.shard}", (products / record.shard).read_bytes())
    assert SampleReader("memory://set").images(record) == SampleReader(str(products)).images(record)
    for name in ("../x.tar", "/etc/passwd", "a/b.tar"):
        with pytest.raises(BadInputError, match="not a file name"):
            SampleReader(str(products)).images(replace(record, shard=name))
    with pytest.raises(BadInputError, match="cannot be read"):
        SampleReader(str(products)).images(replace(record, shard="none.tar"))


def test_a_row_of_nothing_is_padding() -> None:
    row = collate([], pad_id=3, tile=TILE, vision_calls=2)
    assert row.input_ids.tolist() == [3] * 64 and row.num_targets == 0
    assert row.cu_seqlens.tolist() == [0, 64] and len(row.tiles) == len(row.grids) == 0


def test_text_alone_packs_beside_pictures() -> None:
    text = Document([1, 5, 6], [-100, -100, 6], np.empty((0, 3, TILE, TILE), np.uint8), [])
    image = Document([1, -1, -1, 7], [-100, -100, -100, 7], np.ones((2, 3, TILE, TILE), np.uint8), [(1, 2)])
    row = collate([text, image, text], pad_id=0, tile=TILE, vision_calls=1, pad_multiple=5)
    assert row.input_ids.tolist() == [1, 5, 6, 1, -1, -1, 7, 1, 5, 6]
    assert row.cu_seqlens.tolist() == [0, 3, 7, 10]
    assert row.image_positions.tolist() == [4, 5]
    assert row.tiles.shape == (2, 3, TILE, TILE)
