"""Real parts for the tests of shards: pictures, tables, and an HTTP server that misbehaves as it is told."""

import contextlib
import csv
import functools
import gzip
import http.server
import io
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """picture(seed, kind="JPEG", size=(60, 40), orientation=1) -> bytes of a noisy picture."""

    def make(seed: int, kind: str = "JPEG", size: tuple[int, int] = (60, 40), orientation: int = 1) -> bytes:
        noise = random.Random(seed).randbytes(8 * 8 * 3)
        image = Image.frombytes("RGB", (8, 8), noise).resize(size)
        exif = Image.Exif()
        if orientation != 1:
            exif[0x0112] = orientation
        data = io.BytesIO()
        image.save(data, kind, exif=exif) if orientation != 1 else image.save(data, kind)
        return data.getvalue()

    return make


@pytest.fixture
def table(tmp_path: Path, picture: Callable[..., bytes]) -> Callable[..., Path]:
    """table(rows, folder="source") -> a CSV (code, image, name, price) with pictures on disk beside it."""

    def make(rows: int, folder: str = "source", size: tuple[int, int] = (60, 40)) -> Path:
        place = tmp_path / folder
        place.mkdir()
        for number in range(rows):
            (place / f"{number}.jpg").write_bytes(picture(number, size=size))
        records = [(f"P{n}", f"{n}.jpg", f"thing {n}", n) for n in range(rows)]
        return write_csv(place / "table.csv", ("code", "image", "name", "price"), records)

    return make


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


Answer = Callable[["Site", http.server.BaseHTTPRequestHandler, str], None]


class Site:
    """A loopback HTTP server. `requests` counts the requests of each path; `mended` makes it behave."""

    def __init__(self, good: bytes) -> None:
        self.good, self.url, self.mended = good, "", False
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path
        with self.lock:
            self.requests[path] += 1
            nth = self.requests[path]
        kind = path.strip("/").split("-")[0]
        body = self.good + path.encode()  # a JPEG may have bytes behind its end: every path has its own hash
        if self.mended or kind == "ok" or (kind == "flaky" and nth > 1):
            send(request, 200, body, "image/jpeg")
        elif kind == "mislabelled":
            send(request, 200, body, "text/html")
        elif kind == "flaky":
            send(request, 500, b"try again")
        elif kind == "gone":
            send(request, 404, b"not here")
        elif kind == "busy":
            send(request, 200 if nth > 1 else 429, body, "image/jpeg", {"Retry-After": "0.2"})
        elif kind == "slow":
            time.sleep(0.3)
            send(request, 200, body, "image/jpeg")
        elif kind == "stalled":
            time.sleep(3)
            with contextlib.suppress(OSError):
                send(request, 200, body, "image/jpeg")
        elif kind == "cut":
            head(request, 200, {"Content-Length": str(len(body))})
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
        elif kind == "half":  # a damaged picture, whole as far as HTTP goes
            send(request, 200, self.good[: len(self.good) // 2], "image/jpeg")
        elif kind == "html":
            send(request, 200, b"<html><body>Please log in</body></html>", "image/jpeg")
        elif kind == "empty":
            send(request, 200, b"", "image/jpeg")
        elif kind == "huge":  # says so
            head(request, 200, {"Content-Length": str(2**30)})
            flood(request)
        elif kind == "endless":  # does not say so
            head(request, 200, {"Transfer-Encoding": "chunked"})
            flood(request, chunked=True)
        elif kind == "packed":
            send(request, 200, gzip.compress(bytes(2**24)), "image/jpeg", {"Content-Encoding": "gzip"})
        elif kind == "bomb":
            send(request, 200, bomb(), "image/png")
        elif kind == "loop":
            send(request, 302, b"", extra={"Location": path})
        elif kind == "moved":
            send(request, 302, b"", extra={"Location": f"/ok-{path.split('-')[1]}"})
        elif kind == "elsewhere":
            send(request, 302, b"", extra={"Location": "file:///etc/hostname"})
        else:
            raise AssertionError(f"no behaviour for {path}")


def head(request: http.server.BaseHTTPRequestHandler, status: int, fields: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in fields.items():
        request.send_header(name, value)
    request.end_headers()


def send(
    request: http.server.BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    kind: str = "text/plain",
    extra: dict[str, str] | None = None,
) -> None:
    head(request, status, {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})})
    request.wfile.write(body)


def flood(request: http.server.BaseHTTPRequestHandler, chunked: bool = False) -> None:
    block = bytes(2**20)
    with contextlib.suppress(OSError):
        for _ in range(1024):
            request.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
    request.close_connection = True


@functools.cache
def bomb() -> bytes:
    """A PNG of a few kilobytes that would decode to 30,000 x 30,000 pixels."""
    data = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(data, "PNG", compress_level=9)
    return data.getvalue()


@pytest.fixture
def site(picture: Callable[..., bytes]) -> Iterator[Site]:
    """A running `Site`; the first word of a path says how it answers."""
    yield from run_site(Site(picture(0)))


def run_site(site: Site) -> Iterator[Site]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a fetcher that hangs up is part of the tests

    server = Server(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
