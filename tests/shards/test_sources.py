"""Tables and messages as rows: what they become, and what is said of those that cannot be used."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.common.errors import BadInputError
from shards.source_records import PRODUCT_COLUMNS, PRODUCT_PROMPT, Recipe, SourceRecord
from shards.sources import ALL, open_source
from tests.shards.conftest import write_csv

ASK = Recipe(images=("image",), prompt="What is {name}?", answer="{price} {{EUR}}")


def rows_of(path: Path, recipe: Recipe) -> list[SourceRecord]:
    source = open_source(str(path), recipe)
    rows = list(source.records([ALL]))
    assert len(rows) == source.num_records
    return rows


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def test_a_table_is_filled_into_the_templates(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "t.csv", ("image", "name", "price"), [("a.jpg", "Ä thing", 5), ("b.jpg", "", 6)]
    )
    good, bad = rows_of(path, ASK)
    assert good.images == ("a.jpg",) and good.fault is None and good.key == "00000000"
    assert good.messages == (
        {"role": "user", "content": "<|image_1|>\nWhat is Ä thing?"},
        {"role": "assistant", "content": "5 {EUR}"},
    )
    assert good.meta == {"image": "a.jpg", "name": "Ä thing", "price": "5"}
    assert bad.fault == "column 'name' is empty"


def test_rows_go_on_in_the_middle(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ("image", "name", "price"), [(f"{n}.jpg", n, n) for n in range(9)])
    source = open_source(str(path), ASK)
    assert list(source.records([(6, ALL[1])])) == list(source.records([ALL]))[6:]


def test_parquet_with_lists_and_dates(tmp_path: Path) -> None:
    columns = {
        "image": [["a.jpg", "b.png"], []],
        "name": ["x", "y"],
        "price": [1.5, None],
        "day": [datetime.date(2024, 2, 3)] * 2,
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    good, bad = rows_of(tmp_path / "t.parquet", ASK)
    assert good.images == ("a.jpg", "b.png") and good.meta["day"] == "2024-02-03"
    assert good.messages[0]["content"].startswith("<|image_1|>\n<|image_2|>\n")
    assert bad.fault == "column 'image' holds no image path or URL (found: an empty list)"


def test_tags_in_the_prompt_stay_where_they_are(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ("image", "name", "price"), [("a.jpg", "x", 1)])
    (row,) = rows_of(path, Recipe(("image",), "Look: <|image_1|> {name}", "{price}"))
    assert row.messages[0]["content"] == "Look: <|image_1|> x"


def test_a_product_catalogue_needs_no_recipe(tmp_path: Path) -> None:
    good_row = (80, "Red Bag", "BAGS", "19.50", "http://x/a.jpg")
    bad_row = (81, "Red Bag", "BAGS", "dear", "http://x/b.jpg")
    path = write_csv(tmp_path / "t.csv", PRODUCT_COLUMNS, [good_row, bad_row])
    good, bad = rows_of(path, Recipe(key="product_code"))
    assert good.messages[0]["content"] == "<|image_1|>\n" + PRODUCT_PROMPT
    assert good.messages[1]["content"] == "Title: Red Bag\nCategory: BAGS\nPrice: 19.50"
    assert good.meta["price"] == 19.5 and good.key == "00000000-80"
    assert bad.fault == "column 'full_price' is 'dear', not a price"


def test_messages_as_they_are_and_as_parts(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "A cat."}
    parts = [
        {"type": "text", "text": "Compare "},
        {"type": "image_url", "image_url": {"url": "http://x/1.jpg"}},
        {"type": "image_url", "image_url": {"url": "http://x/2.jpg"}},
    ]
    path = jsonl(
        tmp_path / "m.jsonl",
        {"messages": [{"role": "user", "content": "What?"}, reply], "images": ["a.jpg"], "id": 7},
        {"messages": [{"role": "user", "content": parts}, reply]},
        "{not json",
        {"messages": [{"role": "user", "content": "What?"}], "images": "a.jpg"},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, reply]},
        {"messages": [{"role": "user", "content": parts}, reply], "images": ["a.jpg"]},
    )
    plain, openai, *bad = rows_of(path, Recipe())
    assert plain.images == ("a.jpg",) and plain.messages[0]["content"] == "<|image_1|>\nWhat?"
    assert plain.meta == {"id": 7}
    assert openai.images == ("http://x/1.jpg", "http://x/2.jpg")
    assert openai.messages[0]["content"] == "Compare <|image_1|>\n<|image_2|>\n"
    words = ["not JSON", "must end with the assistant", "part of type 'video'", "images both in"]
    assert all(word in (row.fault or "") for row, word in zip(bad, words, strict=True))


@pytest.mark.parametrize("lost", [{}, {"image": None}, {"images": []}, {"image": ""}])
def test_a_record_that_has_lost_its_picture_is_a_bad_row(tmp_path: Path, lost: dict[str, Any]) -> None:
    """A model must not learn to answer about what it does not see."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
    good = {"conversations": turns, "image": "a.jpg"}
    (row,) = rows_of(jsonl(tmp_path / "c.jsonl", {"conversations": turns, **lost}), Recipe())
    assert row.fault == "0 image(s) but 1 placeholder(s) <image>"
    (row,) = rows_of(jsonl(tmp_path / "m.jsonl", {"messages": messages, **lost}), Recipe())
    assert row.fault == "0 image(s) but 1 placeholder(s) <image>"
    (row,) = rows_of(jsonl(tmp_path / "g.jsonl", good), Recipe())
    assert row.fault is None and row.images == ("a.jpg",)
    messages[0]["content"] = "Hello"
    (row,) = rows_of(jsonl(tmp_path / "t.jsonl", {"messages": messages, **lost}), Recipe())
    assert row.fault is None and row.images == ()


