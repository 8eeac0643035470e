"""Fetches bytes from URLs and paths, many at a time; every failure becomes a reason.

In: URLs (http, https, file, object stores) or local paths. Out: one `Fetched` for each input, with the bytes
or the reason why there are none; a bad URL raises nothing. `in_order` returns results in the order of the
inputs and limits the memory of those that wait for their turn.

Addresses on private, loopback and link-local networks are refused unless the user allows them: a table from
somewhere else must not make this machine read internal services of its network. Each redirect is checked
again, and so is the address to which the connection was really made, before any of the body is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ipaddress
import os
import random
import socket
import stat
import time
import urllib.parse
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import fsspec
import httpx

from shards.common.text import first_line

Item = TypeVar("Item")
Result = TypeVar("Result")

_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_STORES = ("s3", "gs", "gcs", "az", "abfs", "hf", "hdfs", "memory")  # read through fsspec, which retries
_MAX_WAIT = 60.0  # seconds before a retry, even if the server asks for more
_MAX_BACKOFF = 20.0  # seconds
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class FetchOptions:
    """Limits of a fetch. Times in seconds, sizes in bytes.

    total_timeout limits one attempt, from the request to the last byte. retries: attempts after the first.
    backoff: wait before the first retry; it doubles with each further one.
    """

    concurrency: int = 32
    per_host: int = 16
    connect_timeout: float = 10.0
    read_timeout: float = 20.0
    total_timeout: float = 120.0
    retries: int = 3
    backoff: float = 0.5
    max_bytes: int = 64 * 2**20
    max_redirects: int = 5
    allow_private_hosts: bool = False


@dataclass(frozen=True)
class Fetched:
    """The result of a fetch. data: the bytes, None if there are none. reason: why there are none.
    http_status: of the last response, None without one.
    """

    url: str
    data: bytes | None
    reason: str | None = None
    http_status: int | None = None
    attempts: int = 1


class Fetcher:
    """A connection pool with limits. `async with Fetcher(options) as fetcher: await fetcher.fetch(url)`."""

    def __init__(self, options: FetchOptions) -> None:
        self.options = options
        self._slots = asyncio.Semaphore(options.concurrency)
        self._host_slots: dict[str, asyncio.Semaphore] = {}
        self._client: httpx.AsyncClient | None = None

    def _open(self) -> httpx.AsyncClient:
        """The client; made for the first URL, because a build of local files does not need one."""
        options = self.options
        self._client = self._client or httpx.AsyncClient(
            follow_redirects=False,
            trust_env=False,  # behind a proxy, the addresses that are checked here would not be visible
            timeout=httpx.Timeout(
                options.read_timeout, connect=options.connect_timeout, pool=options.total_timeout
            ),
            limits=httpx.Limits(
                max_connections=options.concurrency, max_keepalive_connections=options.concurrency
            ),
            headers={
                "User-Agent": "phi3v-shards/1",
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )
        return self._client

    async def __aenter__(self) -> Fetcher:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def fetch(self, url: str) -> Fetched:
        """The bytes of one URL or path, or the reason why there are none. Raises only CancelledError."""
        if is_local(url):
            return await asyncio.to_thread(read_local, url, self.options.max_bytes)
        try:
            parts = urllib.parse.urlsplit(url)
        except ValueError as error:
            return Fetched(url, None, f"bad URL ({error})")
        scheme = parts.scheme.lower()
        if scheme in _STORES:
            async with self._slots:
                return await asyncio.to_thread(_read_store, url, self.options.max_bytes)
        if scheme not in ("http", "https"):
            known = ", ".join(("http", "https", "file", *_STORES))
            return Fetched(url, None, f"scheme {scheme}:// is not supported; use a path or one of {known}")
        host = parts.netloc.rpartition("@")[2].lower()
        slots = self._host_slots.setdefault(host, asyncio.Semaphore(self.options.per_host))
        for attempt in range(1, self.options.retries + 2):
            async with slots, self._slots:
                answer = await self._attempt(url)
            if answer.wait is None or attempt > self.options.retries:
                break
            backoff = min(self.options.backoff * 2 ** (attempt - 1), _MAX_BACKOFF) * random.uniform(0.5, 1.5)
            await asyncio.sleep(max(backoff, answer.wait))
        return Fetched(url, answer.data, answer.reason, answer.status, attempt)

    async def _attempt(self, url: str) -> _Answer:
        try:
            async with asyncio.timeout(self.options.total_timeout):
                return await self._follow(url)
        except TimeoutError:
            return _Answer(reason=f"no complete answer within {self.options.total_timeout:g} s", wait=0.0)
        except _Refused as error:
            return _Answer(reason=str(error))
        except httpx.TimeoutException as error:
            return _Answer(reason=f"timed out ({type(error).__name__})", wait=0.0)
        except httpx.TransportError as error:
            return _Answer(reason=f"{type(error).__name__}: {error}".rstrip(": "), wait=0.0)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, UnicodeError) as error:
            return _Answer(reason=f"bad URL or answer ({error})")

    async def _follow(self, url: str) -> _Answer:
        here = httpx.URL(url)
        for _ in range(self.options.max_redirects + 1):
            if here.scheme not in ("http", "https") or not here.host:
                return _Answer(reason=f"redirected to {here}, which is not http or https")
            await self._check_host(here)
            async with self._open().stream("GET", here) as response:
                self._check_peer(response)
                if response.has_redirect_location:
                    here = here.join(response.headers["location"])
                    continue
                return await self._read(response)
        return _Answer(reason=f"more than {self.options.max_redirects} redirects")

    async def _read(self, response: httpx.Response) -> _Answer:
        status, limit = response.status_code, self.options.max_bytes
        if status != 200:
            wait = _retry_after(response.headers.get("retry-after")) if status in _RETRIED_STATUS else None
            return _Answer(reason=f"HTTP {status}", status=status, wait=wait)
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):  # was not requested, and can decompress to any size
            return _Answer(reason=f"sent compressed ({coding}), which was not requested", status=status)
        length = response.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            return _Answer(reason=f"{length} bytes, more than the limit of {limit}", status=status)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit:
                return _Answer(reason=f"more than the limit of {limit} bytes", status=status)
        return _Answer(data=bytes(body), status=status)

    async def _check_host(self, url: httpx.URL) -> None:
        """Raises _Refused if any address of the host is not public."""
        if self.options.allow_private_hosts:
            return
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise httpx.ConnectError(f"host {url.host} not found ({error.strerror})") from error
        for *_, address in found:
            _refuse_private(str(address[0]), url.host)

    def _check_peer(self, response: httpx.Response) -> None:
        """Raises _Refused if the server of the connection is not public: the name may resolve to another
        address than a moment ago.
        """
        stream = response.extensions.get("network_stream")
        peer = stream.get_extra_info("server_addr") if stream is not None else None
        if not self.options.allow_private_hosts and peer is not None:
            _refuse_private(str(peer[0]), response.url.host)


async def in_order(
    items: Iterable[Item],
    work: Callable[[Item], Awaitable[Result]],
    window: int,
    *,
    weigh: Callable[[Result], int] = lambda result: 0,
    most: int = 1,
    at_once: int | None = None,
) -> AsyncGenerator[Result, None]:
    """Yields `await work(item)` in the order of `items`, and works ahead so that a slow item does not block
    the others.

    window: at most so many items are taken and not yet yielded. at_once: at most so many of these are in work
    at the same time; None: all. weigh: the weight of a result, for example its bytes. most: while the waiting
    results weigh so much or more, only the item whose turn is next may start. So the waiting results weigh at
    most `most` and what the items already in work add.
    """
    tasks: deque[asyncio.Future[Result]] = deque()
    source = iter(items)
    held = working = turn = number = 0  # held: the weight of the waiting results
    changed = asyncio.Event()

    def note_change() -> None:
        nonlocal changed
        changed.set()
        changed = asyncio.Event()

    async def work_on(item: Item, position: int) -> Result:
        nonlocal held, working
        while position != turn and (held >= most or working >= (at_once or window)):
            await changed.wait()
        working += 1
        try:
            result = await work(item)
            held += weigh(result)
            return result
        finally:
            working -= 1
            note_change()

    try:
        while True:
            while len(tasks) < window and held < most:
                try:
                    tasks.append(asyncio.ensure_future(work_on(next(source), number)))
                except StopIteration:
                    break
                number += 1
            if not tasks:
                return
            result = await tasks.popleft()
            held -= weigh(result)
            turn += 1
            note_change()
            yield result
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class _Answer:
    """The result of one attempt. wait: seconds to wait at least before the next attempt; None: do not try
    again.
    """

    data: bytes | None = None
    reason: str | None = None
    status: int | None = None
    wait: float | None = None


class _Refused(Exception):
    """The address must not be fetched; the message is the reason."""


def _refuse_private(address: str, host: str) -> None:
    """Raises _Refused if `address`, an IP address of `host`, is not public."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if not all(each.is_global for each in (ip, *_inside(ip))) or ip.is_multicast:
        raise _Refused(
            f"host {host} is at the private address {address}; give --allow-private-hosts to fetch from it"
        )


