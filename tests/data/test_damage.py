"""Storage that misbehaves: shards damaged, gone, replaced; workers killed; copies on the node."""

import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from phi3v_dist.data import reader as reader_module
from phi3v_dist.data.loader import LoadedRow, RowMaker, load_rows
from phi3v_dist.data.node_cache import CacheOptions, copy_name
from phi3v_dist.data.plan import Plan, RankRows
from phi3v_dist.data.reader import SampleReader
from phi3v_dist.data.samples import read_samples
from phi3v_dist.data.tokens import Counter, images_that_fit, sample_costs, truncated_costs
from phi3v_dist.processor.tokenizer import load_tokenizer, train_tokenizer
from phi3v_dist.train.guards import allowed_bad_samples as allowed
from shards.build import BuildOptions, build
from shards.common.errors import BadInputError
from shards.format.index import read_index
from shards.sample import make_catalogue
from tests.data.only_rank import only_rank
from tests.waiting import wait_for

TILE = 112


@pytest.fixture(scope="module")
def tokenizer(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    messages = read_index(str(products), "train", ["messages"])["messages"].to_pylist()
    train_tokenizer((m["content"] for ms in messages for m in ms), folder, 400)
    return load_tokenizer(folder)


@pytest.fixture
def copy(products: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(products, tmp_path / "copy"))


def maker(root: Path | str, tokenizer: Any, **options: Any) -> RowMaker:
    return RowMaker(read_samples([str(root)], "train"), tokenizer, 4, tile=TILE, **options)


def plan_of(made: RowMaker) -> Plan:
    costs = sample_costs(made.samples, Counter(made.tokenizer, 4, TILE))
    return Plan(costs, 700, 0, global_batch=2)


def rows(made: RowMaker, workers: int = 0) -> list[LoadedRow]:
    plan = plan_of(made)
    mine = only_rank(plan)
    return list(load_rows(made, mine, workers, prefetch=2, timeout_s=60))


def check_contained(made: list[LoadedRow], whole: list[LoadedRow], bad: set[str], words: str) -> None:
    """Exactly the samples `bad` (keys) are masked, and nothing else differs."""
    reasons = [reason for row in made for reason in row.bad]
    assert {reason.split()[1].rstrip(":") for reason in reasons} == bad
    assert all(words in reason for reason in reasons)
    for one, other in zip(made, whole, strict=True):
        assert torch.equal(one.row.input_ids, other.row.input_ids)
        assert one.row.tiles.shape == other.row.tiles.shape
        assert one.row.vision_calls == other.row.vision_calls
        assert one.row.num_targets + one.masked == other.row.num_targets
        assert (one.masked > 0) == bool(one.bad)


def test_a_shard_cut_short_or_gone_or_overwritten_costs_its_own_samples(
    products: Path, copy: Path, tokenizer: Any
) -> None:
    whole = rows(maker(products, tokenizer))
    made = maker(copy, tokenizer)
    records = list(made.samples.records(range(len(made.samples))))
    first = records[0].shard
    keys = {record.key for record in records if record.shard == first}
    data = (copy / first).read_bytes()
    (copy / first).write_bytes(data[: len(data) // 2])
    check_contained(rows(made), whole, keys, "in dataset.json")
    (copy / first).unlink()
    check_contained(rows(made), whole, keys, "cannot be read (No such file or directory)")
    # 20 kB of noise in the middle: the size is right, headers or pictures are not
    noise = random.Random(0).randbytes(20_000)
    start = len(data) // 2
    (copy / first).write_bytes(data[:start] + noise + data[start + len(noise) :])
    hit = {
        record.key
        for record in records
        if record.shard == first
        for image in record.images
        if image.offset - 512 < start + len(noise) and start < image.offset + image.length
    }
    assert 0 < len(hit) < len(keys)
    check_contained(rows(made), whole, hit, "")


def test_truncated_pictures_cost_their_samples(products: Path, copy: Path, tokenizer: Any) -> None:
    whole = rows(maker(products, tokenizer))
    made = maker(copy, tokenizer)
    records = list(made.samples.records([3, 11]))
    for record in records:
        image = record.images[0]
        with (copy / record.shard).open("r+b") as stream:
            stream.seek(image.offset + image.length // 2)
            stream.write(bytes(image.length // 2))
    check_contained(rows(made), whole, {record.key for record in records}, "undecodable")


def test_a_shard_of_another_version_is_noticed_even_if_its_size_is_the_same(
    products: Path, copy: Path, tokenizer: Any, tmp_path: Path
) -> None:
    whole = rows(maker(products, tokenizer))
    make_catalogue(tmp_path / "catalogue", 60, seed=2)
    options = BuildOptions(group_by="product_code", shard_samples=25)
    build(str(tmp_path / "catalogue/products.csv"), str(tmp_path / "other"), options)
    made = maker(copy, tokenizer)
    records = list(made.samples.records(range(len(made.samples))))
    first = records[0].shard
    keys = {record.key for record in records if record.shard == first}
    other = (tmp_path / "other" / first).read_bytes()
    (copy / first).write_bytes(other)
    check_contained(rows(made), whole, keys, "another version")
    size = (products / first).stat().st_size
    (copy / first).write_bytes(other[:size].ljust(size, b"\0"))
    reasons = [reason for row in rows(made) for reason in row.bad]
    assert len(reasons) >= len(keys) - 1 and all(reason.startswith(first) for reason in reasons)


def test_a_shard_deleted_under_running_workers_hangs_nobody(copy: Path, tokenizer: Any) -> None:
    made = maker(copy, tokenizer)
    plan = plan_of(made)
    # 30 epochs; the shards go while they are read
    mine = only_rank(plan, 30)
    loaded = load_rows(made, mine, 1, prefetch=1, timeout_s=60)
    next(loaded)
    for shard in copy.glob("*.tar"):
        shard.unlink()
    assert len(list(loaded)) == len(mine) - 1  # open files can still be read; nothing waits


def test_a_killed_worker_is_an_error_and_not_a_hang(copy: Path, tokenizer: Any) -> None:
    made = maker(copy, tokenizer)
    plan = plan_of(made)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    loaded = load_rows(
        made,
        RankRows(plan, dp_rank=0, dp_size=1, vision_chunk=16, first_row=0, steps=10_000),
        2,
        prefetch=1,
        timeout_s=60,
    )
    next(loaded)
    ours = psutil.Process()  # its own children are the fork server and the resource tracker
    workers = [p for p in ours.children(recursive=True) if p.pid not in before and p.ppid() != ours.pid]
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="a data worker died .*-9.*lower data.workers"):
        for _ in loaded:
            pass
    assert time.monotonic() - began < 40
    loaded.close()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_an_error_in_a_worker_arrives_with_its_traceback(copy: Path, tokenizer: Any) -> None:
    made = replace(maker(copy, tokenizer), num_crops=0)  # no picture can be cut into no tiles
    mine = RankRows(
        plan_of(maker(copy, tokenizer)), dp_rank=0, dp_size=1, vision_chunk=16, first_row=0, steps=2
    )
    before = {child.pid for child in multiprocessing.active_children()}
    with pytest.raises(BadInputError, match="(?s)Traceback.*hd_grid.*num_crops is 0") as caught:
        list(load_rows(made, mine, 1, prefetch=1, timeout_s=60))
    # While somebody holds the exception: Python would wait for ever at its exit for a worker that is left.
    assert caught.value and {child.pid for child in multiprocessing.active_children()} <= before


def test_a_worker_that_is_stuck_ends_the_run(copy: Path, tokenizer: Any) -> None:
    made = maker(copy, tokenizer)
    first = next(made.samples.records([0])).shard
    for shard in copy.glob("*.tar"):
        shard.unlink()
        os.mkfifo(shard)  # opening it waits for ever
    assert (copy / first).exists()
    loaded = load_rows(
        replace_shards(made),
        RankRows(plan_of(made), dp_rank=0, dp_size=1, vision_chunk=16, first_row=0, steps=4),
        1,
        prefetch=1,
        timeout_s=3,
    )
    with pytest.raises(RuntimeError, match="no row from 1 data workers for 3 s"):
        next(loaded)


def replace_shards(made: RowMaker) -> RowMaker:
    """The same, without sizes to hold the shards against."""
    made.samples.shards = tuple({} for _ in made.samples.shards)
    return made


def test_s3_is_read_by_ranges_and_what_is_gone_or_changed_there_is_contained(
    products: Path, s3: str, tokenizer: Any
) -> None:
    filesystem = fsspec.filesystem("s3")
    filesystem.put(str(products), f"{s3}/data", recursive=True)
    there = maker(f"{s3}/data", tokenizer)
    whole = rows(maker(products, tokenizer))
    for one, other in zip(rows(there), whole, strict=True):
        assert torch.equal(one.row.tiles, other.row.tiles) and not one.bad
    records = list(there.samples.records(range(len(there.samples))))
    first = records[0].shard
    keys = {record.key for record in records if record.shard == first}
    filesystem.rm(f"{s3}/data/{first}")
    check_contained(rows(there), whole, keys, "cannot be read")
    filesystem.pipe(f"{s3}/data/{first}", b"another version")
    check_contained(rows(there), whole, keys, "replaced by another version")


class Flaky(MemoryFileSystem):
    """Fails every read but the third."""

    protocol = "flaky"
    cachable = False
    failures = 2

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        if Flaky.failures:
            Flaky.failures -= 1
            raise ConnectionError("the connection was reset")
        return bytes(super().cat_file(path, start=start, end=end, **kwargs))


def test_reads_that_fail_are_tried_again_but_not_for_ever(
    products: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_FIRST_WAIT_S", 0.01)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    record = next(read_samples([str(products)], "train").records([0]))
    fsspec.filesystem("memory").pipe(f"/set/{record.shard}", (products / record.shard).read_bytes())
    Flaky.failures = 2
    assert SampleReader("flaky://set").images(record) == SampleReader(str(products)).images(record)
    Flaky.failures = 100
    with pytest.raises(BadInputError, match="cannot be read .the connection was reset, 5 times"):
        SampleReader("flaky://set").images(record)
    assert Flaky.failures == 95


def test_shards_are_kept_on_the_node_within_the_limit_and_never_a_wrong_one(
    products: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = fsspec.filesystem("memory")
    samples = read_samples([str(products)], "train")
    records = {r.shard: r for r in samples.records(range(len(samples)))}
    for shard in records:
        memory.pipe(f"/kept/{shard}", (products / shard).read_bytes())
    names = sorted(records)
    infos = [samples.shards[0][name] for name in names]
    limit = max(info.bytes for info in infos) + min(info.bytes for info in infos) // 9
    folder = tmp_path / "cache"
    readers = [
        SampleReader("memory://kept", samples.shards, CacheOptions(str(folder), limit)) for _ in range(3)
    ]
    want = {name: SampleReader(str(products)).images(records[name]) for name in names}
    for name, info in zip(names, infos, strict=True):
        copied = folder / copy_name(info)
        threads = [threading.Thread(target=reader.images, args=(records[name],)) for reader in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(copied.exists, 20, "the copy")
        assert copied.read_bytes() == (products / name).read_bytes()
        memory.rm(f"/kept/{name}")
        assert all(reader.images(records[name]) == want[name] for reader in readers), "from the copy"
        assert sum(file.stat().st_size for file in folder.iterdir()) <= limit
        os.utime(copied, (1, 1))
    assert [copy_name(infos[-1])] == [file.name for file in folder.glob("*.tar")], "the others made room"
    for reader in readers:
        reader.close()
    # content that is not what dataset.json says
    other = bytearray((products / names[0]).read_bytes())
    other[-2000] ^= 1
    memory.pipe(f"/kept/{names[0]}", bytes(other))
    wary = SampleReader("memory://kept", samples.shards, CacheOptions(str(tmp_path / "second"), limit))
    wary.images(records[names[0]])

    def refused() -> bool:
        try:
            wary.images(records[names[0]])
        except BadInputError as error:
            return "replaced by another version" in str(error)
        return False

    wait_for(refused, 20, "the refusal")
    assert not list((tmp_path / "second").glob("*.tar"))
    wary.close()
    with caplog.at_level(logging.WARNING):
        small = SampleReader("memory://kept", samples.shards, CacheOptions(str(tmp_path / "third"), 10))
        small.images(records[names[0]])
        small.close()
    assert not list((tmp_path / "third").glob("*.tar")) and not caplog.records


def test_over_long_samples_lose_pictures_from_the_end_and_keep_their_answers(
    copy: Path, tokenizer: Any
) -> None:
    assert images_that_fit(100, [30, 30, 30], 100) == 3
    assert images_that_fit(100, [30, 30, 30], 99) == 2
    assert images_that_fit(100, [30, 30, 30], 9) == 0
    made = maker(copy, tokenizer)
    counter = Counter(tokenizer, 4, TILE)
    whole = sample_costs(made.samples, counter)
    text = int((whole.tokens - 41).min())  # a picture of one tile has 41 tokens, of more tiles more
    limit = int(whole.tokens.max()) - 1
    costs, count = truncated_costs(whole, made.samples, counter, limit=limit)
    over = whole.tokens > limit
    assert count == over.sum() > 0 and (costs.tokens <= limit).all() and text > 0
    assert (costs.targets == whole.targets).all() and (costs.images[over] == 0).all()
    assert (costs.tokens[~over] == whole.tokens[~over]).all()
    reader = made.reader()
    cutting = replace(made, max_tokens=limit)
    for number in range(len(whole)):
        loaded = cutting.document(next(made.samples.records([number])), reader)
        document = loaded.document
        assert loaded.bad is None
        assert len(document.input_ids) == costs.tokens[number]
        assert len(document.tiles) == costs.tiles[number]
        assert sum(label != -100 for label in document.labels) == costs.targets[number]
    # text alone too long: left to be dropped
    assert truncated_costs(whole, made.samples, counter, limit=5)[1] == 0


def test_how_many_bad_samples_a_run_bears() -> None:
    assert allowed(0.0, 10**6, 10**6) == 0
    assert allowed(0.01, 5, 60) == 1
    assert allowed(0.1, 5, 60) == 6
    assert allowed(0.01, 5, 10**6) == 10
    assert allowed(0.01, 10**6, 10**6) == 10_000


KILLED_RANK = """
import os
import psutil
from phi3v_dist.data.loader import load_rows
from rows_of_nothing import Maker

if __name__ == "__main__":
    rows = load_rows(Maker(), range(10**6), 2, prefetch=1, timeout_s=60)
    next(rows)
    children = psutil.Process().children(recursive=True)
    print(*(p.pid for p in children if "resource_tracker" not in " ".join(p.cmdline())), flush=True)
    os.kill(os.getpid(), 9)
"""
MAKER = """
class Maker:
    def reader(self):
        return None

    def load(self, micro, reader):
        return micro
"""


def test_the_workers_of_a_killed_rank_end(tmp_path: Path) -> None:
    (tmp_path / "rows_of_nothing.py").write_text(MAKER)
    (tmp_path / "rank.py").write_text(KILLED_RANK)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(tmp_path / "rank.py")]
    # Output to a file: a pipe would be held open by whatever is left.
    with (tmp_path / "said").open("wb") as said:
        code = subprocess.run(command, env=environment, stdout=said, timeout=90, check=False).returncode
    assert code == -signal.SIGKILL
    left = [psutil.Process(int(pid)) for pid in (tmp_path / "said").read_text().split() if _runs(int(pid))]
    try:
        assert not psutil.wait_procs(left, timeout=30)[1]
    finally:
        for process in left:
            if process.is_running():
                process.kill()


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid)
