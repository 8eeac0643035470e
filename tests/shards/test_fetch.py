"""Fetching: every failure is a reason, nothing hangs, and no private address is read unless allowed."""

import asyncio
import time
from pathlib import Path

import pytest

from shards.fetch import Fetched, Fetcher, FetchOptions, in_order
from tests.shards.conftest import Site

QUICK = FetchOptions(
    read_timeout=1, total_timeout=2, retries=2, backoff=0.05, max_bytes=2**20, allow_private_hosts=True
)


def fetch(urls: list[str], options: FetchOptions = QUICK) -> list[Fetched]:
    async def run() -> list[Fetched]:
        async with Fetcher(options) as fetcher:
            return [fetched async for fetched in in_order(urls, fetcher.fetch, 8 * options.concurrency)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "reason", "attempts"),
    [
        ("ok-1", None, 1),
        ("mislabelled-1", None, 1),
        ("flaky-1", None, 2),
        ("busy-1", None, 2),
        ("slow-1", None, 1),
        ("moved-1", None, 1),
        ("gone-1", "HTTP 404", 1),
        ("stalled-1", "timed out", 3),
        ("cut-1", "RemoteProtocolError", 3),
        ("huge-1", "1073741824 bytes, more than the limit of 1048576", 1),
        ("endless-1", "more than the limit of 1048576 bytes", 1),
        ("packed-1", "sent compressed (gzip)", 1),
        ("loop-1", "more than 5 redirects", 1),
        ("elsewhere-1", "which is not http or https", 1),
    ],
)
def test_answers_become_bytes_or_a_reason(site: Site, path: str, reason: str | None, attempts: int) -> None:
    (fetched,) = fetch([f"{site.url}/{path}"])
    if reason is None:
        assert fetched.data is not None and fetched.data.startswith(site.good) and fetched.reason is None
    else:
        assert fetched.data is None and fetched.reason is not None and reason in fetched.reason
        assert "\n" not in fetched.reason
    assert fetched.attempts == attempts


def test_retry_after_is_honoured(site: Site) -> None:
    began = time.monotonic()
    fetch([f"{site.url}/busy-1"])
    assert time.monotonic() - began >= 0.2


def test_results_come_in_order_with_many_at_a_time(site: Site) -> None:
    urls = [f"{site.url}/{'slow' if n % 3 == 0 else 'ok'}-{n}" for n in range(30)]
    began = time.monotonic()
    found = fetch(urls)
    assert [fetched.url for fetched in found] == urls and all(fetched.data for fetched in found)
    assert time.monotonic() - began < 10 * 0.3  # the slow ones overlap


def test_one_host_gets_only_its_share(site: Site) -> None:
    began = time.monotonic()
    fetch(
        [f"{site.url}/slow-{n}" for n in range(6)],
        FetchOptions(per_host=2, concurrency=6, allow_private_hosts=True),
    )
    assert time.monotonic() - began > 3 * 0.3


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/x", "http://localhost:1/x", "http://[::1]:1/x", "http://169.254.169.254/x",
     "http://10.0.0.1/x", "http://[::ffff:10.0.0.1]/x", "http://0.0.0.0:1/x",
     "http://[64:ff9b::a9fe:a9fe]/x", "http://[2002:a00:1::1]/x", "http://[::10.0.0.1]/x"],
)  # fmt: skip
def test_private_addresses_are_refused(url: str) -> None:
    (fetched,) = fetch([url], FetchOptions(retries=0, connect_timeout=1))
    assert fetched.reason is not None and "private address" in fetched.reason
    assert "--allow-private-hosts" in fetched.reason


def test_bad_urls_and_paths_have_reasons(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"data")
    urls = [
        (tmp_path / "a b.jpg").as_uri(),
        str(tmp_path / "a b.jpg"),
        str(tmp_path / "none.jpg"),
        str(tmp_path),
        "ftp://host/x.jpg",
        "http://",
        "http://host name/",
        "http://[bad/x",
        "no\0name",
    ]
    found = fetch(urls)
    assert [fetched.data for fetched in found] == [b"data", b"data"] + [None] * 7
    assert all(fetched.reason for fetched in found[2:])
    assert found[2].reason == "no such file" and found[3].reason == "not a file"
    (small,) = fetch(urls[:1], FetchOptions(max_bytes=3))
    assert small.reason == "4 bytes, more than the limit of 3"


def test_in_order_begins_no_more_than_its_window() -> None:
    begun = yielded = most = 0

    async def work(item: int) -> int:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0.001)
        return item

    async def run() -> list[int]:
        nonlocal yielded, most
        found = []
        async for item in in_order(range(50), work, 4):
            most = max(most, begun - yielded)
            yielded += 1
            found.append(item)
        return found

    assert asyncio.run(run()) == list(range(50)) and most <= 4


def test_in_order_holds_no_more_than_it_may() -> None:
    """The first takes long; of the others no more than `at_once` may add to what waits."""
    waiting: list[int] = []

    async def work(item: int) -> int:
        await asyncio.sleep(0.2 if item == 0 else 0.001)
        waiting.append(item)
        return item

    async def run() -> int:
        async for _ in in_order(range(200), work, 100, weigh=lambda item: 10, most=40, at_once=5):
            return len(waiting)
        return 0

    assert asyncio.run(run()) <= 40 // 10 + 5 + 1


def test_in_order_begins_none_while_too_much_waits() -> None:
    begun: list[int] = []

    async def work(item: int) -> int:
        begun.append(item)
        await asyncio.sleep(0.1 if item == 0 else 0)
        return item

    async def run() -> list[int]:
        return [item async for item in in_order(range(30), work, 20, weigh=lambda item: 10, most=40)]

    assert asyncio.run(run()) == list(range(30)) and begun == list(range(30))

    async def first() -> None:
        begun.clear()
        results = in_order(range(30), work, 5, weigh=lambda item: 10, most=40)
        await anext(results)
        assert len(begun) == 5  # four wait behind the slow one: no other is begun
        await results.aclose()

    asyncio.run(first())
