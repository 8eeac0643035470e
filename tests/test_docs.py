"""The documentation is true: its commands run, its links lead somewhere, its config page is the config.

Commands are taken from the fenced blocks of README.md and docs/*.md. Those of phi3v run for real in one
workspace, at tiny size: places and recipes of the text are replaced by small ones (REPLACED), and what would
submit to a cluster is printed instead. Those in ELSEWHERE are run by the tests named there.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli.main import app
from launch.cli.reference import config_reference, descriptions
from phi3v_dist.config import RunConfig, load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "make demo": "tests/launch/test_demo.py",
    "make test": "this suite",
    "git clone": "the user's own",
    "source .venv/bin/activate": "the shell's",
    "docker build": "the users' CI; Dockerfile",
    "kubectl ": "tests/k8s/test_manifests.py checks what it would apply",
    "sed ": "tests/k8s/test_manifests.py, that the example image is found there",
    "sbatch ": "tests/slurm",
    "job=$(sbatch": "tests/slurm",
    "torchrun ": "tests/train/test_evaluate.py",
}


def commands(page: Path) -> Iterator[str]:
    """The commands of a page's fenced blocks, continued lines joined, comments cut."""
    for block in re.findall(r"^ *```(?:sh|bash)?\n(.*?)^ *```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            bare = re.split(r"\s#\s", f"{line} ")[0].strip()
            if re.match(r"(phi3v|python|make|sbatch|kubectl|docker|git|source|torchrun|sed) |job=", bare):
                yield " ".join(bare.split())


def marks_of(command: str) -> list[pytest.MarkDecorator]:
    """`ranks` for commands that train or evaluate on ranks, and for those that read what they left."""
    if command.startswith(tuple(ELSEWHERE)):
        return []
    words = small(command)
    starts = words[1:3] == ["launch", "local"] or "--processes" in words
    reads = any(word in ("out", "verified") or "runs/" in word or "first-model" in word for word in words)
    return [pytest.mark.ranks] if starts or reads else []


def documented(elsewhere: bool) -> list[Any]:
    """Every command once, quick start first: the others use what it made. elsewhere: those that other tests
    run, or all but those.
    """
    order = sorted(PAGES, key=lambda page: page.name != "quickstart.md")
    seen: dict[str, str] = {}
    for page in order:
        for command in commands(page):
            seen.setdefault(command, page.name)
    return [
        pytest.param(command, id=f"{page}: {command}", marks=marks_of(command))
        for command, page in seen.items()
        if command.startswith(tuple(ELSEWHERE)) is elsewhere
    ]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty directory with the recipes, small: what the commands read and write."""
    root = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", root / "configs")
    here = os.getcwd()
    os.chdir(root)
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))
    os.chdir(here)


# A word of the documentation -> what stands for it in the workspace.
REPLACED = {
    "products.csv": "data/catalogue/products.csv",
    "SOURCE": "data/catalogue/products.csv",
    "/shared/shards/products": "shared/products",
    "/shared/data": "shared/data",
    "/data/tars": "data/tars",
    "3/16": "0/1",
    "runs/NAME": "runs/first",
    "runs/NAME:best": "runs/first:best",
    "runs/NAME/eval/best": "runs/first/eval/best",
    "runs/A": "runs/first",
    "runs/B": "runs/first",
    "DATASET": "data/shop",
    "shoe.jpg": "data/catalogue/images/80000001.jpg",
    "out/": "out",
    "data.path=DIR": "data.path=data/shop",
    "model.path=/models/Phi-3-vision-128k-instruct": "model.path=data/first-model",
    "--apply": "--print",
    "--wait": "--print",
}
# Commands that read the shards of a recipe get the workspace's; those that train get little to do.
READS_SHARDS = ("phi3v plan configs/burberry.yaml", "phi3v doctor configs/burberry.yaml")
LITTLE = [
    "train.steps=1",
    "eval.generate_samples=1",
    "eval.loss_samples=2",
    "data.workers=0",
    "track.mode=offline",
]


def small(command: str) -> list[str]:
    """The words of a command as they run in the workspace."""
    words = [REPLACED.get(word, word) for word in shlex.split(command)]
    if command.startswith(READS_SHARDS):
        words += ["data.path=data/shop", "model.path=data/first-model", "data.num_crops=1"]
    if words[:3] == ["phi3v", "launch", "slurm"] and "--print" not in words:
        words.append("--print")
    if words[:3] == ["phi3v", "launch", "local"] and "configs/tiny.yaml" not in words:
        words += [*LITTLE, f"name=debug{len(words)}", "data.seq_len=512"]
    words = [
        "2" if before == "--processes" else word for before, word in zip(["", *words], words, strict=False)
    ]
    if "--verify" in words:
        words = ["verified" if word == "out" else word for word in words]
    if words[:3] == ["phi3v", "shards", "index"] and "--prompt" in words:
        words = [word.replace("data/tars", "data/captions") for word in words]
    if "sample" in words and "--rows" not in words:
        words += ["--rows", "100"]  # the catalogue that quickstart.md has drawn
    return words


def foreign_material(root: Path) -> None:
    """What the pages take for granted: a table with two pictures a row, tars that other tools wrote."""
    from shards.format.records import sample_json
    from shards.tars import TarShard

    pictures = sorted((root / "data/catalogue/images").iterdir())[:12]
    rows = ["sku,model,brand,label_text,front,back"]
    rows += [f"s{n},m{n // 2},Acme,ACME {n},{each},{each}" for n, each in enumerate(pictures)]
    (root / "my_metrics.py").write_text("def colour(truth, answer):\n    return {'colour': None}\n")
    (root / "shoes.csv").write_text("\n".join(rows) + "\n")
    recipe = root / "configs/shards/burberry.yaml"
    tree = yaml.safe_load(recipe.read_text()) | {"source": "data/catalogue/products.csv"}
    recipe.write_text(yaml.safe_dump(tree))
    for folder in ("tars", "captions"):
        (root / "data" / folder).mkdir()
        tar = TarShard(root / "data" / folder / "train-0.tar")
        for n, each in enumerate(pictures):
            messages = [
                {"role": "user", "content": "<|image_1|>\nWhat is it?"},
                {"role": "assistant", "content": f"A thing {n}."},
            ]
            told = (
                ("json", sample_json(messages, {})) if folder == "tars" else ("txt", f"a thing {n}".encode())
            )
            tar.add(f"k{n}", [told, ("png", each.read_bytes())])
        tar.close()


@pytest.mark.parametrize("command", documented(elsewhere=True))
def test_what_a_command_that_runs_elsewhere_names_is_there(command: str) -> None:
    """The files of this repository, and settings that the recipe has."""
    words = [word.strip("'") for word in re.split(r"[\s(]+", command)]
    named = [word for word in words if word.startswith(("k8s/", "slurm/", "configs/"))]
    for each in named:
        assert list(ROOT.glob(each)), f"{command!r} names {each}, which is not there"
    if "slurm/train.sh" in named:
        config, *overrides = words[words.index("slurm/train.sh") + 1 :]
        load_config(config if (ROOT / config).exists() else ROOT / "configs/burberry.yaml", overrides)


@pytest.mark.parametrize("command", documented(elsewhere=False))
def test_the_command_runs(command: str, workspace: Path) -> None:
    words = small(command)
    assert words[0] == "phi3v", f"{command!r} is neither of phi3v nor in ELSEWHERE"
    if words[1:3] == ["launch", "local"] or "--processes" in words:
        environment = {**os.environ, "PHI3V_CPU_PROCESSES": "1"}
        started = [sys.executable, "-m", "launch.cli.main", *words[1:]]
        done = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    else:
        result = CliRunner().invoke(app, words[1:])
        problem = f"{' '.join(words)}: {result.exception!r}\n{result.output[-2000:]}"
        if words[1] != "doctor":  # it may find fault with this machine
            assert result.exit_code == 0, problem
        assert result.exception is None or isinstance(result.exception, SystemExit), problem
    if words[1:3] == ["shards", "sample"] and not (workspace / "shoes.csv").exists():
        foreign_material(workspace)


def test_the_config_page_is_the_config() -> None:
    page = ROOT / "docs/config.md"
    assert page.read_text() == config_reference(), "run `make docs`"


def test_every_key_of_the_config_says_what_it_means() -> None:
    silent = []
    for name, field in RunConfig.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and hasattr(model, "model_fields"):
            silent += [f"{name}.{key}" for key, text in descriptions(model).items() if not text]
    assert not silent, f"no description under the field: {', '.join(silent)}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_links_outside_the_site_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
