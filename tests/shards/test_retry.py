"""Failed records are tried again, and only they; killed in the middle, a round is resumed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shards.build import BuildOptions, build, retry_failed
from shards.common.errors import BadInputError
from shards.format.dataset import read_dataset_info
from shards.format.index import read_index
from shards.ledger import failed_records, failure_reasons
from shards.verify import verify
from tests.shards.conftest import Site, write_csv

ASK = BuildOptions(
    ("image",), "?", "{name}", shard_samples=10, min_success=0.5, retries=0, allow_private_hosts=True
)


def hostile_table(folder: Path, site: Site) -> Path:
    kinds = ["ok", "gone", "ok", "html", "ok"]
    rows = [(f"{site.url}/{kinds[n % 5]}-{n}", f"name {n}") for n in range(50)]
    return write_csv(folder / "table.csv", ("image", "name"), rows)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_after_repair_exactly_the_failed_records_are_fetched(tmp_path: Path, site: Site) -> None:
    source, out = str(hostile_table(tmp_path, site)), str(tmp_path / "out")
    first = build(source, out, ASK)
    assert first.num_samples == 30 and len(failed_records(tmp_path / "out")) == 20
    site.requests.clear()
    again = retry_failed(source, out, ASK)  # nothing is fixed: nothing changes but the count of rounds
    assert again.num_samples == 30 and set(site.requests.values()) == {1} and len(site.requests) == 20
    site.mended = True
    site.requests.clear()
    fixed = retry_failed(source, out, ASK)
    assert sorted(site.requests) == sorted(
        f"/{'gone' if n % 5 == 1 else 'html'}-{n}" for n in range(50) if n % 5 in (1, 3)
    )
    assert fixed.num_samples == 50 and len({first.fingerprint, again.fingerprint, fixed.fingerprint}) == 2
    assert sorted(read_index(out)["key"].to_pylist()) == [f"{n:08d}" for n in range(50)]
    assert not failed_records(tmp_path / "out") and failure_reasons(tmp_path / "out") == {}
    assert verify(out, decode=1).faults == ()
    site.requests.clear()
    assert retry_failed(source, out, ASK) == fixed and not site.requests


def test_a_record_that_arrives_late_is_still_a_duplicate(tmp_path: Path, site: Site) -> None:
    (tmp_path / "one.jpg").write_bytes(site.good)
    rows = [("one.jpg", "a"), ("two.jpg", "b"), ("three.jpg", "c")]
    source = str(write_csv(tmp_path / "table.csv", ("image", "name"), rows))
    options = replace(ASK, duplicates="drop", min_success=0.1)
    assert build(source, str(tmp_path / "out"), options).num_samples == 1
    for name in ("two.jpg", "three.jpg"):
        (tmp_path / name).write_bytes(site.good)
    assert retry_failed(source, str(tmp_path / "out"), options).num_samples == 1
    assert failed_records(tmp_path / "out") == set()


def test_a_split_does_not_depend_on_when_a_record_arrived(tmp_path: Path, site: Site) -> None:
    source = str(hostile_table(tmp_path, site))
    build(source, str(tmp_path / "late"), ASK)
    site.mended = True
    retry_failed(source, str(tmp_path / "late"), ASK)
    build(source, str(tmp_path / "at once"), ASK)
    splits = []
    for name in ("late", "at once"):
        rows = read_index(str(tmp_path / name), columns=["key", "split"]).to_pylist()
        splits.append({row["key"]: row["split"] for row in rows})
    assert splits[0] == splits[1]


def test_stopped_in_the_middle_of_a_round_it_resumes(tmp_path: Path, site: Site) -> None:
    source = str(hostile_table(tmp_path, site))
    for name in ("whole", "stopped"):
        build(source, str(tmp_path / name), ASK)
    site.mended = True
    retry_failed(source, str(tmp_path / "whole"), ASK)

    def stop(done: int, total: int) -> None:
        assert total == 20
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry_failed(source, str(tmp_path / "stopped"), ASK, progress=stop)
    with pytest.raises(BadInputError, match="incomplete"):
        read_dataset_info(str(tmp_path / "stopped"))
    site.requests.clear()
    retry_failed(source, str(tmp_path / "stopped"), ASK)
    assert len(site.requests) == 10  # the second partition of the round alone
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_an_unfinished_build_is_finished_first(tmp_path: Path, table: Callable[..., Path]) -> None:
    info = retry_failed(str(table(12)), str(tmp_path / "out"), ASK)
    assert info.num_samples == 12
    assert json.loads((tmp_path / "out/build.json").read_text())["retry_rounds"] == 0
