"""How fast local JPEGs become shards, against tar with sha256, img2dataset and ShardWriter; memory.

    python benchmarks/shards.py [--files N] [--rows N] [--rounds 3] [--peer-python PYTHON] [--json PATH]

Makes noisy JPEGs of about 100 KB, no two with equal bytes, in a temporary folder. The ways take turns, and
the start of the process counts. A ratio is the median over the rounds, of wall clock time. img2dataset needs
packages that conflict with ours, so a virtual environment is made for it, unless --peer-python names one.
--rows: measures the memory of a build of this many small images, all processes together; 0: not measured.

The bars: 70 % of the speed of a tar that is hashed and written; 3 times the speed of img2dataset when it
gives what the build gives (original bytes, sha256, width and height, every image checked; it checks by
decoding); less than 400 MB. Three more ways are shown: a tar that is only hashed, img2dataset without any
look at the images, and a simple loop around webdataset's ShardWriter.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
from PIL import Image

from benchmarks.record import Comparison, report

ASK = ["--images", "image", "--prompt", "What is this?", "--answer", "{name}"]
# webdataset's own writer in a simple loop: read, verify, write. No hashes, no index, no resuming.
PLAIN = """
import csv, io, sys
from pathlib import Path
from PIL import Image
from webdataset import ShardWriter
table = Path(sys.argv[1])
with ShardWriter(sys.argv[2] + "/%06d.tar", maxcount=1000, verbose=0) as sink, table.open() as stream:
    for number, row in enumerate(csv.DictReader(stream)):
        data = (table.parent / row["image"]).read_bytes()
        Image.open(io.BytesIO(data)).verify()
        sink.write({"__key__": f"{number:08d}", "jpg": data, "json": {"name": row["name"]}})
"""
# img2dataset that keeps the bytes and hashes them. skip_reencode: it decodes to learn the size and whether
# the image is valid, but stores the bytes that it read; disable_all_reencoding: it does not look at the
# image.
PEER = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1], input_format="csv", url_col="url", caption_col="name", thread_count=16,
             processes_count=2, output_folder=sys.argv[2], output_format="webdataset",
             number_sample_per_shard=1000, resize_mode="no", compute_hash="sha256", min_image_size=0,
             **{sys.argv[3]: True})
"""
# Both hash all bytes once; the first also writes the tar to the disk, as `shards build` does.
TAR, PIPE = "tar c | tee X.tar | sha256sum; sync", "tar c | sha256sum, nothing written"
CHECKED, UNCHECKED = "img2dataset, checking", "img2dataset, not looking at the images"
LOOP, OURS = "ShardWriter loop, PIL verify", "shards build"


