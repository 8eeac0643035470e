"""What `pip install` gives where there is no checkout: the commands, the recipes, the compiled resize."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    assert files.returncode == 0, "the tests run in a git checkout: git says what belongs to the package"
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(pip, cwd=source, check=True, timeout=150)
    return next(out.glob("*.whl"))


def test_it_holds_every_module_and_recipe(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("launch", "phi3v_dist", "shards"):
        for file in (ROOT / package).rglob("*.py"):
            assert file.relative_to(ROOT).as_posix() in names, f"{file}: not in pyproject.toml's packages"
    assert "launch/requeue.sh" in names, "phi3v launch slurm runs it"
    recipes = [name.split("share/phi3v-dist/")[1] for name in names if "share/phi3v-dist/" in name]
    assert sorted(recipes) == sorted(
        file.relative_to(ROOT).as_posix() for file in ROOT.glob("configs/**/*.yaml")
    )
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


def test_its_commands_work_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, timeout=100)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (Path(there) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    away = tmp_path / "away"
    away.mkdir()
    command = str(tmp_path / "venv/bin/phi3v")
    for words in (
        ["shards", "sample", "--rows", "12", "--out", "catalogue"],
        ["shards", "build", "catalogue/products.csv", "--out", "shop", "--group-by", "product_code"],
        ["plan", "configs/tiny.yaml", "data.path=shop"],
    ):
        done = subprocess.run([command, *words], cwd=away, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    assert "rows" in done.stdout
    where = "import phi3v_dist, shards, launch; print(phi3v_dist.__file__, shards.__file__, launch.__file__)"
    found = subprocess.run([python, "-c", where], cwd=away, capture_output=True, text=True, check=True).stdout
    assert all(path.startswith(str(tmp_path)) for path in found.split()), found
