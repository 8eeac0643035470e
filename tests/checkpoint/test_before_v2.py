"""A checkpoint and a dataset written before version 2 are read by this version, and the run resumes."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint.restore import find_source, restore
from phi3v_dist.data.reader import SampleReader
from phi3v_dist.data.samples import read_samples
from phi3v_dist.processor.image import hd_tiles
from tests.ranks import logged, run_ranks

FIXTURES = Path(__file__).parents[1] / "fixtures"
TARGET = FIXTURES / "checkpoint-before-v2/step-000002"
DATASET = FIXTURES / "dataset-before-v2"


def stored(kind: str) -> dict[str, torch.Tensor]:
    """The flattened tensors of a kind, such as "master", joined by hand from the files of the two ranks."""
    files = [load_file(TARGET / f"rank-{rank:05d}.safetensors") for rank in range(2)]
    names = [name for name in files[0] if name.startswith(f"{kind}/")]
    return {name.partition("/")[2]: torch.cat([file[name] for file in files]) for name in names}


def test_an_old_checkpoint_says_what_it_said() -> None:
    meta = checkpoint.read_meta(TARGET)
    assert meta.progress.step == 2 and meta.progress.rows == 4 and meta.world_size == 2
    assert set(meta.adam_steps) == {2.0} and len(meta.groups) == 6
    assert meta.to_json() == (TARGET / "meta.json").read_text(), "byte for byte"


def test_weights_of_an_old_checkpoint_are_what_its_files_hold() -> None:
    master, shapes = stored("master"), checkpoint.read_meta(TARGET).parameters
    weights = dict(checkpoint.read_tensors(TARGET))
    frozen = stored("frozen")
    assert weights.keys() == shapes.keys()
    for name, tensor in weights.items():
        flat = (frozen if shapes[name].frozen else master)[name]
        assert torch.equal(tensor.flatten(), flat[: math.prod(shapes[name].shape)]), name
    restored = restore(find_source(TARGET), "cpu", torch.float32)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in restored.model.named_parameters())


@pytest.mark.ranks
def test_an_old_run_resumes_and_learns_what_it_learnt(tmp_path: Path) -> None:
    folder = tmp_path / "runs/before-v2/checkpoints"
    folder.mkdir(parents=True)
    shutil.copytree(TARGET, folder / TARGET.name)
    run_ranks(TARGET.parent / "config.yaml", 1, f"runs_dir={tmp_path / 'runs'}", f"data.path={DATASET}")
    lines = [json.loads(line) for line in (TARGET.parent / "metrics.jsonl").read_text().splitlines()]
    before = {line["train/global_step"]: line["train/loss"] for line in lines}
    after = logged(tmp_path / "runs/before-v2", "train/loss")
    assert set(after) == {3, 4}
    assert all(after[step] == pytest.approx(before[step], rel=1e-5) for step in after)


def test_images_of_an_old_dataset_are_read() -> None:
    samples = read_samples([str(DATASET)], "train")
    assert len(samples) == 5
    reader = SampleReader(samples.roots, samples.shards)
    try:
        for record in samples.records(range(5)):
            (data,) = reader.images(record)
            (image,) = record.images
            decoded = Image.open(io.BytesIO(data))
            assert decoded.size == (image.width, image.height)
            assert hd_tiles(decoded, 1, 112).shape[1:] == (3, 112, 112)
    finally:
        reader.close()
