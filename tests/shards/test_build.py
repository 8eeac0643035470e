"""A build: what arrives, what is in the ledger, what it refuses, and that being killed leaves no trace."""

import json
import random
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.build import BuildOptions, build
from shards.common.errors import BadInputError
from shards.fetch import Fetched
from shards.format.index import read_index
from shards.prepare import Prepared, PreparedImage, split_of
from shards.source_records import SourceRecord
from shards.storage import disk_errors
from shards.verify import verify
from tests.shards.conftest import Site, write_csv

ASK = BuildOptions(images=("image",), prompt="What is it?", answer="{name}, {price}", shard_samples=10)


def changed(**values: Any) -> BuildOptions:
    return BuildOptions(**{**ASK.__dict__, **values})


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def ledger(root: Path) -> list[dict[str, Any]]:
    parts = sorted((root / "ledger").glob("*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def test_records_become_samples_with_their_bytes_kept(tmp_path: Path, table: Callable[..., Path]) -> None:
    source = table(25)
    info = build(str(source), str(tmp_path / "out"), changed(val_fraction=0.3))
    rows = read_index(str(tmp_path / "out")).to_pylist()
    assert info.num_samples == len(rows) == 25 and set(info.splits) == {"train", "val"}
    assert sorted(row["key"] for row in rows) == [f"{n:08d}" for n in range(25)]
    for row in rows:
        number = int(row["key"])
        with (tmp_path / "out" / row["shard"]).open("rb") as tar:
            tar.seek(row["images"][0]["offset"])
            assert tar.read(row["images"][0]["length"]) == (source.parent / f"{number}.jpg").read_bytes()
        assert (row["images"][0]["width"], row["images"][0]["height"]) == (60, 40)
        assert row["messages"][1]["content"] == f"thing {number}, {number}"
    assert [entry["row"] for entry in ledger(tmp_path / "out")] == list(range(25))
    assert verify(str(tmp_path / "out"), decode=1).faults == ()


def test_other_readers_read_our_tars(tmp_path: Path, table: Callable[..., Path]) -> None:
    import datasets
    import webdataset

    build(str(table(12)), str(tmp_path / "out"), ASK)
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len(samples) == 12 and all({"json", "jpg"} <= set(sample) for sample in samples)
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": tars}, cache_dir=str(tmp_path / "cache"), streaming=True
    )["train"]
    seen = [(row["__key__"], row["jpg"].size, row["json"]["messages"][0]["role"]) for row in loaded]
    assert len(seen) == 12 and {(size, role) for _, size, role in seen} == {((60, 40), "user")}


def test_a_shard_is_closed_before_it_grows_past_its_size(tmp_path: Path, table: Callable[..., Path]) -> None:
    build(
        str(table(20, size=(200, 200))), str(tmp_path / "out"), changed(shard_bytes=30_000, shard_samples=20)
    )
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    assert len(sizes) > 3 and max(sizes) <= 30_000 + 10_240  # the end of a tar is padded
    assert verify(str(tmp_path / "out"), decode=1).faults == ()


def test_every_bad_record_of_a_bad_site_is_in_the_ledger_and_nothing_hangs(
    tmp_path: Path, site: Site
) -> None:
    kinds = ["ok"] * 60 + ["flaky", "slow", "busy", "mislabelled", "moved"] * 4
    bad = {
        "gone": "HTTP 404",
        "cut": "RemoteProtocolError",
        "half": "damaged jpg image",
        "html": "not a JPEG, PNG or WebP image",
        "empty": "empty file",
        "huge": "more than the limit",
        "endless": "more than the limit",
        "bomb": "too many pixels",
        "loop": "redirects",
        "elsewhere": "not http or https",
    }
    kinds += [kind for kind in bad for _ in range(2)]
    random.Random(0).shuffle(kinds)
    rows = [(f"{site.url}/{kind}-{n}", kind, n) for n, kind in enumerate(kinds)]
    source = write_csv(tmp_path / "table.csv", ("image", "name", "price"), rows)
    options = changed(allow_private_hosts=True, min_success=0.5, retries=2, max_bytes=2**20, shard_samples=40)
    info = build(str(source), str(tmp_path / "out"), options)
    entries = ledger(tmp_path / "out")
    assert info.num_samples == 80 and len(entries) == 100
    for entry, (_, kind, _) in zip(entries, rows, strict=True):
        if kind in bad:
            assert entry["outcome"] == "failed" and bad[kind] in entry["reason"], (kind, entry)
        else:
            assert entry["outcome"] == "ok" and entry["images"][0]["http_status"] == 200, (kind, entry)
    assert verify(str(tmp_path / "out"), decode=1).faults == ()


def test_too_many_failures_end_the_build_early_and_the_same_command_resumes(
    tmp_path: Path, site: Site
) -> None:
    rows = [(f"{site.url}/{'gone' if n >= 20 else 'ok'}-{n}", n, n) for n in range(100)]
    source = write_csv(tmp_path / "table.csv", ("image", "name", "price"), rows)
    options = changed(allow_private_hosts=True, concurrency=4)
    words = "6 of the first 26 records failed and only 5 of 100 may .min_success 0.95.; .* reason: HTTP 404"
    with pytest.raises(BadInputError, match=words):
        build(str(source), str(tmp_path / "out"), options)
    assert not (tmp_path / "out/dataset.json").exists() and len(ledger(tmp_path / "out")) == 26
    site.mended = True
    assert build(str(source), str(tmp_path / "out"), options).num_samples == 100
    assert all(site.requests[f"/ok-{n}"] == 1 for n in range(20))  # finished partitions are not fetched again


def test_splits_hold_groups_together_and_stay_when_records_are_added(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    (tmp_path / "1.jpg").write_bytes(picture(1))
    for number in range(40):
        (tmp_path / f"g{number}.jpg").write_bytes(picture(number // 2))
    rows = [(f"g{n}.jpg", f"P{n // 4}", n) for n in range(40)]
    split: dict[str, dict[str, str]] = {}
    for name, count, group in [("some", 30, "name"), ("all", 40, "name"), ("by image", 40, None)]:
        source = write_csv(tmp_path / f"{name}.csv", ("image", "name", "price"), rows[:count])
        build(str(source), str(tmp_path / name), changed(group_by=group, val_fraction=0.4))
        found = read_index(str(tmp_path / name), columns=["key", "split"]).to_pylist()
        split[name] = {row["key"]: row["split"] for row in found}
    assert split["some"].items() <= split["all"].items()
    assert all(split["all"][f"{n:08d}"] == split["all"][f"{n // 4 * 4:08d}"] for n in range(40))
    assert all(split["by image"][f"{n:08d}"] == split["by image"][f"{n // 2 * 2:08d}"] for n in range(40))
    assert set(split["by image"].values()) == {"train", "val"}


def test_the_val_split_has_about_its_fraction() -> None:
    def item(number: int) -> Prepared:
        image = PreparedImage("x", Fetched("x", b""), sha256=f"{number:064x}")
        return Prepared(SourceRecord(number, "k"), (image,), None)

    counts = Counter(split_of(item(number), 0.1) for number in range(5000))
    assert 400 < counts["val"] < 600


def test_killed_at_any_moment_the_result_is_the_same_to_the_byte(
    tmp_path: Path, table: Callable[..., Path]
) -> None:
    source = table(60)
    build(str(source), str(tmp_path / "whole"), ASK)
    code = (
        "import sys, time; from shards.build import BuildOptions, build\n"
        f"options = {ASK.__dict__!r} | {{'processes': int(sys.argv[2])}}\n"
        f"build({str(source)!r}, sys.argv[1], BuildOptions(**options),"
        " progress=lambda done, total: print(done, flush=True) or time.sleep(0.005))"
    )
    out = tmp_path / "killed"
    moments = random.Random(0)
    for processes in ("1", "2", "1", "2"):
        process = subprocess.Popen([sys.executable, "-c", code, str(out), processes], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.12))
        process.kill()
        process.communicate()
    subprocess.run([sys.executable, "-c", code, str(out), "2"], check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_complete_dataset_is_left_alone(tmp_path: Path, table: Callable[..., Path]) -> None:
    source = table(5)
    info = build(str(source), str(tmp_path / "out"), ASK)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert build(str(source), str(tmp_path / "out"), changed(concurrency=2)) == info
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_what_cannot_be_built_is_refused_in_one_line(tmp_path: Path, table: Callable[..., Path]) -> None:
    source = table(5)
    out = tmp_path / "out"
    build(str(source), str(out), ASK)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    cases = [
        (source, tmp_path / "other", ASK, "not empty and not a directory of shards build"),
        (source, out, changed(val_fraction=0.2), "val_fraction 0.1, now 0.2; choose another --out"),
        (table(4, "less"), out, ASK, "another content of the source"),
        (source, "nowhere://bucket/out", ASK, "nowhere://bucket/out: Protocol not known: nowhere"),
        (source, tmp_path / "new", changed(val_fraction=2), "val_fraction is 2; it must be from 0 to 1"),
        (source, tmp_path / "new", changed(shard_samples=0), "shard_samples is 0; it must be at least 1"),
        (source, "/proc/here/out", ASK, "cannot write"),
        (source, source, ASK, "cannot write"),
    ]
    for place, where, options, words in cases:
        with pytest.raises(BadInputError, match=words) as caught:
            build(str(place), str(where), options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_no_usable_record_is_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "t.csv", ("image", "name", "price"), [("none.jpg", 1, 1)])
    with pytest.raises(
        BadInputError,
        match="1 of 1 records failed .min_success 0., 0 samples; most frequent reason: no such file",
    ):
        build(str(source), str(tmp_path / "out"), changed(min_success=0))


def test_a_sample_of_several_images_and_one_of_none(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    for number, kind in enumerate(("JPEG", "PNG", "WEBP")):
        (tmp_path / f"{number}.bin").write_bytes(picture(number, kind))
    reply = {"role": "assistant", "content": "Yes."}
    records = [
        {"messages": [{"role": "user", "content": "Same?"}, reply], "images": ["0.bin", "1.bin", "2.bin"]},
        {"messages": [{"role": "user", "content": "Are you there?"}, reply]},
    ]
    source = tmp_path / "m.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    build(str(source), str(tmp_path / "out"), BuildOptions(val_fraction=0))
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        assert tar.getnames() == [
            "00000000.json", "00000000.0.jpg", "00000000.1.png", "00000000.2.webp", "00000001.json",
        ]  # fmt: skip
    assert verify(str(tmp_path / "out"), decode=1).faults == ()


def test_two_builds_in_one_directory_at_once_are_refused(tmp_path: Path, table: Callable[..., Path]) -> None:
    source = table(30)

    def second(done: int, total: int) -> None:
        if done == 1:
            with pytest.raises(BadInputError, match="another process is writing here"):
                build(str(source), str(tmp_path / "out"), ASK)

    assert build(str(source), str(tmp_path / "out"), ASK, progress=second).num_samples == 30


def test_progress_counts_the_records_of_an_earlier_call_too(
    tmp_path: Path, table: Callable[..., Path]
) -> None:
    source = table(30)

    def stop(done: int, total: int) -> None:
        assert total == 30
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(str(source), str(tmp_path / "out"), ASK, progress=stop)
    seen: list[int] = []
    began = time.monotonic()
    build(str(source), str(tmp_path / "out"), ASK, progress=lambda done, total: seen.append(done))
    assert seen == list(range(11, 31)) and time.monotonic() - began < 20


def test_duplicates_are_dropped_and_named_also_after_a_kill(
    tmp_path: Path, table: Callable[..., Path]
) -> None:
    source = table(20)
    for number in (3, 15, 19):
        (source.parent / f"{number}.jpg").write_bytes((source.parent / "1.jpg").read_bytes())
    options = changed(duplicates="drop", min_success=1)

    def stop(done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(str(source), str(tmp_path / "out"), options, progress=stop)
    assert build(str(source), str(tmp_path / "out"), options).num_samples == 17
    dropped = [entry for entry in ledger(tmp_path / "out") if entry["outcome"] == "dropped"]
    assert [(entry["row"], entry["reason"]) for entry in dropped] == [
        (number, "duplicate: its images are those of record 1") for number in (3, 15, 19)
    ]
    build(str(source), str(tmp_path / "whole"), options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_reencoded_images_are_marked_in_the_ledger(tmp_path: Path, table: Callable[..., Path]) -> None:
    source = str(table(4))
    for name in ("out", "again"):
        build(source, str(tmp_path / name), changed(reencode="webp:80"))
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    rows = read_index(str(tmp_path / "out")).to_pylist()
    assert all(row["images"][0]["member"].endswith(".webp") for row in rows)
    for row, entry in zip(sorted(rows, key=lambda row: row["key"]), ledger(tmp_path / "out"), strict=True):
        assert entry["images"][0]["reencoded"] and entry["images"][0]["bytes"] == row["images"][0]["length"]
    assert verify(str(tmp_path / "out"), decode=1).faults == ()
    build(source, str(tmp_path / "kept"), ASK)
    assert not any(entry["images"][0]["reencoded"] for entry in ledger(tmp_path / "kept"))


def test_large_images_are_made_smaller_if_asked(tmp_path: Path, table: Callable[..., Path]) -> None:
    build(str(table(4, size=(300, 200))), str(tmp_path / "out"), changed(max_side=150))
    rows = read_index(str(tmp_path / "out")).to_pylist()
    assert {(row["images"][0]["width"], row["images"][0]["height"]) for row in rows} == {(150, 100)}
    assert verify(str(tmp_path / "out"), decode=1).faults == ()


def test_a_source_of_unknown_length_is_built_and_resumed(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    import datasets

    features = datasets.Features({"photo": datasets.Image(), "name": datasets.Value("string")})
    columns = {"photo": [{"bytes": picture(n), "path": None} for n in range(25)], "name": ["x"] * 25}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "data/train.parquet"))
    options = BuildOptions(("photo",), "?", "{name}", shard_samples=5)

    def stop(done: int, total: int) -> None:
        assert total == 0
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(f"hf:{tmp_path / 'data'}", str(tmp_path / "out"), options, progress=stop)
    assert build(f"hf:{tmp_path / 'data'}", str(tmp_path / "out"), options).num_samples == 25
    assert verify(str(tmp_path / "out"), decode=1).faults == ()
    assert ledger(tmp_path / "out")[0]["images"][0]["image"] == "inline"


@pytest.mark.parametrize("out", ["a set [1]", "file://a%20set"])
def test_an_output_directory_may_have_any_name(tmp_path: Path, table: Callable[..., Path], out: str) -> None:
    place = tmp_path / out.removeprefix("file://").replace("%20", " ")
    asked = str(place) if "file" not in out else place.as_uri()
    build(str(table(4)), asked, ASK)
    assert len(read_index(str(place))) == 4 and verify(str(place), decode=1).faults == ()
    assert build(str(tmp_path / "source/table.csv"), asked, ASK).num_samples == 4, "the same command resumes"


def test_what_cannot_be_read_is_not_called_a_full_disk(tmp_path: Path) -> None:
    for file, words in (("table.csv", "cannot be read .No such file"), ("out/x", "choose another --out")):
        with pytest.raises(BadInputError, match=words), disk_errors(str(tmp_path / "out")):
            (tmp_path / file).read_bytes()


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path, table: Callable[..., Path]) -> None:
    """A file size limit stands in for the full disk: the same error comes from the same call."""
    code = (
        "import resource, signal, sys; from shards.build import BuildOptions, build\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"build({str(table(40))!r}, {str(tmp_path / 'out')!r}, BuildOptions(**{ASK.__dict__!r}))"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 1 and "BadInputError" in last and "cannot write (File too large" in last
