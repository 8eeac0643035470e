"""The configuration: what is refused, and that it is said in one line that names the key."""

from pathlib import Path

import pytest
import yaml

from phi3v_dist.config import RunConfig, changed_keys, config_json, load_config
from shards.common.errors import BadInputError

MINIMAL = "name: x\nmodel: {path: m}\ndata: {path: d}\ntrain: {steps: 5}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    file = tmp_path / "a config.yaml"
    file.write_text(MINIMAL)
    return file


def test_overrides_and_environment(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_TEST_SHARDS", "/shards here")
    config = load_config(
        minimal, ["train.lr=1e-4", "data.path=${oc.env:PHI3V_TEST_SHARDS}", "train.lr_scale={vision: 0.1}"]
    )
    assert (config.train.lr, config.data.path, config.train.lr_scale) == (
        1e-4,
        "/shards here",
        {"vision": 0.1},
    )
    assert config.run_dir == Path("runs/x")


def test_the_written_config_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal)
    (tmp_path / "again.yaml").write_text(config_json(config))
    assert load_config(tmp_path / "again.yaml") == config
    changed = load_config(minimal, ["train.lr=1", "model.freeze=[vision]"])
    assert changed_keys(config.model_dump(), changed.model_dump()) == ["model.freeze", "train.lr"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", "unknown key train.lrr; did you mean train.lr?"),
        ("modle.path=x", "unknown key modle; did you mean model?"),
        ("parallel.zzzzzz=1", "unknown key parallel.zzzzzz; valid here: offload_checkpoints"),
        ("train.lr=fast", "train.lr: input should be a valid number (found 'fast')"),
        ("train.lr=.inf", "train.lr: input should be a finite number"),
        (
            "train.lr_scale={vision: -1.0}",
            "train.lr_scale.vision: input should be greater than or equal to 0",
        ),
        ("train.steps=2.5", "train.steps: input should be a valid integer"),
        ("train.steps=null", "exactly one of train.steps and train.epochs"),
        ("train.epochs=1", "exactly one of train.steps and train.epochs"),
        ("model.config={hidden_size: 8}", "either model.path"),
        ("model.freeze=[visoin]", "model.freeze.0: input should be 'vision'"),
        ("model.freeze=[vision, projector, decoder]", "nothing would learn"),
        ("train.betas=[0.9]", "two numbers"),
        ("name=../elsewhere", "name: string should match"),
        ("data.path=${oc.env:PHI3V_NOT_SET}", "PHI3V_NOT_SET"),
        ("data.path=null", "data.path: input should be a valid string"),
        ("data.sources=[{path: b}]", "give either data.path (a dataset directory) or data.sources (several)"),
        (
            "data={path: null, sources: [{path: a, weight: 2}, {path: b}]}",
            "data.sources: give every source a weight",
        ),
        (
            "data.sources=[{path: a, wait: 2}]",
            "unknown key data.sources.0.wait; did you mean data.sources.0.weight",
        ),
        ("train", "not of the form key=value"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(minimal: Path, override: str, words: str) -> None:
    with pytest.raises(BadInputError) as caught:
        load_config(minimal, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "a config.yaml"),
        ("- a\n- b\n", "no mapping"),
        ("model: {path: m}\ndata: {path: d}\ntrain: {steps: 5}\n", "name is missing"),
        (MINIMAL.replace("{path: d}", "{}"), "data.path is missing"),
    ],
)
def test_a_bad_file_is_named(minimal: Path, text: str, words: str) -> None:
    minimal.write_text(text)
    with pytest.raises(BadInputError, match="a config.yaml") as caught:
        load_config(minimal)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such config file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "recipe", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda p: p.name
)
def test_the_recipes_are_good(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(recipe)
    assert isinstance(config, RunConfig)
    assert set(yaml.safe_load(recipe.read_text())) <= set(RunConfig.model_fields)