def make_files(folder: Path, files: int, size: tuple[int, int], noise: bool) -> None:
    """Makes `files` JPEGs of 16 images, each with another comment, and a table.csv (image, url, name)."""
    rng = random.Random(0)
    contents = []
    for _ in range(16):
        image = Image.frombytes("RGB", (80, 60), rng.randbytes(80 * 60 * 3)).resize(size, 3)
        if noise:
            image = Image.blend(
                image, Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])), 0.045
            )
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=82)
        contents.append(encoded.getvalue())
    (folder / "images").mkdir(parents=True)
    with (folder / "table.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image", "url", "name"])
        for number in range(files):
            comment = b"%012d" % number
            data = contents[number % len(contents)]
            data = data[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + data[2:]
            path = folder / f"images/{number:06d}.jpg"
            path.write_bytes(data)
            table.writerow([f"images/{path.name}", path.as_uri(), f"image {number}"])


def peer_python(folder: Path) -> str | None:
    """An interpreter with img2dataset installed; None if it cannot be installed."""
    made = [sys.executable, "-m", "venv", str(folder)]
    install = [str(folder / "bin/pip"), "install", "-q", "--disable-pip-version-check", "img2dataset"]
    for command in (made, install):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(
                f"img2dataset cannot be installed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr
            )
            return None
    return str(folder / "bin/python")


def ways(folder: Path, out: Path, peer: str | None) -> dict[str, Callable[[], object]]:
    """The name of each way -> the function that runs it."""
    table, tar = str(folder / "table.csv"), f"{out}.tar"
    (folder / "peer.py").write_text(PEER)  # it starts processes, which must import it from a file

    def run(command: list[str], make_out: bool = False) -> Callable[[], object]:
        def once() -> None:
            shutil.rmtree(out, ignore_errors=True)
            if make_out:
                out.mkdir()
            subprocess.run(
                command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )

        return once

    found = {
        OURS: run(build_command(folder, out)),
        TAR: run(["bash", "-c", f"set -o pipefail; tar c images | tee {tar} | sha256sum; sync {tar}"]),
        PIPE: run(["bash", "-c", "set -o pipefail; tar c images | sha256sum"]),
        LOOP: run([sys.executable, "-c", PLAIN, table, str(out)], make_out=True),
    }
    if peer is not None:
        found[CHECKED] = run([peer, str(folder / "peer.py"), table, str(out), "skip_reencode"])
        found[UNCHECKED] = run([peer, str(folder / "peer.py"), table, str(out), "disable_all_reencoding"])
    return found


def build_command(folder: Path, out: Path) -> list[str]:
    """The command of our build of the table in `folder`."""
    phi3v = Path(sys.executable).with_name("phi3v")
    return [str(phi3v), "shards", "build", str(folder / "table.csv"), "--out", str(out), *ASK]


def compare(times: Mapping[str, list[float]], cpu: Mapping[str, list[float]]) -> list[Comparison]:
    """`shards build` against each other way. Ratios are of speeds: above 1, `shards build` is faster."""
    found = []
    for name in times:
        if name == OURS:
            continue
        rounds = zip(times[name], times[OURS], strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in rounds)
        bar = {TAR: 0.7, CHECKED: 3.0, LOOP: None if CHECKED in times else 3.0}.get(name)
        text = "" if bar is None else f">= {bar:g}"
        met = None if bar is None else ratio >= bar
        ours, theirs = statistics.median(times[OURS]), statistics.median(times[name])
        found.append(Comparison(OURS, name, ours, theirs, "s", ratio, text, met))
        ours, theirs = statistics.median(cpu[OURS]), statistics.median(cpu[name])
        found.append(Comparison(f"{OURS}, CPU time", name, ours, theirs, "s", theirs / ours))
    return found


def memory(folder: Path, out: Path) -> float:
    """Peak memory of a build in MB: all processes together, shared pages counted once."""
    process = psutil.Popen(build_command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        held = 0
        for each in [process, *process.children(recursive=True)]:
            try:
                held += each.memory_full_info().pss
            except psutil.Error:
                continue
        most = max(most, held)
        time.sleep(0.1)
    assert process.returncode == 0
    return most / 1e6


def main() -> int:
    """Runs the comparisons. Returns 1 if a bar is missed, else 0."""
    parser = argparse.ArgumentParser(description="shards build against tar, img2dataset and ShardWriter")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--peer-python")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "source", Path(temporary) / "out"
        if arguments.files:
            make_files(folder, arguments.files, (800, 600), noise=True)
            total = sum(path.stat().st_size for path in (folder / "images").iterdir())
            print(f"{arguments.files} files, {total / 1e6:.0f} MB", flush=True)
            peer = arguments.peer_python or peer_python(Path(temporary) / "peer")
            times: dict[str, list[float]] = {}
            cpu: dict[str, list[float]] = {}
            for _ in range(arguments.rounds):
                for name, run in ways(folder, out, peer).items():
                    before, began = psutil.Process().cpu_times(), time.perf_counter()
                    run()
                    times.setdefault(name, []).append(time.perf_counter() - began)
                    after = psutil.Process().cpu_times()
                    used = after.children_user + after.children_system
                    cpu.setdefault(name, []).append(used - before.children_user - before.children_system)
                    rate = total / times[name][-1] / 1e6
                    print(
                        f"{name:40}{times[name][-1]:7.1f} s {rate:6.0f} MB/s, CPU {cpu[name][-1]:.1f} s",
                        flush=True,
                    )
            comparisons += compare(times, cpu)
        if arguments.rows:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)
            make_files(folder, arguments.rows, (64, 48), noise=False)
            most = memory(folder, out)
            what = f"memory of a build of {arguments.rows} records"
            comparisons.append(
                Comparison(what, "the limit", most, 400.0, "MB", most / 400, "< 1 (400 MB)", most < 400)
            )
    return report("shards", comparisons, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
