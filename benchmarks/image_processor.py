"""Speed and size of image preprocessing against a plain restatement of the published steps, on one core.

    python benchmarks/image_processor.py [--num-crops 16] [--repeat 30]

Both start from the bytes of a 1200 x 900 JPEG. Ours returns uint8 tiles and leaves normalisation and the
global view to the device. The published way makes float32 views, padded to num_crops + 1. First, the script
checks that both give the same values bit for bit. The ways take turns, so that other load slows both;
medians. The time of decoding and resizing alone, which no way avoids, is printed too. Exits 1 below 2.5 times
the speed or above a quarter of the bytes.
"""

import argparse
import io
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.record import Comparison, report
from phi3v_dist.processor.geometry import hd_grid
from phi3v_dist.processor.image import decode_image, hd_tiles
from phi3v_dist.processor.pixels import global_views, normalise
from phi3v_dist.processor.preprocessor_config import IMAGE_MEAN, IMAGE_STD

SIDE = 336
SPEED_BAR, BYTES_BAR = 2.5, 0.25


def photo(width: int, height: int) -> bytes:
    """A JPEG with the statistics of a photo: smooth shapes under fine grain."""
    random = np.random.RandomState(0)
    small = Image.fromarray(random.randint(0, 256, size=(height // 12, width // 12, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grainy = np.clip(smooth + random.randint(-6, 7, size=smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grainy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def published(data: bytes, num_crops: int) -> torch.Tensor:
    """float32 [1, num_crops + 1, 3, 336, 336]: every step as the model card's processor takes it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    grid = hd_grid(*image.size, num_crops)
    if grid.transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    image = image.resize((grid.resized_width, grid.resized_height), Image.Resampling.BILINEAR)
    image = ImageOps.expand(image, (0, grid.pad_top, 0, grid.pad_bottom), fill=(255, 255, 255))
    if grid.transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    canvas = pixels.clone().sub_(mean).div_(std)[None]
    whole = torch.nn.functional.interpolate(canvas.float(), size=(SIDE, SIDE), mode="bicubic")
    tiles = canvas.reshape(1, 3, grid.rows, SIDE, grid.cols, SIDE).permute(0, 2, 4, 1, 3, 5)
    views = torch.cat([whole, tiles.reshape(-1, 3, SIDE, SIDE).contiguous()])
    return torch.stack([torch.cat([views, torch.zeros(num_crops + 1 - len(views), 3, SIDE, SIDE)])])


def ours(data: bytes, num_crops: int) -> np.ndarray:
    """uint8 [tiles, 3, 336, 336]."""
    return hd_tiles(decode_image(data), num_crops)


def unavoidable(data: bytes, num_crops: int) -> Image.Image:
    """Decode and resize."""
    image = Image.open(io.BytesIO(data))
    image.load()
    grid = hd_grid(*image.size, num_crops)
    return image.resize((grid.resized_width, grid.resized_height), Image.Resampling.BILINEAR)


def medians(ways: list[Callable[[], object]], repeat: int) -> list[float]:
    """Median milliseconds of each way; the ways take turns. Results stay in memory for a while, as in the
    queue of a loader.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    queues: list[deque[object]] = [deque(maxlen=8) for _ in ways]
    for turn in range(repeat + 2):
        for place, way in enumerate(ways):
            start = time.perf_counter()
            queues[place].append(way())
            if turn >= 2:
                seconds[place].append(time.perf_counter() - start)
    return [1000 * float(np.median(times)) for times in seconds]


def main() -> int:
    """Prints the table; the exit status."""
    parser = argparse.ArgumentParser(description="image preprocessing against the published steps")
    parser.add_argument("--num-crops", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = photo(1200, 900)
    tiles, views = ours(data, options.num_crops), published(data, options.num_crops)
    grid = hd_grid(1200, 900, options.num_crops)
    same = torch.cat([global_views(torch.from_numpy(tiles), torch.tensor([[grid.rows, grid.cols]]))])
    assert torch.equal(torch.cat([same, normalise(torch.from_numpy(tiles))]), views[0, : len(tiles) + 1])

    ways: list[Callable[[], object]] = [
        lambda way=way: way(data, options.num_crops) for way in (published, ours, unavoidable)
    ]
    theirs_ms, ours_ms, floor_ms = medians(ways, options.repeat)
    size = tiles.nbytes / (views.numel() * views.element_size())
    work = f"1200 x 900 JPEG to model-ready tiles, num_crops {options.num_crops}, one core"
    steps = "the published processor's steps"
    print(f"Pillow's decode and resize alone: {floor_ms:.1f} ms")
    comparisons = [
        Comparison(
            work, steps, ours_ms, theirs_ms, "ms", theirs_ms / ours_ms,
            f">= {SPEED_BAR} times as fast", theirs_ms / ours_ms >= SPEED_BAR,
        ),
        Comparison(
            "bytes handed over for it", steps, tiles.nbytes / 1e6, views.numel() * 4 / 1e6, "MB", size,
            f"<= {BYTES_BAR}", size <= BYTES_BAR,
        ),
    ]  # fmt: skip
    return report("image_processor", comparisons, options.json)


if __name__ == "__main__":
    sys.exit(main())
