"""Settings that cannot work are refused in one line, with what to change."""

from pathlib import Path

import pytest

from phi3v_dist.config import load_config
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.run.limits import check_limits, check_offload_path
from shards.common.errors import BadInputError

FULL = Path(__file__).parents[2] / "configs/full-128k.yaml"


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        (
            ["parallel.sp=3"],
            6,
            "parallel.sp=3 does not divide the model's num_attention_heads=32; use 1, 2, 4",
        ),
        (["parallel.sp=8"], 12, "parallel.sp=8 does not divide the 12 ranks"),
        (["data.seq_len=131073"], 8, "data.seq_len=131073 is more than the model's 131072 positions"),
        (["parallel.sp=1", "parallel.tile_mlp=0"], 1, "a GPU of 80 GB cannot hold this configuration"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], ranks: int, words: str) -> None:
    with pytest.raises(BadInputError) as caught:
        check_limits(load_config(FULL, overrides), Phi3VConfig(), ranks, gpu_bytes=80 * 10**9)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_works_is_not() -> None:
    check_limits(load_config(FULL), Phi3VConfig(), 8, gpu_bytes=80 * 10**9)
    check_limits(load_config(FULL, ["parallel.sp=1"]), Phi3VConfig(), 1, gpu_bytes=None)  # no GPU to ask


def test_fewer_key_value_heads_limit_sp() -> None:
    with pytest.raises(BadInputError, match="num_key_value_heads=4"):
        check_limits(load_config(FULL), Phi3VConfig(num_key_value_heads=4), 8, gpu_bytes=None)


def test_an_offload_path_is_tried(tmp_path: Path) -> None:
    nvme = "parallel.offload_optimizer=nvme"
    check_offload_path(load_config(FULL, [nvme, f"parallel.offload_path={tmp_path / 'new'}"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="offload_path=.*cannot write there"):
        check_offload_path(load_config(FULL, [nvme, f"parallel.offload_path={tmp_path / 'file'}"]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.offload_optimizer=nvme", "parallel.offload_path"),
        ("parallel.offload_path=/x", "give both or neither"),
        ("parallel.offload_params=cpu", "needs parallel.offload_optimizer=cpu"),
    ],
)
def test_offload_settings_that_contradict(override: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        load_config(FULL, [override])
