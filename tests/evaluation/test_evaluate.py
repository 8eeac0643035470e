"""Answers by generation: the same at any number of ranks, every sample once, pictures that change places."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from phi3v_dist.checkpoint.restore import Restored, find_source, restore
from phi3v_dist.config import load_config
from phi3v_dist.evaluation.evaluate import EvalSettings, evaluate, write_evaluation
from phi3v_dist.evaluation.generate import ask, generate, generate_all
from phi3v_dist.evaluation.prompts import Prompts, PromptShape, make_batches, read_split
from phi3v_dist.export import export
from phi3v_dist.model.hub import load_config as load_model_config
from phi3v_dist.pretrained import Pretrained, model_config_of, prepare_pretrained
from shards.build import BuildOptions, build
from shards.common.errors import BadInputError
from shards.format.index import read_index
from shards.sample import make_catalogue
from tests.alone import ALONE
from tests.evaluation.evaluate_rank import SETTINGS
from tests.ranks import finish, start


@pytest.fixture
def pretrained(tiny_config: Path) -> Pretrained:
    config = load_config(tiny_config, ["data.num_crops=4"])
    return prepare_pretrained(config, config.run_dir, ALONE)


@pytest.fixture
def restored(pretrained: Pretrained) -> Restored:
    return restore(find_source(pretrained.model_dir), "cpu", torch.float32)


def prompts_of(products: Path, split: str, number: int) -> Prompts:
    return Prompts(read_split([str(products)], split, None).take(range(number)))


def test_a_new_model_is_made_once_and_the_same_for_the_same_seed(
    tiny_config: Path, pretrained: Pretrained
) -> None:
    config = load_config(tiny_config, ["data.num_crops=4"])
    first = (pretrained.model_dir / "model.safetensors").read_bytes()
    stamp = (pretrained.model_dir / "model.safetensors").stat().st_mtime_ns
    prepare_pretrained(config, config.run_dir, ALONE)
    assert (pretrained.model_dir / "model.safetensors").stat().st_mtime_ns == stamp
    other = config.run_dir.parent / "other"
    again = prepare_pretrained(config, other, ALONE)
    assert (again.model_dir / "model.safetensors").read_bytes() == first
    assert load_model_config(again.model_dir).pad_token_id == pretrained.tokenizer.pad_token_id


@pytest.mark.parametrize("change", ["seed=5", "model.config.num_hidden_layers=1", "data.num_crops=2"])
def test_a_model_of_another_configuration_is_made_anew(
    tiny_config: Path, pretrained: Pretrained, change: str, tmp_path: Path
) -> None:
    config = load_config(tiny_config, ["data.num_crops=4", change])
    before = {file.name: file.read_bytes() for file in pretrained.model_dir.iterdir()}
    again = prepare_pretrained(config, config.run_dir, ALONE)
    elsewhere = prepare_pretrained(config, tmp_path / "fresh", ALONE)
    after = {file.name: file.read_bytes() for file in again.model_dir.iterdir()}
    assert after != before
    assert after == {file.name: file.read_bytes() for file in elsewhere.model_dir.iterdir()}


def test_a_tokenizer_of_other_data_is_made_anew_and_so_is_one_half_made(
    tiny_config: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    config = load_config(tiny_config, ["data.num_crops=4"])
    first = (pretrained.tokenizer_dir / "tokenizer.json").read_bytes()
    make_catalogue(tmp_path / "catalogue", 20, seed=7)
    build(str(tmp_path / "catalogue/products.csv"), str(tmp_path / "others"), BuildOptions())
    others = load_config(tiny_config, ["data.num_crops=4", f"data.path={tmp_path / 'others'}"])
    prepare_pretrained(others, config.run_dir, ALONE)
    assert (pretrained.tokenizer_dir / "tokenizer.json").read_bytes() != first
    (pretrained.tokenizer_dir / "made-of.json").unlink()
    prepare_pretrained(config, config.run_dir, ALONE)
    assert (pretrained.tokenizer_dir / "tokenizer.json").read_bytes() == first


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("hiden_size", "unknown key model.config.hiden_size; did you mean hidden_size?"),
        ("clip_vision_config.num_layers", "clip_vision_config.num_layers; did you mean num_hidden_layers?"),
    ],
)
def test_a_misspelt_key_of_a_new_model_is_refused(tiny_config: Path, key: str, words: str) -> None:
    config = load_config(tiny_config, [f"model.config.{key}=3"])
    for make in (model_config_of, lambda config: prepare_pretrained(config, config.run_dir, ALONE)):
        with pytest.raises(BadInputError, match=re.escape(words)):
            make(config)


def test_samples_are_told_apart_by_a_field_of_their_meta(products: Path) -> None:
    codes = prompts_of(products, "train", 5).parts("product_code")
    assert len(set(codes)) == 5 and None not in codes
    assert prompts_of(products, "train", 5).parts("no_such_field") == [None] * 5


def test_answers_do_not_depend_on_what_shares_the_batch(products: Path, restored: Restored) -> None:
    prompts = prompts_of(products, "train", 5)
    alone = [generate(restored, prompts.read([place]), 12)[0] for place in range(5)]
    assert generate_all(restored, prompts, ALONE, batch_size=4, max_new_tokens=12)[0] == alone
    assert generate(restored, prompts.read([4, 1, 2]), 12) == [alone[4], alone[1], alone[2]]


def test_answers_near_the_switch_of_the_rope_factors_are_those_of_each_alone(
    products: Path, restored: Restored
) -> None:
    prompts = prompts_of(products, "train", 6)
    processor = restored.processor
    shapes = prompts.shapes(processor.tokenizer, processor.num_crops, processor.tile)
    read = prompts.read(range(6))
    inputs = [processor(p.text, list(p.images), return_tensors="pt") for p in read]
    assert [shape.tokens for shape in shapes] == [each["input_ids"].shape[1] for each in inputs]
    # a model whose factors switch in the midst of these prompts and their answers
    middle = sorted(shape.tokens for shape in shapes)[3] + 4
    restored.config.original_max_position_embeddings = middle
    restored.model.config.original_max_position_embeddings = middle
    restored.model.model.rope.original_max = middle
    alone = [generate(restored, [prompt], 12)[0] for prompt in read]
    assert generate_all(restored, prompts, ALONE, batch_size=6, max_new_tokens=12)[0] == alone


def test_batches_keep_apart_what_would_change_its_neighbours() -> None:
    sizes = [(10, 1), (95, 1), (97, 1), (120, 1), (130, 1), (11, 0), (12, 200), (13, 100)]
    shapes = [PromptShape(tokens, views, min(1, views)) for tokens, views in sizes]
    batches = make_batches(shapes, 4, 8, rope_switch=100)
    assert sorted(place for batch in batches for place in batch.places) == list(range(8))
    assert {batch.places for batch in batches} == {(4, 3), (1,), (2,), (7,), (6, 0), (5,)}
    assert {batch.places for batch in batches if batch.crosses_rope_switch} == {(1,), (2,)}
    assert [batch.places for batch in batches if not batch.has_images] == [(5,)]


def test_a_question_ends_where_the_reply_begins(products: Path) -> None:
    prompts = prompts_of(products, "val", 1)
    (prompt,) = prompts.read([0])
    assert prompt.text.endswith("<|end|>\n<|assistant|>\n")
    assert prompt.truth == prompts.truths[0] and prompt.truth not in prompt.text


def test_swapped_pictures_are_all_others(products: Path) -> None:
    prompts = prompts_of(products, "train", 20)
    swapped = prompts.swapped(0)
    assert swapped.truths == prompts.truths
    ours, theirs = prompts._images_of, swapped._images_of
    assert all(a != b for a, b in zip(ours, theirs, strict=True)) and sorted(theirs) == ours
    assert prompts.swapped(0)._images_of == theirs
    a, b = prompts.read([theirs[3]])[0], swapped.read([3])[0]
    assert a.images[0].tobytes() == b.images[0].tobytes() and a.key != b.key


def test_every_sample_is_answered_once_and_written(
    products: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    source = find_source(pretrained.model_dir)
    index = read_index(str(products), "val")
    result = evaluate(source, str(products), EvalSettings(batch_size=4, max_new_tokens=6), mesh=ALONE)
    assert [answer.key for answer in result.answers] == index["key"].to_pylist()
    assert result.baseline is not None and result.baseline.values["price_parse_rate"] == 1
    assert result.swapped is not None and result.swapped.samples == index.num_rows
    assert sum(scores.samples for scores in result.by_slice.values()) == index.num_rows
    write_evaluation(result, tmp_path / "eval")
    lines = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == index["key"].to_pylist()
    written = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert written["scores"]["samples"] == index.num_rows and written["scores"]["loss"] == result.loss
    table = pq.read_table(tmp_path / "eval" / "predictions.parquet")
    assert table["key"].to_pylist() == index["key"].to_pylist()
    assert all(data.startswith(b"\xff\xd8") for data in table["picture"].to_pylist())
    settings = EvalSettings(
        split="train", samples=3, swap=False, loss=False, metrics=("anls",), batch_size=4, max_new_tokens=4
    )
    few = evaluate(source, str(products), settings, mesh=ALONE)
    assert few.scores.samples == 3 and few.swapped is None and list(few.scores.values) == ["anls"]


@pytest.mark.ranks
def test_any_number_of_ranks_gives_the_same_files(
    products: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"  # a picture that only one rank reads
    shutil.copytree(products, damaged)
    record = read_index(str(damaged), "train").slice(0, 1).to_pylist()[0]
    with (damaged / record["shard"]).open("r+b") as stream:
        stream.seek(record["images"][0]["offset"])
        stream.write(b"\0" * record["images"][0]["length"])
    run = [str(pretrained.model_dir), str(products), str(damaged), str(tmp_path)]
    code, output = finish(start(4, str(Path(__file__).with_name("evaluate_rank.py")), *run))
    assert code == 0, output[-3000:]
    write_evaluation(
        evaluate(find_source(pretrained.model_dir), str(products), SETTINGS, mesh=ALONE), tmp_path / "alone"
    )
    for name in ("predictions.jsonl", "predictions.parquet", "scores.json"):
        found = {(tmp_path / way / name).read_bytes() for way in ("alone", "whole", "partitioned")}
        assert len(found) == 1, name
    refused = [(tmp_path / f"refused-{rank}").read_text() for rank in range(4)]
    assert len(set(refused)) == 1 and f"sample {record['key']!r}" in refused[0]


def test_what_cannot_be_used_is_refused(
    products: Path, restored: Restored, pretrained: Pretrained, tmp_path: Path
) -> None:
    source = find_source(pretrained.model_dir)
    with pytest.raises(BadInputError, match="undecodable"):
        ask(restored, b"not a picture", "What?", max_new_tokens=4)
    with pytest.raises(BadInputError, match="no split 'test'"):
        evaluate(source, str(products), EvalSettings(split="test"), mesh=ALONE)
    with pytest.raises(BadInputError, match="no metric 'prise'"):
        evaluate(source, str(products), EvalSettings(metrics=("prise",)), mesh=ALONE)
    with pytest.raises(BadInputError, match="neither a run, nor a checkpoint"):
        find_source(tmp_path)
    with pytest.raises(BadInputError, match="is not a run"):
        find_source(f"{pretrained.model_dir}:best")
    with pytest.raises(BadInputError, match="a model directory already"):
        export(source, tmp_path / "out")
