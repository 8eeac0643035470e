"""A small product catalogue for demos and tests: generated images, a CSV like that of a web shop, a server.

Every image shows one product. Its title, category and price can be read from the image: shape = category,
fill = colour, pattern = pattern, outline = material, extent on the canvas = size, and the price follows from
these five. A model that ignores the image can only guess.

In: a folder, a number of products, a seed. Out: `products.csv` (product_code, title, category3_code,
full_price, imageurl) and `images/*` (JPEG and PNG of many sizes). Equal seeds give equal bytes.
"""

from __future__ import annotations

import colorsys
import contextlib
import csv
import functools
import http.server
import io
import json
import os
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from shards.common.errors import BadInputError
from shards.common.files import write_atomically

TABLE = "products.csv"
COLUMNS = ("product_code", "title", "category3_code", "full_price", "imageurl")
# Below the range from which systems assign ports, so that it is usually free again for the next run.
DEFAULT_PORT = 8731

_MARK = "COMPLETE"
_DRAWING = 2  # version of the drawing and of the price rule; a catalogue of another version is not reused

# Noun of the title; hundreds of the price for (Small, Large).
_CATEGORIES = {
    "BAGS": ("Bag", (11, 19)),
    "BOOTS": ("Boot", (7, 9)),
    "HATS": ("Hat", (1, 3)),
    "SCARVES": ("Scarf", (0, 2)),
    "SHIRTS": ("Shirt", (4, 6)),
    "WATCHES": ("Watch", (12, 16)),
}
_SIZES = {"Small": 0.66, "Large": 0.96}  # extent of the product, relative to the short side of the canvas
_COLOURS = {  # fill, cents of the price
    "Black": ((28, 28, 30), "00"),
    "Blue": ((28, 72, 206), "00"),
    "Green": ((22, 140, 60), "00"),
    "Purple": ((130, 45, 165), "50"),
    "Red": ((214, 30, 38), "50"),
    "Yellow": ((240, 180, 0), "50"),
}
_PATTERNS = {"Plain": 0, "Striped": 3, "Dotted": 5, "Checked": 8}  # units of the price
_MATERIALS = {  # outline, tens of the price
    "Cotton": (None, 2),
    "Silk": ((0, 205, 220), 5),
    "Leather": ((128, 68, 22), 9),
}
_TINT = 0.5  # colour of the pattern, between fill (0) and white (1): visible, and the shape stays closed
_OUTLINE_WIDTH = 0.07  # relative to the product's extent

# Silhouettes as unions in the unit square: "polygon" x, y, ..., "ellipse" box, "ring" box and width.
_SILHOUETTES: dict[str, tuple[tuple[str, tuple[float, ...]], ...]] = {
    "BAGS": (("ring", (0.26, 0, 0.74, 0.8, 0.1)), ("polygon", (0.08, 0.36, 0.92, 0.36, 1, 1, 0, 1))),
    "BOOTS": (("polygon", (0, 0, 0.36, 0, 0.36, 0.62, 1, 0.62, 1, 1, 0, 1)),),
    "HATS": (
        ("polygon", (0.25, 0.72, 0.3, 0.3, 0.7, 0.3, 0.75, 0.72)),
        ("polygon", (0, 0.66, 1, 0.66, 1, 0.84, 0, 0.84)),
    ),
    "SCARVES": (("polygon", (0.34, 0, 0.66, 0, 0.72, 1, 0.28, 1)),),
    "SHIRTS": (
        ("polygon", (0.3, 0.02, 0.7, 0.02, 0.7, 1, 0.3, 1)),
        ("polygon", (0, 0.06, 1, 0.06, 1, 0.4, 0, 0.4)),
    ),
    "WATCHES": (("ring", (0, 0, 1, 1, 0.22)),),
}


@dataclass(frozen=True)
class Product:
    """One product. category, size, colour, pattern and material are keys of the tables above."""

    code: str
    category: str
    size: str
    colour: str
    pattern: str
    material: str

    @property
    def title(self) -> str:
        noun = _CATEGORIES[self.category][0]
        return f"{self.size} {self.colour} {self.pattern} {self.material} {noun}"

    @property
    def price(self) -> str:
        """20.00 to 1998.50. Each attribute sets its own digits, so that few examples show the rule."""
        hundreds = _CATEGORIES[self.category][1][list(_SIZES).index(self.size)]
        units = 10 * _MATERIALS[self.material][1] + _PATTERNS[self.pattern]
        return f"{100 * hundreds + units}.{_COLOURS[self.colour][1]}"


