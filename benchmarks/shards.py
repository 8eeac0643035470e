"""How fast local JPEGs become shards, against tar, webdataset's own writer and img2dataset; and the memory.

    python benchmarks/shards.py [--files 10000] [--peer-python VENV/bin/python] [--rows 100000]

Makes noisy JPEGs of about 100 KB, each with other bytes, in a temporary folder, then prints one line per way:
seconds, MB/s, and the speed as a part of `tar c | sha256sum`, the least that reading and hashing can cost.
--peer-python: an interpreter with img2dataset in it. --rows: a build of so many small images, for the memory.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

BUILD = """
import sys
from shards.build import BuildOptions, build
build(sys.argv[1], sys.argv[2], BuildOptions(("image",), "?", "{name}", decode=sys.argv[3] == "decode"))
"""
# The same as two tasks at once.
TASKS = """
import subprocess, sys
code = "import sys; from shards.build import BuildOptions, build_task;"
code += " options = BuildOptions(('image',), '?', '{name}', decode=False);"
code += " build_task(*sys.argv[1:3], int(sys.argv[3]), 2, options)"
running = [subprocess.Popen([sys.executable, "-c", code, *sys.argv[1:3], str(task)]) for task in range(2)]
sys.exit(max(process.wait() for process in running))
"""
# webdataset's own writer in the plainest loop: read, verify, write. No hashes, no index, no resume.
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
# img2dataset, told to keep the bytes as they are and to hash them.
PEER = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1], input_format="csv", url_col="url", caption_col="name", thread_count=16,
             processes_count=2, output_folder=sys.argv[2], output_format="webdataset",
             number_sample_per_shard=1000, resize_mode="no", disable_all_reencoding=True,
             compute_hash="sha256", min_image_size=0)
"""


def make_files(folder: Path, files: int, size: tuple[int, int], noise: bool) -> None:
    """`files` JPEGs of 16 contents, told apart by a comment, and a table.csv (image, url, name) of them."""
    rng = random.Random(0)
    contents = []
    for _ in range(16):
        image = Image.frombytes("RGB", (80, 60), rng.randbytes(80 * 60 * 3)).resize(
            size, Image.Resampling.BICUBIC
        )
        if noise:
            image = Image.blend(
                image, Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])), 0.045
            )
        data = io.BytesIO()
        image.save(data, "JPEG", quality=82)
        contents.append(data.getvalue())
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
            table.writerow([f"images/{path.name}", path.as_uri(), f"picture {number}"])


def seconds(run: Callable[[], object], times: int) -> float:
    """The best of `times` runs."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--peer-python")
    parser.add_argument("--rows", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "source", Path(temporary) / "out"
        if arguments.files:
            make_files(folder, arguments.files, (800, 600), noise=True)
            compare(folder, out, arguments)
        if arguments.rows:
            shutil.rmtree(folder, ignore_errors=True)
            make_files(folder, arguments.rows, (64, 48), noise=False)
            script = (
                BUILD + "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
            )
            out.mkdir(exist_ok=True)
            shutil.rmtree(out)
            command = [sys.executable, "-c", script, str(folder / "table.csv"), str(out), "decode"]
            peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            print(f"{arguments.rows} rows: {peak} MiB at most")


def compare(folder: Path, out: Path, arguments: argparse.Namespace) -> None:
    total = sum(path.stat().st_size for path in (folder / "images").iterdir())
    print(f"{arguments.files} files, {total / 1e6:.0f} MB, {os.cpu_count()} cores")
    table = str(folder / "table.csv")

    def script(
        code: str, *words: str, python: str = sys.executable, source: str = table
    ) -> Callable[[], object]:
        def run() -> None:
            shutil.rmtree(out, ignore_errors=True)
            if "ShardWriter" in code:
                out.mkdir()
            command = [python, "-c", code, source, str(out), *words]
            if "img2dataset" in code:  # it starts processes, so it needs a file
                (folder / "peer.py").write_text(code)
                command[1:3] = [str(folder / "peer.py")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        return run

    def shell(command: str) -> Callable[[], object]:
        return lambda: subprocess.run(
            ["bash", "-c", command], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )

    ways = {
        "tar c | sha256sum": shell("tar c images | sha256sum"),
        "tar c > file, on the disk": shell(f"tar cf {out}.tar images && sync {out}.tar && rm {out}.tar"),
        "shards build, structure": script(BUILD, "structure"),
        "the same, two tasks at once": script(TASKS),
        "shards build, decoding": script(BUILD, "decode"),
        "ShardWriter, PIL verify": script(PLAIN),
    }
    if arguments.peer_python:
        ways["img2dataset"] = script(PEER, python=arguments.peer_python)
    reference = None
    for name, run in ways.items():
        took = seconds(run, arguments.times)
        reference = reference or took
        print(f"{name:28}{took:7.1f} s {total / took / 1e6:7.0f} MB/s {reference / took:6.0%}", flush=True)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest child process: {children:.0f} MiB")


if __name__ == "__main__":
    main()
