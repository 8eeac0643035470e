"""Answers by generation: the same whatever the batch, every sample once, pictures that change places."""

import json
from pathlib import Path

import pytest
import torch

from phi3v_dist.config import load_config
from phi3v_dist.evaluate import answer, ask, evaluate, read_questions, swap_pictures, write_evaluation
from phi3v_dist.export import export
from phi3v_dist.model.hub import load_config as load_model_config
from phi3v_dist.origin import Origin, prepare_origin
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.restore import Restored, find_source, restore
from shards.format import BadInputError, read_index


class Alone(Mesh):
    """The mesh of one process that needs no process group."""

    def on_main(self, work):  # type: ignore[no-untyped-def]
        return work()


@pytest.fixture
def origin(tiny_config: Path) -> Origin:
    config = load_config(tiny_config, ["data.num_crops=4"])
    return prepare_origin(config, config.run_dir, Alone(0, 1, 0, torch.device("cpu")))


@pytest.fixture
def restored(origin: Origin) -> Restored:
    return restore(find_source(origin.model_dir), "cpu", torch.float32)


def test_a_new_model_is_made_once_and_the_same_for_the_same_seed(tiny_config: Path, origin: Origin) -> None:
    config = load_config(tiny_config, ["data.num_crops=4"])
    first = (origin.model_dir / "model.safetensors").read_bytes()
    stamp = (origin.model_dir / "model.safetensors").stat().st_mtime_ns
    prepare_origin(config, config.run_dir, Alone(0, 1, 0, torch.device("cpu")))
    assert (origin.model_dir / "model.safetensors").stat().st_mtime_ns == stamp
    other = config.run_dir.parent / "other"
    again = prepare_origin(config, other, Alone(0, 1, 0, torch.device("cpu")))
    assert (again.model_dir / "model.safetensors").read_bytes() == first
    assert load_model_config(again.model_dir).pad_token_id == origin.tokenizer.pad_token_id


def test_answers_do_not_depend_on_the_batch(products: Path, restored: Restored) -> None:
    questions = read_questions(str(products), read_index(str(products), "train").slice(0, 5).to_pylist())
    alone = answer(restored.model, restored.processor, questions, 1, 12)
    assert answer(restored.model, restored.processor, questions, 4, 12) == alone
    assert answer(restored.model, restored.processor, questions[::-1], 3, 12) == alone[::-1]


def test_a_question_ends_where_the_reply_begins(products: Path) -> None:
    record = read_index(str(products), "val").slice(0, 1).to_pylist()[0]
    (question,) = read_questions(str(products), [record])
    assert question.prompt.endswith("<|end|>\n<|assistant|>\n")
    assert question.truth == record["messages"][-1]["content"] and question.truth not in question.prompt


def test_swapped_pictures_are_all_others(products: Path) -> None:
    questions = read_questions(str(products), read_index(str(products), "train").slice(0, 20).to_pylist())
    swapped = swap_pictures(questions, 0)
    assert [q.truth for q in swapped] == [q.truth for q in questions]
    assert all(a.pictures[0] is not b.pictures[0] for a, b in zip(questions, swapped, strict=True))
    assert sorted(id(q.pictures[0]) for q in swapped) == sorted(id(q.pictures[0]) for q in questions)
    assert [id(q.pictures[0]) for q in swap_pictures(questions, 0)] == [id(q.pictures[0]) for q in swapped]


def test_every_sample_is_answered_once_and_written(
    products: Path, restored: Restored, tmp_path: Path
) -> None:
    index = read_index(str(products), "val")
    result = evaluate(restored, str(products), "val", None, True, 4, 6)
    assert [q.key for q in result.questions] == index["key"].to_pylist()
    assert result.baseline is not None and result.baseline.price_parse_rate == 1
    assert result.swapped is not None and result.swapped.samples == index.num_rows
    write_evaluation(result, tmp_path / "eval")
    lines = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == index["key"].to_pylist()
    assert json.loads((tmp_path / "eval" / "scores.json").read_text())["scores"]["samples"] == index.num_rows
    few = evaluate(restored, str(products), "train", 3, False, 4, 6)
    assert few.scores.samples == 3 and few.swapped is None


def test_what_cannot_be_used_is_refused(
    products: Path, restored: Restored, origin: Origin, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match="undecodable"):
        ask(restored, b"not a picture", "What?", 4)
    with pytest.raises(BadInputError, match="no split 'test'"):
        evaluate(restored, str(products), "test", None, False, 4, 4)
    with pytest.raises(BadInputError, match="neither a run, nor a checkpoint"):
        find_source(tmp_path)
    with pytest.raises(BadInputError, match="a model directory already"):
        export(find_source(origin.model_dir), tmp_path / "out")