def make_catalogue(
    out: Path, num_products: int = 2000, seed: int = 0, *, base_url: str | None = None
) -> Path:
    """Draws a catalogue of `num_products` products into `out`, unless it exists; returns the path of its CSV.

    base_url: imageurl becomes BASE_URL/images/NAME; None: a path relative to the CSV (see `serve_catalogue`).
    The CSV is written last; after an interruption, call again.
    Raises BadInputError if `out` holds something else or cannot be written.
    """
    out = Path(out)
    if num_products < 1:
        raise BadInputError(f"a catalogue of {num_products} products is empty; ask for at least 1")
    mark = json.dumps({"drawing": _DRAWING, "rows": num_products, "seed": seed}) + "\n"
    try:
        if (out / TABLE).exists():
            found = (out / _MARK).read_text() if (out / _MARK).exists() else "another program's table"
            if found != mark:
                raise BadInputError(
                    f"{out}: holds {found.strip()}, not {mark.strip()}; choose another folder or delete it"
                )
            if base_url is not None:
                _point_table_at(out, base_url)
            return out / TABLE
        (out / "images").mkdir(parents=True, exist_ok=True)
        products = [_choose(number, seed) for number in range(num_products)]
        # Threads: Pillow releases the interpreter lock while it draws and encodes.
        with ThreadPoolExecutor(max_workers=2) as pool:
            names = list(pool.map(functools.partial(_draw_to_file, out / "images", seed), products))
        prefix = "" if base_url is None else base_url.rstrip("/") + "/"
        table = [
            (p.code, p.title, p.category, p.price, f"{prefix}images/{name}")
            for p, name in zip(products, names, strict=True)
        ]
        write_atomically(out / _MARK, mark.encode())
        _write_table(out / TABLE, table)
    except OSError as error:
        raise BadInputError(
            f"{out}: cannot write the catalogue ({error.strerror}); choose another folder"
        ) from error
    return out / TABLE


@contextlib.contextmanager
def serve_catalogue(out: Path, port: int = 0) -> Iterator[str]:
    """Serves `out` over HTTP on loopback while the context is open; yields the base URL, such as
    http://127.0.0.1:8731.

    The imageurl column of the CSV is changed to point at this server. port: 0 means the port that the CSV
    names from an earlier call, otherwise DEFAULT_PORT, otherwise any free one. (An interrupted `build` of the
    table can only resume if the URLs are still the same.)
    Raises BadInputError if there is no catalogue in `out` or if the requested port is in use.
    """
    out = Path(out)
    if not (out / TABLE).exists():
        raise BadInputError(f"{out}: no {TABLE} here; make a catalogue with `phi3v shards sample` first")
    handler = functools.partial(_QuietHandler, directory=str(out))
    server = None
    for candidate in [port] if port else [_recorded_port(out) or DEFAULT_PORT, 0]:
        try:
            server = _Server(("127.0.0.1", candidate), handler)
            break
        except OSError:
            continue
    if server is None:
        raise BadInputError(f"port {port} is in use; choose another one, or 0 for any free one")
    base_url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        _point_table_at(out, base_url)
        yield base_url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a fetcher opens dozens of connections at once


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of one folder, with keep-alive and without a log. The base class allows no path
    outside the folder.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def list_directory(self, path: str | os.PathLike[str]) -> io.BytesIO | None:
        self.send_error(404, "No listing")
        return None


def _choose(number: int, seed: int) -> Product:
    rng = random.Random(f"product {seed} {number}")
    return Product(
        code=f"{80_000_000 + number}",
        category=rng.choice(list(_CATEGORIES)),
        size=rng.choice(list(_SIZES)),
        colour=rng.choice(list(_COLOURS)),
        pattern=rng.choice(list(_PATTERNS)),
        material=rng.choice(list(_MATERIALS)),
    )


def _draw_to_file(folder: Path, seed: int, product: Product) -> str:
    """Writes the image of `product`; returns its file name."""
    rng = random.Random(f"picture {seed} {product.code}")  # part of the drawing: other text, other images
    canvas = _background(rng)
    _draw_product(canvas, product, rng)
    encoded = io.BytesIO()
    if rng.random() < 0.75:
        name = f"{product.code}.jpg"
        canvas.save(encoded, "JPEG", quality=90)
    else:
        name = f"{product.code}.png"
        canvas.save(encoded, "PNG", compress_level=4)
    write_atomically(folder / name, encoded.getvalue(), durable=False)
    return name


