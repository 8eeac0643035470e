"""A dataset on one page: pictures with their prompts and replies, histograms, duplicates, failed rows.

In: a complete dataset directory and its `Inspection`. Out: the HTML of a page that needs nothing beside it:
no script, pictures as data URLs. Called by the command line.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from shards.format.index import read_index
from shards.images import PILLOW_FORMATS, check_image
from shards.inspect import Inspection

Place = tuple[Any, str]  # a file system of fsspec and a path in it

_THUMBNAIL = 224  # pixels of the longer side
_BARS = 24
_MOST_TEXT = 1200  # characters of one message
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px; color: #1d1d1f; background: #fafafa; }
h1 { font-size: 20px; margin: 0; } h2 { font-size: 16px; margin: 28px 0 8px; } p { margin: 4px 0; }
.warn { color: #b00020; font-weight: 600; } .dim { color: #6e6e73; }
.row { display: flex; flex-wrap: wrap; gap: 16px; }
figure { margin: 0; background: white; border: 1px solid #e2e2e6; border-radius: 6px; padding: 10px; }
figcaption { font-size: 12px; color: #6e6e73; margin-bottom: 4px; }
.sample { width: 460px; display: flex; gap: 10px; }
.sample .text { flex: 1; min-width: 0; font-size: 13px; overflow-wrap: anywhere; }
.sample img, .copies img { max-width: 150px; max-height: 150px; display: block; margin-bottom: 4px; }
.copies { display: flex; gap: 8px; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 6px; max-height: 220px; overflow: auto; }
.role { font-size: 11px; color: #6e6e73; }
table { border-collapse: collapse; background: white; }
td, th { border: 1px solid #e2e2e6; padding: 3px 10px; }
td { text-align: right; } td:first-child, th:first-child { text-align: left; }
"""


def make_page(root: str, found: Inspection, samples: int = 48) -> str:
    """The page of the dataset directory `root`, a local path or fsspec URL. samples: how many are shown,
    spread evenly over it.

    Raises BadInputError if the index cannot be read.
    """
    index = read_index(root)
    place = fsspec.core.url_to_fs(root)
    chosen = sorted({round(n * (index.num_rows - 1) / max(1, samples - 1)) for n in range(samples)})
    shown = index.take(pa.array(chosen)).to_pylist()
    images = pc.list_flatten(index["images"])
    sizes = {name: pc.struct_field(images, name).to_pylist() for name in ("width", "height", "length")}
    texts = {
        role: [
            sum(len(m["content"]) for m in row if m["role"] == role) for row in index["messages"].to_pylist()
        ]
        for role in ("user", "assistant")
    }
    splits = ", ".join(f"{count:,} {split}" for split, count in found.info.splits.items())
    copies = sum(len(group) - 1 for group in found.duplicate_images)
    body = [
        f"<h1>{html.escape(root)}</h1>",
        f"<p>{found.info.num_samples:,} samples ({splits}) in {len(found.info.shards)} shards of "
        f"{found.shard_bytes / 1e6:,.1f} MB, from {html.escape(found.info.source)}</p>",
        f"<p class=dim>fingerprint {html.escape(found.info.fingerprint)}</p>",
    ]
    if found.cross_split:
        body.append(f"<p class=warn>{found.cross_split} pictures are in more than one split</p>")
    body += ["<h2>Numbers</h2>", _numbers(found), "<h2>Histograms</h2>", "<div class=row>"]
    body += [
        _histogram("image width, px", sizes["width"]),
        _histogram("image height, px", sizes["height"]),
        _histogram("image size, kB", [length / 1000 for length in sizes["length"]]),
        _histogram("prompt, characters", texts["user"]),
        _histogram("reply, characters", texts["assistant"]),
        "</div>",
    ]
    body += [
        _table("Failed rows", "reason", found.failed),
        _table("Commonest replies", "reply", dict(found.commonest_replies)),
    ]
    if found.duplicate_images:
        heading = f"Duplicate pictures: {copies} copies in {len(found.duplicate_images)} groups"
        body.append(f"<h2>{heading}</h2><div class=row>")
        body += [_duplicate_group(place, index, group) for group in found.duplicate_images[:12]]
        body.append("</div>")
    body += [
        f"<h2>{len(shown)} samples</h2><div class=row>",
        *(_sample(place, row) for row in shown),
        "</div>",
    ]
    title = html.escape(Path(root).name)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>\n"
        + "\n".join(body)
        + "\n</html>\n"
    )


