"""Hub directories: written, read back bit for bit by every road, refused in one line when they are wrong."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from phi3v_dist.model import Phi3VConfig, Phi3VForCausalLM
from phi3v_dist.model.hub import (
    build_model,
    expected_shapes,
    init_random_checkpoint,
    load_config,
    load_weights,
    write_hub_directory,
)
from phi3v_dist.processor.processing import Phi3VProcessor
from phi3v_dist.processor.tokenizer import train_tokenizer
from shards.common.errors import BadInputError

GOLDEN = Path(__file__).parents[1] / "golden"
HUB = Path(__file__).parents[1] / "golden/hub"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a red circle", "price 12"] * 4, directory, 140)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny, tokenizer_dir) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "model"
    init_random_checkpoint(
        tiny.config(), directory, 7, dtype=torch.float32, num_crops=4, tokenizer_dir=tokenizer_dir
    )
    return directory


def damaged(checkpoint: Path, target: Path) -> Path:
    return shutil.copytree(checkpoint, target / "copy")


def test_every_road_reads_the_same_bits(checkpoint) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    ours = build_model(load_config(checkpoint), torch.float32)
    load_weights(ours, checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(theirs, Phi3VForCausalLM) and isinstance(
        AutoConfig.from_pretrained(checkpoint), Phi3VConfig
    )
    for model in (ours, theirs):
        state = model.state_dict()
        assert set(state) == set(stored)
        assert all(torch.equal(state[name], stored[name]) for name in stored)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert len(frozen) == 18
        assert all(".encoder.layers.2." in name or ".post_layernorm." in name for name in frozen)


def test_save_pretrained_writes_what_was_read(checkpoint, tmp_path) -> None:
    model = Phi3VForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    again = Phi3VForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    loaded = build_model(load_config(tmp_path / "saved"), torch.float32)
    load_weights(loaded, tmp_path / "saved")
    stored = load_file(checkpoint / "model.safetensors")
    for state in (again, loaded.state_dict()):
        assert set(state) == set(stored)
        assert all(torch.equal(state[name], stored[name]) for name in stored)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / name).read_text()) == json.loads(
            (checkpoint / name).read_text()
        )


def test_golden_weights_survive_a_round_trip(tmp_path, tokenizer_dir) -> None:
    config = Phi3VConfig(
        **json.loads((GOLDEN / "model/config.base.json").read_text()),
        clip_vision_config=json.loads((GOLDEN / "model/clip_config.json").read_text()),
    )
    stored = load_file(GOLDEN / "model/model.safetensors")
    write_hub_directory(
        tmp_path / "out",
        config,
        stored.items(),
        dtype=torch.float32,
        max_shard_bytes=50_000,
        tokenizer_dir=tokenizer_dir,
    )
    state = Phi3VForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in stored) and set(state) == set(stored)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 50_000


def test_random_checkpoints_follow_the_seed(tiny, tmp_path, tokenizer_dir, checkpoint) -> None:
    for name, seed in (("same", 7), ("other", 8)):
        init_random_checkpoint(
            tiny.config(),
            tmp_path / name,
            seed,
            dtype=torch.float32,
            num_crops=4,
            tokenizer_dir=tokenizer_dir,
        )
    first, same, other = (
        load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["lm_head.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert (first["model.norm.weight"] == 1).all()
    assert not first["model.embed_tokens.weight"][150].any()
    assert all(t.isfinite().all() for t in first.values())


def test_bf16_checkpoint_in_a_directory_that_holds_the_tokenizer(tiny, tmp_path, tokenizer_dir) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "model")
    init_random_checkpoint(tiny.config(), tmp_path / "model", 1, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    with pytest.raises(BadInputError, match="holds a model already"):
        init_random_checkpoint(tiny.config(), tmp_path / "model", 1, dtype=torch.bfloat16)


def test_others_may_read_the_weights(checkpoint) -> None:
    """A checkpoint on a shared file system; safetensors alone would leave 0600."""
    modes = {file.name: file.stat().st_mode & 0o777 for file in checkpoint.iterdir()}
    assert len(set(modes.values())) == 1 and modes["model.safetensors"] & 0o400
    plain = checkpoint.parent / "plain"
    plain.touch()
    assert modes["model.safetensors"] == plain.stat().st_mode & 0o777


def test_config_and_companions_are_the_published_ones(checkpoint) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "phi3_v" and config["architectures"] == ["Phi3VForCausalLM"]
    assert set(config["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert config["rope_scaling"]["type"] == "su"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
    assert config["clip_vision_config"]["image_size"] == 112
    processor = Phi3VProcessor.from_pretrained(checkpoint)
    assert (processor.num_crops, processor.tile) == (4, 112)
    ids = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|end|>", "<|endoftext|>")]
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"] == ids


@pytest.mark.parametrize("model", ["", "phi-3.5"])
def test_published_configs_survive_loading_and_saving(model, tmp_path) -> None:
    published = json.loads((HUB / model / "config.json").read_text())
    config = load_config(HUB / model)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    apart = {"_name_or_path", "_attn_implementation", "auto_map", "transformers_version"}
    for key in set(published) - apart:
        assert written[key] == published[key], key
    assert set(written) - set(published) <= {"embd_pdrop", "resid_pdrop", "pad_token_id"}
    assert written["pad_token_id"] == 32000
    assert load_config(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'phi3_v'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.type is 'yarn'"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "long_factor|short_factor has 1 values"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"pad_token_id": 4000}, "pad_token_id 4000 is outside the vocabulary of 160"),
        ({"sliding_window": 7}, "sliding_window 7 is shorter"),
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "embd_layer.hd_transform_order is 'glb_sub'"),
        ({"img_processor": {"image_dim_out": 999}}, "image_dim_out 999 is not the CLIP width 32"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', expected a whole number"),
        ({"rope_scaling": "su"}, "rope_scaling is 'su', expected its fields"),
        ({"img_processor": "clip"}, "img_processor is 'clip', expected its fields"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x', expected a whole number or null"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, only 0 is supported"),
        ({"clip_vision_config": {"image_size": 0}}, "clip_vision_config.image_size is 0"),
        ({"clip_vision_config": {"hidden_size": 32, "image_size": 100}}, "not a multiple of two patches"),
        ({"clip_vision_config": 7}, "clip_vision_config is 7"),
        ({"initializer_range": "small"}, "initializer_range"),
        ({"num_attention_heads": 7}, "num_attention_heads 7"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(checkpoint, tmp_path, fields, says) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(BadInputError, match=says) as refused:
        load_config(tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path) -> None:
    copy = damaged(checkpoint, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    for load in (Phi3VConfig.from_pretrained, Phi3VForCausalLM.from_pretrained):
        with pytest.raises(BadInputError, match="model_type is 'llama', expected 'phi3_v'"):
            load(copy)


def test_missing_or_broken_config_is_refused(tmp_path) -> None:
    with pytest.raises(BadInputError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInputError, match="not readable as JSON"):
        load_config(tmp_path)


def _without(tensors: dict) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def _with(tensors: dict) -> None:
    tensors["model.layers.9.mlp.down_proj.weight"] = torch.zeros(2)


def _other_shape(tensors: dict) -> None:
    tensors["model.norm.weight"] = torch.zeros(65)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without, "tensor model.layers.1.mlp.down_proj.weight is missing"),
        (_with, "tensor model.layers.9.mlp.down_proj.weight is unexpected"),
        (_other_shape, r"tensor model.norm.weight has shape \[65\], config.json asks for \[64\]"),
    ],
)
def test_wrong_tensors_are_named(checkpoint, tmp_path, change, says) -> None:
    copy = damaged(checkpoint, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    model = build_model(load_config(copy), torch.float32)
    with pytest.raises(BadInputError, match=says) as refused:
        load_weights(model, copy)
    assert "\n" not in str(refused.value)
    if change is not _other_shape:  # transformers refuses that one itself
        with pytest.raises(BadInputError, match=says):
            Phi3VForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, 100_000])
def test_truncated_files_are_named(checkpoint, tmp_path, keep) -> None:
    copy = damaged(checkpoint, tmp_path)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    model = build_model(load_config(copy), torch.float32)
    with pytest.raises(BadInputError, match="model.safetensors: truncated or not safetensors") as refused:
        load_weights(model, copy)
    assert "\n" not in str(refused.value)
    with pytest.raises(BadInputError, match="truncated or damaged weight file"):
        Phi3VForCausalLM.from_pretrained(copy)


def test_missing_weights_and_shards_are_named(checkpoint, tmp_path) -> None:
    model = build_model(load_config(checkpoint), torch.float32)
    with pytest.raises(BadInputError, match=r"neither model\.safetensors nor"):
        load_weights(model, tmp_path)
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInputError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        load_weights(model, tmp_path)


def test_an_alias_of_the_embedding_is_tolerated(checkpoint, tmp_path) -> None:
    copy = damaged(checkpoint, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.vision_embed_tokens.wte.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors")
    load_weights(build_model(load_config(copy), torch.float32), copy)


def test_incomplete_export_leaves_nothing_behind(tiny, tmp_path, tokenizer_dir) -> None:
    tensors = [(name, torch.zeros(shape)) for name, shape in expected_shapes(tiny.config()).items()]
    for given, says in (
        (tensors[:-1], "lm_head.weight is missing"),
        ([*tensors, ("extra", torch.zeros(1))], "tensor extra is not one of"),
        ([*tensors, tensors[0]], "given twice"),
        ([(tensors[0][0], torch.zeros(3))], r"has shape \[3\]"),
    ):
        with pytest.raises(BadInputError, match=says):
            write_hub_directory(
                tmp_path / "out", tiny.config(), given, dtype=torch.float32, tokenizer_dir=tokenizer_dir
            )
        assert not list(tmp_path.iterdir())


def test_header_length_is_checked_before_it_is_believed(checkpoint, tmp_path) -> None:
    copy = damaged(checkpoint, tmp_path)
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(BadInputError, match="truncated or not safetensors"):
        load_weights(build_model(load_config(copy), torch.float32), copy)