def _background(rng: random.Random) -> Image.Image:
    """A light two-colour gradient; short side 180 to 400 px, aspect ratio 1:1 to 1.25:1, landscape or
    portrait.
    """
    short = rng.randint(180, 400)
    long = round(short * rng.choice([1, 1.1, 1.25]))
    size = (long, short) if rng.random() < 0.5 else (short, long)
    tones = []
    for _ in range(2):
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.12), rng.uniform(0.9, 1))
        tones.append((round(255 * red), round(255 * green), round(255 * blue)))
    ramp = Image.linear_gradient("L")
    if rng.random() < 0.5:
        ramp = ramp.transpose(Image.Transpose.ROTATE_90)
    return ImageOps.colorize(ramp.resize(size), tones[0], tones[1])


def _draw_product(canvas: Image.Image, product: Product, rng: random.Random) -> None:
    """Draws the product near the middle of `canvas`, completely inside."""
    extent = round(_SIZES[product.size] * min(canvas.size))
    side = 2 * extent  # drawn at twice the size and scaled down, for smooth edges
    outline = _MATERIALS[product.material][0]
    border = round(_OUTLINE_WIDTH * side) if outline else 0
    free_x, free_y = canvas.width - extent, canvas.height - extent
    box = (round(free_x * rng.uniform(0.3, 0.7)), round(free_y * rng.uniform(0.3, 0.7)))
    if outline:
        outer = _silhouette(product.category, side, border, grown=border)
        canvas.paste(outline, box, outer.resize((extent, extent), Image.Resampling.BOX))
    inner = _silhouette(product.category, side, border, grown=0).resize(
        (extent, extent), Image.Resampling.BOX
    )
    fill = _fabric(product, side).resize((extent, extent), Image.Resampling.BOX)
    canvas.paste(fill, box, inner)


def _silhouette(category: str, side: int, inset: int, *, grown: int) -> Image.Image:
    """A mask, L [side, side]: the shape within a margin of `inset` px, made thicker by `grown` px."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    scale = side - 1 - 2 * inset

    def at(values: Sequence[float]) -> list[float]:
        return [inset + scale * value for value in values]

    for kind, numbers in _SILHOUETTES[category]:
        if kind == "polygon":
            points = at(numbers)
            draw.polygon(points, fill=255)
            if grown:
                draw.line(points + points[:4], fill=255, width=2 * grown, joint="curve")
        else:
            left, top, right, bottom = at(numbers[:4])
            grown_box = (left - grown, top - grown, right + grown, bottom + grown)
            if kind == "ellipse":
                draw.ellipse(grown_box, fill=255)
            else:
                draw.ellipse(grown_box, outline=255, width=round(scale * numbers[4]) + 2 * grown)
    return mask


def _fabric(product: Product, side: int) -> Image.Image:
    """RGB [side, side]: the colour with the pattern, coarse enough to be visible when scaled to 50 px."""
    colour = _COLOURS[product.colour][0]
    tint = tuple(round(channel + _TINT * (255 - channel)) for channel in colour)
    fabric = Image.new("RGB", (side, side), colour)
    draw = ImageDraw.Draw(fabric)
    if product.pattern == "Striped":
        pitch = side / 5
        for band in range(5):
            top = (band + 0.5) * pitch
            draw.rectangle((0, top, side, top + 0.45 * pitch), fill=tint)
    elif product.pattern == "Dotted":
        pitch, radius = side / 5, side * 0.058
        for row in range(6):
            for column in range(7):
                x, y = (column + 0.5 * (row % 2)) * pitch, (row + 0.5) * pitch
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tint)
    elif product.pattern == "Checked":
        pitch = side / 7
        for row in range(7):
            for column in range(row % 2, 7, 2):
                x, y = column * pitch, row * pitch
                draw.rectangle((x, y, x + pitch, y + pitch), fill=tint)
    return fabric


def _recorded_port(out: Path) -> int | None:
    """The port of the loopback URLs in the CSV; None if they are other URLs or paths."""
    first = _read_table(out / TABLE)[0][-1]
    host, _, rest = first.removeprefix("http://").partition(":")
    port = rest.partition("/")[0]
    return int(port) if host == "127.0.0.1" and port.isdigit() else None


def _point_table_at(out: Path, base_url: str) -> None:
    """Changes the URLs in the CSV to those below `base_url`."""
    table = _read_table(out / TABLE)
    moved = [
        (*record[:-1], f"{base_url.rstrip('/')}/images/{record[-1].rsplit('/', 1)[-1]}") for record in table
    ]
    if moved != table:
        _write_table(out / TABLE, moved)


def _read_table(path: Path) -> list[tuple[str, ...]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return [tuple(record) for record in csv.reader(stream)][1:]


def _write_table(path: Path, records: Sequence[tuple[str, ...]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *records])
    write_atomically(path, text.getvalue().encode())
