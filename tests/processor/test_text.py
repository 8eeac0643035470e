"""Prompts: the published ids for the published tokenizer, labels, chat template, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, AutoTokenizer

from phi3v_dist.model import Phi3VConfig
from phi3v_dist.processor.image import hd_tiles
from phi3v_dist.processor.pixels import normalise
from phi3v_dist.processor.processing import Phi3VProcessor
from phi3v_dist.processor.prompt import IGNORE, encode, render, reply_spans
from phi3v_dist.processor.tokenizer import load_tokenizer, train_tokenizer
from shards.common.errors import BadInputError

GOLDEN = Path(__file__).parents[1] / "golden"
HUB = Path(__file__).parents[1] / "golden/hub"
EXPECTED = json.loads((GOLDEN / "text_processor/expected.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(HUB)


def picture(name: str) -> Image.Image:
    return Image.open(GOLDEN / f"image_processor/images/{name}.png")


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: f"{case['name']}-{case['num_crops']}")
@pytest.mark.filterwarnings("ignore:the text names images")
def test_ids_are_the_published_ones(tokenizer, case) -> None:
    processor = Phi3VProcessor(tokenizer, num_crops=case["num_crops"])
    images = [picture(name) for name in case["images"]]
    if "error" in case:
        with pytest.raises(BadInputError, match="image"):
            processor(case["text"], images)
        return
    inputs = processor(case["text"], images, return_tensors="pt")
    ids = [token for token, run in case["input_ids_rle"] for _ in range(run)]
    assert inputs["input_ids"].tolist() == [ids] and len(ids) == case["length"]
    assert inputs["attention_mask"].all() and inputs["attention_mask"].shape == (1, len(ids))
    if images:
        assert list(inputs["pixel_values"].shape) == case["pixel_values_shape"]
        assert inputs["image_sizes"].tolist() == case["image_sizes"]
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    else:
        assert set(inputs) == {"input_ids", "attention_mask"}


def test_plain_strings(tokenizer) -> None:
    for case in EXPECTED["plain_tokenizer"]:
        assert tokenizer(case["text"])["input_ids"] == case["ids"]
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids_no_special"]
    for token, number in EXPECTED["special_ids"].items():
        assert tokenizer.convert_tokens_to_ids(token) == number
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 32000 and tokenizer.bos_token_id == 1


def test_text_only_batches_are_padded_on_the_right(tokenizer) -> None:
    expected = EXPECTED["batch_text_padding"]
    texts = ["<|user|>\nshort<|end|>\n", "<|user|>\na rather longer prompt here<|end|>\n<|assistant|>\n"]
    inputs = Phi3VProcessor(tokenizer)(texts, padding=True)
    assert inputs["attention_mask"].tolist() == expected["attention_mask"]
    assert inputs["input_ids"].tolist() == expected["input_ids"]


def test_chat_template_is_the_published_one(tokenizer) -> None:
    expected = EXPECTED["chat_template"]
    messages = expected["messages"]
    for chat, generate, text in [
        (messages, True, expected["with_generation_prompt"]),
        (messages, False, expected["without"]),
        (messages[:3], True, expected["last_assistant_with_generation_prompt"]),
    ]:
        assert render(chat, add_generation_prompt=generate) == text
        found = Phi3VProcessor(tokenizer).apply_chat_template(
            chat, tokenize=False, add_generation_prompt=generate
        )
        assert found == text


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<|image_1|>\n<|image_2|>\nCompare."},
    {"role": "assistant", "content": "One is red."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": " Two  is blue.\n"},
]


def test_labels_are_the_replies_and_nothing_else(tokenizer) -> None:
    encoded = encode(tokenizer, CHAT, [5, 3])
    assert len(encoded.input_ids) == len(encoded.labels)
    learnt = [token for token in encoded.labels if token != -100]
    assert tokenizer.decode(learnt) == "One is red.<|end|> Two  is blue.\n<|end|>"
    assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert learnt.count(32007) == 2 and min(learnt) > 0
    assert [t for t in encoded.input_ids if t < 0] == [-1] * 5 + [-2] * 3


def test_training_ids_continue_the_generation_prompt(tokenizer) -> None:
    whole = encode(tokenizer, CHAT, [5, 3]).input_ids
    prompt = encode(tokenizer, CHAT[:4], [5, 3], add_generation_prompt=True)
    assert whole[: len(prompt.input_ids)] == prompt.input_ids
    assert [t for t in prompt.labels if t != -100] == tokenizer("One is red.<|end|>")["input_ids"][1:]
    assert prompt.labels[-1] == -100


@pytest.mark.parametrize(
    ("contents", "images", "says"),
    [
        (["no tag", "ok"], 1, "names none; it must name <.image_1.>"),
        (["<|image_1|>", "ok"], 0, "0 image.s. but the prompt names <.image_1.>"),
        (["<|image_2|> <|image_1|>", "ok"], 2, "in order"),
        (["<|image_1|> <|image_1|>", "ok"], 1, "once each"),
        (["<|image_1|> <|image_3|>", "ok"], 2, "names <.image_1.> <.image_3.>"),
        (["hi", "<|image_1|>"], 1, "an image tag in the assistant's reply"),
        (["hi<|end|>", "ok"], 0, "control token <.end.>"),
        (["hi", "ok<|endoftext|>"], 0, "control token <.endoftext.>"),
    ],
)
def test_messages_that_would_mislead_are_refused(tokenizer, contents, images, says) -> None:
    messages = [{"role": "user", "content": contents[0]}, {"role": "assistant", "content": contents[1]}]
    with pytest.raises(BadInputError, match=says) as refused:
        encode(tokenizer, messages, [4] * images)
    assert "\n" not in str(refused.value)


def test_the_processor_refuses_what_would_be_ignored(tokenizer) -> None:
    processor = Phi3VProcessor(tokenizer, 1)
    with pytest.raises(BadInputError, match="there are no images"):
        processor("<|user|>\n<|image_1|>\nx<|end|>\n")
    with pytest.raises(BadInputError, match="one string"):
        processor(["<|image_1|>"], [picture("sq336")])
    with pytest.warns(UserWarning, match="order"):
        processor("<|image_2|><|image_1|>", [picture("sq336"), picture("tiny100x37")])


def test_training_sees_the_ids_and_tiles_of_the_processor_in_a_quarter_of_the_bytes(tokenizer) -> None:
    processor = Phi3VProcessor(tokenizer, 4)
    images = [picture("land640x480"), picture("wide1344x336")]
    whole = processor(render(CHAT), images)
    encoded = encode(tokenizer, CHAT, processor.image_tokens(images))
    assert encoded.input_ids == whole["input_ids"][0].tolist()
    tiles = [torch.from_numpy(hd_tiles(image, 4)) for image in images]
    for made, views in zip(tiles, whole["pixel_values"], strict=True):
        assert made.dtype == torch.uint8 and torch.equal(normalise(made), views[1 : len(made) + 1])
    assert sum(made.nbytes for made in tiles) * 4 <= whole["pixel_values"].nbytes


def test_reply_spans_agree_with_reading_the_ids_one_by_one() -> None:
    class Two:
        @staticmethod
        def convert_tokens_to_ids(token: str) -> int:
            return {"<|assistant|>": 1, "<|end|>": 2}[token]

    random = np.random.default_rng(0)
    for _ in range(300):
        ids = random.integers(-1, 5, 40)
        documents = np.sort(random.integers(0, 4, 40))
        labels, start = [IGNORE] * 40, None
        for place in range(40):
            if place and documents[place] != documents[place - 1]:
                start = None
            if ids[place] == 1:
                start = place + 1
            elif ids[place] == 2 and start is not None:
                labels[start : place + 1] = ids[start : place + 1].tolist()
                start = None
        found = [IGNORE] * 40
        for first, stop in zip(*reply_spans(Two, ids, documents), strict=True):
            found[first:stop] = ids[first:stop].tolist()
        assert found == labels


def test_saved_processor_loads_again_and_through_auto_processor(tokenizer, tmp_path) -> None:
    Phi3VProcessor(tokenizer, num_crops=4).save_pretrained(tmp_path)
    Phi3VConfig().save_pretrained(tmp_path)
    for loaded in (Phi3VProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, Phi3VProcessor) and (loaded.num_crops, loaded.tile) == (4, 336)
        for case in EXPECTED["plain_tokenizer"]:
            assert loaded.tokenizer(case["text"])["input_ids"] == case["ids"]
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    published = json.loads((HUB / "preprocessor_config.json").read_text())
    assert set(written) == set(published)
    assert {k: v for k, v in written.items() if k != "auto_map"} == {
        **{k: v for k, v in published.items() if k != "auto_map"},
        "num_crops": 4,
    }
    # AutoTokenizer takes its generic backend because config.json says phi3_v: the published ids too.
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert all(auto(case["text"])["input_ids"] == case["ids"] for case in EXPECTED["plain_tokenizer"])


def test_a_directory_without_the_right_files_is_named(tokenizer, tmp_path) -> None:
    with pytest.raises(BadInputError, match="no preprocessor_config.json"):
        Phi3VProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"num_crops": "many"}')
    with pytest.raises(BadInputError, match="num_crops is 'many'"):
        Phi3VProcessor.from_pretrained(tmp_path)
    with pytest.raises(BadInputError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInputError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({"<s>": 0, "<|endoftext|>": 1, "<|user|>": 2})).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(BadInputError, match="no token <.assistant.>, so this is not Phi-3's"):
        load_tokenizer(tmp_path)


def test_trained_tokenizer_has_phi3s_turns_and_round_trips(tmp_path) -> None:
    texts = ["a red circle, 12.50", "Title: big blue square\nPrice: 99", "striped wool triangle"] * 3
    train_tokenizer(texts, tmp_path / "one", 300)
    train_tokenizer(list(reversed(texts)), tmp_path / "two", 300)
    one, two = (tmp_path / name / "tokenizer.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    tokenizer = load_tokenizer(tmp_path / "one")
    encoded = encode(
        tokenizer, [{"role": "user", "content": "Q"}, {"role": "assistant", "content": texts[1]}], []
    )
    learnt = [token for token in encoded.labels if token != -100]
    assert tokenizer.decode(learnt, skip_special_tokens=True) == texts[1]
    assert encoded.input_ids[0] == tokenizer.bos_token_id and len(tokenizer) <= 300
