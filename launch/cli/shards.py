"""`phi3v shards sample | build | index | verify | inspect`: images and prompts into WebDataset shards.

Each command turns its flags into options, calls the package `shards`, and prints the result. Bad input raises
BadInputError, which `launch.cli.main` turns into one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shards.format.dataset import DatasetInfo

app = typer.Typer(no_args_is_help=True, help="Images and prompts into WebDataset tar shards with an index.")

_PLAIN_LINE_EVERY = 5.0  # seconds, where standard error is not a terminal

SourceArg = Annotated[
    str | None,
    typer.Argument(help="A .csv, .tsv, .jsonl, .json or .parquet file, a folder of images, or hf:NAME."),
]
OutOption = Annotated[str, typer.Option(help="Directory of the dataset, or an s3:// or other fsspec URL.")]
RecipeOption = Annotated[
    str | None,
    typer.Option(help="A YAML file, or the name of one in configs/shards; flags override its values."),
]
ImagesOption = Annotated[
    list[str] | None, typer.Option("--images", help="Column with image paths or URLs; repeatable.")
]
PromptOption = Annotated[
    str | None, typer.Option(help="Template of the prompt; {column} is replaced by the column's value.")
]
AnswerOption = Annotated[
    str | None, typer.Option(help="Template of the reply; {column} is replaced by the column's value.")
]
KeyOption = Annotated[str | None, typer.Option(help="Column whose value becomes part of the samples' keys.")]
GroupOption = Annotated[
    str | None,
    typer.Option("--group-by", help="Column; equal values stay in one split (default: image hash)."),
]
ImageRootOption = Annotated[
    str | None, typer.Option(help="Folder or URL that image paths are relative to (default: that of SOURCE).")
]
ValOption = Annotated[float, typer.Option(help="Fraction of the groups that becomes the val split.")]
BuildValOption = Annotated[
    float | None, typer.Option(help="Fraction of the groups that becomes the val split (default: 0.1).")
]
SuccessOption = Annotated[float, typer.Option(help="Fraction of the records that must be usable.")]
BuildSuccessOption = Annotated[
    float | None, typer.Option(help="Fraction of the records that must succeed (default: 0.95).")
]
ShardSamplesOption = Annotated[
    int | None, typer.Option(help="Maximum number of samples in a shard (default: 1000).")
]
ShardMbOption = Annotated[
    int | None, typer.Option(help="Maximum size of a shard in MiB (2^20 bytes; default: 256).")
]
MaxSideOption = Annotated[
    int | None, typer.Option(help="Shrink images whose longer side exceeds this number of pixels.")
]
ReencodeOption = Annotated[
    str | None,
    typer.Option(help="Encode every image again: jpeg:90, webp:80 or png (default: keep the files)."),
]
DropOption = Annotated[
    bool,
    typer.Option(
        "--drop-duplicates", help="Leave out samples all of whose images occurred before (in the same task)."
    ),
]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Try the failed records of a complete dataset again.")
]
TaskOption = Annotated[
    str | None,
    typer.Option(help="I/N: build only part I of N, counted from 0; `verify` then closes the dataset."),
]
PrivateOption = Annotated[
    bool, typer.Option("--allow-private-hosts", help="Also fetch from private and loopback addresses.")
]
DecodeOption = Annotated[
    str | None,
    typer.Option(
        help="Images to decode fully instead of only parsing them to their end: fetched (default), all, none."
    ),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(help="Processes that write shards (default: one per core for a local dataset)."),
]
WorkDirOption = Annotated[
    str | None, typer.Option(help="Local folder for shards on their way to an object store (default: cache).")
]
ConcurrencyOption = Annotated[int | None, typer.Option(help="Fetches at the same time (default: 32).")]
PerHostOption = Annotated[
    int | None, typer.Option(help="Fetches at the same time from one host (default: 16).")
]
RetriesOption = Annotated[
    int | None, typer.Option(help="Retries after a failure that may be temporary (default: 3).")
]
ServeDirOption = Annotated[
    Path | None,
    typer.Option(help="Serve this catalogue of `shards sample` on loopback during the build (and allow it)."),
]


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder of the catalogue.")] = Path("data/catalogue"),
    rows: Annotated[int, typer.Option(help="Number of products.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the catalogue; equal seeds make equal bytes.")] = 0,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it over HTTP on loopback until Ctrl-C.")
    ] = False,
    port: Annotated[
        int, typer.Option(help="Port of --serve; 0 takes the port of the last time, or any free port.")
    ] = 0,
) -> None:
    """Generate a product catalogue (CSV and images) to try everything with.

    Example: phi3v shards sample --out data/catalogue --rows 2000
    """
    from shards.sample import make_catalogue, serve_catalogue

    table = make_catalogue(out, rows, seed)
    typer.echo(f"{table}: {rows} products")
    if serve:
        with serve_catalogue(out, port) as url, contextlib.suppress(KeyboardInterrupt):
            typer.echo(
                f"serving {out} at {url} until Ctrl-C; build with: phi3v shards build {table} --out DIR"
            )
            while True:
                time.sleep(3600)


@app.command()
def build(
    source: SourceArg = None,
    out: OutOption = "",
    recipe: RecipeOption = None,
    images: ImagesOption = None,
    prompt: PromptOption = None,
    answer: AnswerOption = None,
    key: KeyOption = None,
    group_by: GroupOption = None,
    image_root: ImageRootOption = None,
    val_fraction: BuildValOption = None,
    shard_samples: ShardSamplesOption = None,
    shard_mb: ShardMbOption = None,
    max_side: MaxSideOption = None,
    reencode: ReencodeOption = None,
    drop_duplicates: DropOption = False,
    min_success: BuildSuccessOption = None,
    retry_failed: RetryOption = False,
    task: TaskOption = None,
    allow_private_hosts: PrivateOption = False,
    decode: DecodeOption = None,
    processes: ProcessesOption = None,
    work_dir: WorkDirOption = None,
    concurrency: ConcurrencyOption = None,
    per_host: PerHostOption = None,
    retries: RetriesOption = None,
    serve_dir: ServeDirOption = None,
) -> None:
    """Fetch and check the images of SOURCE and write shards; run it again to resume where it stopped.

    Example: phi3v shards build products.csv --out data/shop --group-by product_code
    """
    given = {
        "images": images,
        "prompt": prompt,
        "answer": answer,
        "key": key,
        "group_by": group_by,
        "image_root": image_root,
        "val_fraction": val_fraction,
        "shard_samples": shard_samples,
        "shard_bytes": None if shard_mb is None else shard_mb * 2**20,
        "max_side": max_side,
        "reencode": reencode,
        "duplicates": "drop" if drop_duplicates else None,
        "min_success": min_success,
        "allow_private_hosts": (allow_private_hosts or serve_dir is not None) or None,
        "decode": decode,
        "processes": processes,
        "work_dir": work_dir,
        "concurrency": concurrency,
        "per_host": per_host,
        "retries": retries,
    }
    flags = {name: value for name, value in given.items() if value is not None}
    _build(source, out, recipe, flags=flags, task=task, retry_failed=retry_failed, serve_dir=serve_dir)


def _build(
    source: str | None,
    out: str,
    recipe: str | None,
    *,
    flags: dict[str, Any],
    task: str | None,
    retry_failed: bool,
    serve_dir: Path | None,
) -> None:
    """The build with the options of a recipe and the flags that override them."""
    from shards.build import build as build_all
    from shards.build import build_task
    from shards.build import retry_failed as build_retry
    from shards.common.errors import BadInputError
    from shards.recipes import load_recipe
    from shards.sample import serve_catalogue

    named, options = load_recipe(recipe, flags)
    source = source or named
    if source is None or not out:
        missing = "--out" if source is not None else "SOURCE (and no recipe that names one)"
        raise BadInputError(f"{missing} is missing; use phi3v shards build SOURCE --out DIR")
    if task is not None and retry_failed:
        raise BadInputError("--task with --retry-failed: first close the dataset with `phi3v shards verify`")
    serving = contextlib.nullcontext() if serve_dir is None else serve_catalogue(serve_dir)
    with serving, _progress("records") as progress:
        if task is not None:
            number, tasks = _parse_task(task)
            partitions = build_task(source, out, options, task=number, tasks=tasks, progress=progress)
            written = sum(partition.samples.total() for partition in partitions)
            typer.echo(
                f"{out}: task {task} is done, {written} samples; "
                f"`phi3v shards verify {out}` closes the dataset"
            )
            return
        info = (build_retry if retry_failed else build_all)(source, out, options, progress=progress)
    typer.echo(f"{out}: {info.num_samples} samples in {_shards(info)}, {_splits(info.splits)}")


def _parse_task(text: str) -> tuple[int, int]:
    from shards.common.errors import BadInputError

    number, _, tasks = text.partition("/")
    if not (number.isdigit() and tasks.isdigit()):
        raise BadInputError(f"--task {text}: must be I/N, such as 0/8")
    return int(number), int(tasks)


@app.command()
def index(
    directory: Annotated[
        str, typer.Argument(help="Directory (or s3:// or other URL) of .tar files in WebDataset form.")
    ],
    images: Annotated[
        list[str] | None, typer.Option("--images", help="Suffix of the image members; repeatable.")
    ] = None,
    prompt: PromptOption = None,
    answer: AnswerOption = None,
    group_by: GroupOption = None,
    val_fraction: ValOption = 0.1,
    min_success: SuccessOption = 0.95,
    work_dir: Annotated[
        str | None, typer.Option(help="Local folder for the tars of an object store (default: cache).")
    ] = None,
) -> None:
    """Make index and dataset.json for existing tars in WebDataset form; the tars are not changed.

    Example: phi3v shards index data/tars --prompt 'Describe it.' --answer '{txt}'
    """
    from shards.index import IndexOptions, build_index

    options = IndexOptions(
        images=tuple(images or ()),
        prompt=prompt,
        answer=answer,
        group_by=group_by,
        val_fraction=val_fraction,
        min_success=min_success,
    )
    with _progress("bytes") as progress:
        info = build_index(directory, options, progress=progress, work_dir=work_dir)
    typer.echo(f"{directory}: {info.num_samples} samples in {_shards(info)}, {_splits(info.splits)}")


@app.command()
def verify(
    directory: Annotated[str, typer.Argument(help="A dataset directory.")],
    decode: Annotated[float, typer.Option(help="Fraction of the images to decode, 0 to 1.")] = 0.01,
    full: Annotated[bool, typer.Option("--full", help="Decode every image.")] = False,
) -> None:
    """Check checksums, tars, index, messages and images; exit code 4 if anything is wrong.

    A dataset that several tasks have built is closed first.

    Example: phi3v shards verify data/shop --decode 0.1
    """
    from phi3v_dist.exits import DIVERGED
    from shards.build import close_tasks, waits_for_close
    from shards.verify import verify as verify_dataset

    if waits_for_close(directory):
        close_tasks(directory)
    with _progress("bytes") as progress:
        report = verify_dataset(directory, 1.0 if full else decode, progress)
    for fault in report.faults:
        typer.echo(fault)
    what = f"{report.shards} shards, {report.samples} samples, {report.images} images "
    what += f"({report.images_decoded} decoded)"
    if report.num_faults:
        typer.echo(f"{directory}: {report.num_faults} faults in {what}")
        raise typer.Exit(DIVERGED)
    typer.echo(f"{directory}: good: {what}")


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(help="A dataset directory.")],
    html: Annotated[
        Path | None, typer.Option(help="Also write an HTML page with images and histograms.")
    ] = None,
) -> None:
    """Print counts, image sizes, text lengths, duplicates and failed records.

    Example: phi3v shards inspect data/shop --html shop.html
    """
    from shards.common.files import write_atomically
    from shards.inspect import Spread
    from shards.inspect import inspect as inspect_dataset

    found = inspect_dataset(directory)
    typer.echo(f"{directory}: {found.info.num_samples} samples, {_splits(found.info.splits)}")
    typer.echo(f"from {found.info.source}, {len(found.info.shards)} shards, {found.shard_bytes / 1e6:.1f} MB")
    typer.echo(f"{'':24}{'least':>10}{'median':>10}{'95 %':>10}{'most':>10}")

    def line(name: str, spread: Spread) -> None:
        numbers = (spread.smallest, spread.median, spread.percentile_95, spread.largest)
        typer.echo(f"{name:24}" + "".join(f"{number:>10g}" for number in numbers))

    line("image width, px", found.width)
    line("image height, px", found.height)
    line("image size, bytes", found.image_bytes)
    line("prompt, characters", found.prompt_chars)
    line("reply, characters", found.reply_chars)
    line("turns", found.turns)
    typer.echo(
        "images per sample: " + ", ".join(f"{n}: {count}" for n, count in found.images_per_sample.items())
    )
    typer.echo("image formats: " + ", ".join(f"{name} {count}" for name, count in found.formats.items()))
    copies = sum(len(group) - 1 for group in found.duplicate_images)
    typer.echo(f"duplicate images: {copies} copies in {len(found.duplicate_images)} groups")
    if found.cross_split:
        typer.echo(f"WARNING: {found.cross_split} of these groups are in more than one split")
    typer.echo(f"samples whose messages all came before: {found.repeated_texts}")
    for reply, count in found.frequent_replies:
        typer.echo(f"  reply {count} times: {reply[:80]!r}")
    for reason, count in found.failed.items():
        typer.echo(f"  failed {count} times: {reason}")
    if html is not None:
        from shards.page import make_page

        html.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(html, make_page(directory, found).encode())
        typer.echo(f"page: {html}")


def _shards(info: DatasetInfo) -> str:
    return f"{len(info.shards)} shard{'' if len(info.shards) == 1 else 's'}"


def _splits(splits: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in splits.items())


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Gives progress(done, total): a bar on a terminal, else a line every few seconds, on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(unit, *columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(unit, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started = time.monotonic()
    printed = started

    def line(done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed >= _PLAIN_LINE_EVERY or (done == total and printed > started):
            printed = now
            print(f"{done}/{total} {unit}, {now - started:.0f} s", file=sys.stderr, flush=True)

    yield line