def _numbers(found: Inspection) -> str:
    spreads = {
        "image width, px": found.width,
        "image height, px": found.height,
        "image size, bytes": found.image_bytes,
        "prompt, characters": found.prompt_chars,
        "reply, characters": found.reply_chars,
        "turns": found.turns,
    }
    rows = "".join(
        f"<tr><td>{name}<td>{s.smallest:,}<td>{s.median:,}<td>{s.percentile_95:,}<td>{s.largest:,}"
        for name, s in spreads.items()
    )
    per_sample = ", ".join(f"{n} in {count:,}" for n, count in found.images_per_sample.items())
    formats = ", ".join(f"{count:,} {name}" for name, count in found.formats.items()) or "none"
    return (
        f"<table><tr><th><th>least<th>median<th>95 %<th>most{rows}</table>"
        f"<p>images per sample: {per_sample}; formats: {html.escape(formats)}; "
        f"samples whose messages all came before: {found.repeated_texts:,}</p>"
    )


def _histogram(title: str, numbers: Sequence[float]) -> str:
    """An inline SVG of `_BARS` bars of equal width."""
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    step = (high - low) / _BARS or 1
    counts = [0] * _BARS
    for number in numbers:
        counts[min(_BARS - 1, int((number - low) / step))] += 1
    bars = []
    for place, count in enumerate(counts):
        height = 80 * count / max(counts)
        hint = f"{low + place * step:,.0f} to {low + (place + 1) * step:,.0f}: {count:,}"
        box = f'x="{10 * place}" y="{80 - height:.1f}" width="9" height="{height:.1f}"'
        bars.append(f'<rect {box} fill="#4666b0"><title>{hint}</title></rect>')
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg width="240" height="98" role="img" aria-label="{title}">{"".join(bars)}'
        f'<text x="0" y="95" font-size="11">{low:,.0f}</text>'
        f'<text x="240" y="95" font-size="11" text-anchor="end">{high:,.0f}</text></svg></figure>'
    )


def _table(title: str, header: str, counts: dict[str, int]) -> str:
    if not counts:
        return ""
    rows = "".join(f"<tr><td>{_text(name)}<td>{count:,}" for name, count in list(counts.items())[:20])
    return f"<h2>{title}</h2><table><tr><th>{header}<th>times{rows}</table>"


def _sample(place: Place, row: dict[str, Any]) -> str:
    pictures = "".join(_thumbnail(place, row["shard"], image) for image in row["images"][:4])
    more = len(row["images"]) - 4
    said = "".join(
        f"<div class=role>{html.escape(each['role'])}</div><div class=said>{_text(each['content'])}</div>"
        for each in row["messages"]
    )
    sizes = ", ".join(f"{image['width']}x{image['height']}" for image in row["images"][:4])
    label = f"{html.escape(row['key'])} &middot; {html.escape(row['split'])} &middot; {sizes}"
    return (
        f"<figure class=sample><div>{pictures}{f'and {more} more' if more > 0 else ''}</div>"
        f"<div class=text><figcaption>{label}</figcaption>{said}"
        f"<div class=dim>{_text(row['meta'])}</div></div></figure>"
    )


def _duplicate_group(place: Place, index: pa.Table, group: Iterable[tuple[str, str]]) -> str:
    found = []
    for shard, member in list(group)[:4]:
        rows = index.filter(pc.equal(index["shard"], shard)).to_pylist()
        row, image = next(
            (row, image) for row in rows for image in row["images"] if image["member"] == member
        )
        label = f"{html.escape(row['key'])}, {html.escape(row['split'])}"
        found.append(f"<div>{_thumbnail(place, shard, image)}<div class=role>{label}</div></div>")
    return f"<figure class=copies>{''.join(found)}</figure>"


def _thumbnail(place: Place, shard: str, image: dict[str, Any]) -> str:
    """The picture as a data URL, or what is wrong with it: a page must come out of damaged data too."""
    try:
        filesystem, root = place
        end = image["offset"] + image["length"]
        data = filesystem.cat_file(f"{root}/{shard}", start=image["offset"], end=end)
        check_image(data, decode=False)  # none but our formats reach Pillow, and no bomb
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as opened:
            opened.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))
            small = ImageOps.exif_transpose(opened).convert("RGB")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        encoded = io.BytesIO()
        small.save(encoded, "JPEG", quality=80)
    except Exception as error:  # Pillow's decoders raise many kinds
        return f"<p class=warn>{html.escape(image['member'])}: {html.escape(str(error))}</p>"
    url = base64.b64encode(encoded.getvalue()).decode()
    return f'<img alt="{html.escape(image["member"])}" src="data:image/jpeg;base64,{url}">'


def _text(text: str) -> str:
    return html.escape(text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + " ...")