def test_one_bad_record_is_one_bad_row(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    deep = "[" * 100_000 + "]" * 100_000
    path = jsonl(
        tmp_path / "c.jsonl",
        {"conversations": turns, "id": 1},
        {"id": 2},
        '{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "x"}]}',
        {"conversations": [turns[0], {"from": "gpt", "value": "x<|end|>"}]},
        f'{{"conversations": {json.dumps(turns)}, "id": {deep}}}',
        f'{{"conversations": {json.dumps(turns)}, "id": {"9" * 5000}}}',
        f'{{"conversations": {json.dumps(turns)}, "id": "\\udfff"}}',
    )
    rows = rows_of(path, Recipe())
    faults = [
        None, "no list of conversations", "which is not a character", "control token <|end|>",
        "nested too deeply", None, "which is not a character",
    ]  # fmt: skip
    for row, fault in zip(rows, faults, strict=True):
        assert row.fault is None if fault is None else fault in (row.fault or ""), (row.fault, fault)
        json.dumps(row.fault, ensure_ascii=False).encode()
    whole = tmp_path / "c.json"
    whole.write_text(f'[{{"conversations": {json.dumps(turns)}, "id": {"9" * 5000}}}]')
    assert rows_of(whole, Recipe())[0].meta == {"id": "9" * 5000}
    whole.write_text(f"[{deep}]")
    with pytest.raises(BadInputError, match="not a readable json file .nested too deeply"):
        open_source(str(whole), Recipe())


def test_what_a_folder_says_is_its_identity(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    def identity() -> str:
        return open_source(str(tmp_path), Recipe(prompt="?", answer="{caption}")).sha256

    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "a.txt").write_text("A cat.")
    first = identity()
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    assert identity() == first
    (tmp_path / "a.txt").write_text("A dog.")
    assert identity() != first


def test_a_folder_whose_table_has_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.jpg", "messages": messages, "from": "x"})
    (row,) = rows_of(tmp_path, Recipe())
    assert row.fault is None and row.images == ("a.jpg",) and row.meta == {"from": "x"}
    assert row.messages[0]["content"] == "<|image_1|>What?"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(("picture",), "{name}", "{price}"), "no column 'picture' .named by images."),
        (Recipe(("image",), "{nane}", "{price}"), "no column 'nane' .* did you mean 'name'"),
        (Recipe(("image",), "{name", "{price}"), "write {{ and }} for braces"),
        (Recipe(("image",), "{name!r}", "{price}"), "only plain {column} fields"),
        (Recipe(("image",), "{name}"), "an answer template is needed"),
        (Recipe(), "a prompt template is needed: these are neither messages"),
        (Recipe(("image",), "{name}", "{price}", key="code"), "no column 'code' .named by key."),
    ],
)
def test_recipes_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, recipe: Recipe, words: str) -> None:
    path = write_csv(tmp_path / "t.csv", ("image", "name", "price"), [("a.jpg", "x", 1)])
    with pytest.raises(BadInputError, match=words) as caught:
        open_source(str(path), recipe)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("image,name,price\n")
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.csv").write_bytes(b"image,name\n\xff\xfe,x\n")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    for name, words in [
        ("none.csv", "no such file"),
        ("empty.csv", "no records; nothing to build"),
        ("bad.parquet", "not a readable parquet file"),
        ("bad.csv", "not a readable csv file"),
        ("twice.csv", "two columns are named 'a'"),
        ("t.xlsx", "a .xlsx file; sources are"),
        ("", "no images .* and no metadata.csv in it"),
    ]:
        with pytest.raises(BadInputError, match=words):
            open_source(str(tmp_path / name), ASK)


def test_a_row_of_other_length_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,name,price\na.jpg,x\nb.jpg,y,2\n")
    bad, good = rows_of(tmp_path / "t.csv", ASK)
    assert bad.fault == "2 fields, the header has 3" and good.fault is None
    path = jsonl(tmp_path / "t.jsonl", "[1]", {"image": "a.jpg", "name": "x"}, {"price": 3})
    assert [row.fault for row in rows_of(path, ASK)] == [
        "JSON of type list, not an object",
        "column 'price' is empty",
        "column 'image' holds no image path or URL (found: NoneType)",
    ]
    with pytest.raises(BadInputError, match="no record can be read; record 0: not JSON"):
        open_source(str(jsonl(tmp_path / "bad.jsonl", "{", "{")), ASK)