def _inside(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address contains: mapped, 6to4, Teredo, NAT64 (RFC 6052)."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    found = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in _NAT64 or int(ip) < 2**32:
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [each for each in found if each is not None]


def _retry_after(value: str | None) -> float:
    """The seconds that a Retry-After header (a number of seconds or a date) asks for; 0 if unreadable."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _MAX_WAIT) if seconds == seconds else 0.0


def is_local(url: str) -> bool:
    """Whether it is a path or a file:// URL."""
    return "://" not in url or url[:7].lower() == "file://"


def read_local(url: str, max_bytes: int) -> Fetched:
    """The bytes of a path or a file:// URL, or the reason why there are none."""
    try:
        path = urllib.parse.unquote(urllib.parse.urlsplit(url).path) if "://" in url else url
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                return Fetched(url, None, "not a file")
            if found.st_size > max_bytes:
                return Fetched(url, None, f"{found.st_size} bytes, more than the limit of {max_bytes}")
            return Fetched(url, stream.read())
    except (FileNotFoundError, NotADirectoryError):
        return Fetched(url, None, "no such file")
    except IsADirectoryError:
        return Fetched(url, None, "not a file")
    except (OSError, ValueError) as error:
        return Fetched(url, None, f"cannot be read ({getattr(error, 'strerror', None) or error})")


def _read_store(url: str, max_bytes: int) -> Fetched:
    """The bytes of an object, through fsspec, or the reason why there are none."""
    try:
        with fsspec.open(url, "rb") as stream:
            data = stream.read(max_bytes + 1)
    except FileNotFoundError:
        return Fetched(url, None, "no such object")
    except Exception as error:  # the client of a store may raise anything
        return Fetched(url, None, f"cannot be read ({first_line(error)})")
    if len(data) > max_bytes:
        return Fetched(url, None, f"more than the limit of {max_bytes} bytes")
    return Fetched(url, data)
