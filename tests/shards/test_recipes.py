"""Recipes are read, merged with what the command line gives, and refused in one line."""

from pathlib import Path

import pytest

from shards.common.errors import BadInputError
from shards.options import BuildOptions
from shards.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_every_recipe_of_the_project_is_good() -> None:
    paths = sorted((ROOT / "configs/shards").glob("*.yaml"))
    assert "burberry" in [path.stem for path in paths]
    for path in paths:
        source, options = load_recipe(str(path), {})
        options.check()


def test_burberry_asks_as_the_first_version_did() -> None:
    source, options = load_recipe("burberry", {"min_success": 0.5})
    assert source == "hf:DBQ/Burberry.Product.prices.United.States"
    assert options.prompt == "<|image_1|>What is shown in this image?"
    assert options.answer == "Product: {title}, Category: {category3_code}, Full Price: {full_price}"
    assert options.min_success == 0.5 and ("price", "full_price") in options.meta


def test_without_a_recipe_only_what_is_given_counts() -> None:
    assert load_recipe(None, {}) == (None, BuildOptions())
    assert load_recipe(None, {"images": ["a"]}) == (None, BuildOptions(images=("a",)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image: [a]", "unknown key 'image'; did you mean 'images'"),
        ("images: a", "images is 'a': Input should be a valid tuple"),
        ("val_fraction: much", "val_fraction is 'much': Input should be a valid number"),
        ("- 1", "a list, not keys and values"),
        ("a: [", "not YAML"),
        ("source: 3", "source is 3, not the name of a source"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=words) as caught:
        load_recipe(str(path), {})
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(BadInputError, match="burbery: no such recipe; .* burberry"):
        load_recipe("burbery", {})