def test_llava_json_is_read_element_by_element(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "What colour?"},
        {"from": "gpt", "value": "Red [and] {white}."},
    ]
    two = [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "No."}]
    records = [
        {"id": "a/1", "image": "coco/1.jpg", "conversations": turns},
        {"id": "a/2", "images": ["1.jpg", "2.jpg"], "conversations": two},
        {
            "id": "a/3",
            "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}],
        },
        7,
        {"id": "a/4", "image": "1.jpg", "conversations": two},
        {"id": "a/5", "conversations": [{"from": "robot", "value": "x"}]},
        {"id": "a/6", "image": "1.jpg", "conversations": turns[2:]},
    ]
    for name, text in [("short", json.dumps(records)), ("long", json.dumps(records, indent=300_000))]:
        (tmp_path / f"{name}.json").write_text(text)
        rows = rows_of(tmp_path / f"{name}.json", Recipe(key="id"))
        first, second, third, *bad, last = rows
        assert first.key == "00000000-a_1" and first.images == ("coco/1.jpg",) and first.meta == {"id": "a/1"}
        assert [message["role"] for message in first.messages] == ["user", "assistant"] * 2
        assert first.messages[0]["content"] == "<|image_1|>\nWhat is it?"
        assert second.messages[0]["content"] == "Is <|image_1|> like <|image_2|>?"
        assert third.images == () and third.fault is None
        assert last.messages[0]["content"] == "<|image_1|>\nWhat colour?"
        assert [row.fault for row in bad] == [
            "JSON of type int, not an object",
            "1 image(s) but 2 placeholder(s) <image>",
            "a turn from 'robot'; known are human, user, gpt, assistant, system",
        ]
    (tmp_path / "one.json").write_text('{"conversations": []}')
    (tmp_path / "cut.json").write_text(json.dumps(records)[:-20])
    for name, words in [("one", "not a list of records"), ("cut", "not a readable json file")]:
        with pytest.raises(BadInputError, match=words):
            open_source(str(tmp_path / f"{name}.json"), Recipe())


def test_a_folder_of_classes_and_captions(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    for number, name in enumerate(["cats/b.jpg", "cats/a.PNG", "dogs/old/c.webp", "d.jpg"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    (tmp_path / "cats/b.txt").write_text("Two cats.")
    (tmp_path / "notes.md").write_text("x")
    rows = rows_of(tmp_path, Recipe(prompt="Which animal?", answer="{label}"))
    faults = [row.fault for row in rows]
    assert faults == [None, None, "column 'label' is empty", None]
    assert [row.messages[1]["content"] for row in rows if row.fault is None] == ["cats", "cats", "old"]
    captioned = [
        row for row in rows_of(tmp_path, Recipe(prompt="?", answer="{caption}")) if row.fault is None
    ]
    assert [(row.images, row.messages[1]["content"]) for row in captioned] == [(("cats/b.jpg",), "Two cats.")]


def test_a_folder_with_its_own_table(tmp_path: Path) -> None:
    write_csv(tmp_path / "metadata.csv", ("file_name", "text"), [("x.jpg", "one"), ("y.jpg", "two")])
    rows = rows_of(tmp_path, Recipe(prompt="?", answer="{text}"))
    assert [row.images for row in rows] == [("x.jpg",), ("y.jpg",)]


def test_a_hugging_face_dataset_with_pictures_in_it(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    import datasets

    features = datasets.Features({"photo": datasets.Image(), "name": datasets.Value("string")})
    columns = {"photo": [{"bytes": picture(n), "path": None} for n in range(3)], "name": ["a", "b", None]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train.parquet"))
    source = open_source(f"hf:{tmp_path}", Recipe(("photo",), "?", "{name}"))
    rows = list(source.records([ALL]))
    assert source.num_records is None and [row.fault for row in rows] == [
        None,
        None,
        "column 'name' is empty",
    ]
    assert rows[1].images == (picture(1),) and rows[1].meta == {"name": "b"}
    assert list(source.records([(1, ALL[1])])) == rows[1:]
    with pytest.raises(BadInputError, match="cannot be loaded by `datasets`") as caught:
        open_source(f"hf:{tmp_path}#test", Recipe(("photo",), "?", "{name}"))
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInputError, match="no column 'picture'"):
        open_source(f"hf:{tmp_path}", Recipe(("picture",), "?", "{name}"))


def test_meta_can_be_chosen_and_renamed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ("image", "name", "price"), [("a.jpg", "x", 1)])
    (row,) = rows_of(path, Recipe(("image",), "?", "{name}", meta=(("title", "name"), ("price", "price"))))
    assert row.meta == {"title": "x", "price": "1"}
    with pytest.raises(BadInputError, match="no column 'cost' .named by meta."):
        open_source(str(path), Recipe(("image",), "?", "{name}", meta=(("price", "cost"),)))
