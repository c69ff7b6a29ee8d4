"""A run that was interrupted goes on as if it had not been."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kdmesh.errors import CheckpointError
from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import TinyModels
from tests.support.trainer_ranks import finish, run_ranks, start_ranks_of

RUNS = "tests.support.trainer_runs"
STEPS = 8


@pytest.fixture
def arguments(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Any]:
    return {
        **tiny_models.student_and_teacher(),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": STEPS,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("family", "spreads_head"), [("qwen3", False), ("qwen3", True), ("deepseek_v3", False)])
def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    arguments: dict[str, Any], tiny_models: TinyModels, tmp_path: Path, family: str, spreads_head: bool
) -> None:
    arguments["student"] = str(tiny_models.path(family, seed=1, tie_word_embeddings=True))
    arguments["spreads_head"] = spreads_head
    check_exact_continuation(arguments | {"until": STEPS}, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ranks", "parallel"),
    [
        ("qwen3", 4, {"shard_ranks": 2}),
        ("qwen3", 2, {"offloads": True}),
        ("qwen3", 4, {"shard_ranks": 2, "offloads": True}),
        ("qwen2_moe", 4, {"shard_ranks": 2, "offloads": True}),
    ],
)
def test_a_student_in_copies_or_on_the_host_goes_on_exactly_after_sigkill(
    arguments: dict[str, Any],
    tiny_models: TinyModels,
    tmp_path: Path,
    family: str,
    ranks: int,
    parallel: dict[str, Any],
) -> None:
    arguments["student"] = str(tiny_models.path(family, seed=1, tie_word_embeddings=True))
    arguments |= {"until": STEPS, "num_sequences": [14], **parallel}
    check_exact_continuation(arguments, tmp_path / "other", ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "context", "told"),
    [
        (2, 2, {}),
        (4, 2, {"is_dual_space": True}),
        (4, 2, {"shard_ranks": 2, "offloads": True}),
        (2, 2, {"lora": {"rank": 3, "alpha": 12}}),
        (3, 3, {"checkpointed_every": 1}),
    ],
    ids=[
        "two",
        "two of four, in two spaces",
        "two of four, which hold two copies",
        "two, with adapters",
        "three, which cannot share four heads, and keep inputs alone",
    ],
)
def test_ranks_that_hold_rows_together_continue_exactly_and_as_one_rank_would(
    arguments: dict[str, Any], tmp_path: Path, ranks: int, context: int, told: dict[str, Any]
) -> None:
    arguments |= told
    together = {"ranks": ranks, "context": context}
    run_ranks(f"{RUNS}:train", **together, **arguments, until=3, save_at=3)
    other = str(tmp_path / "other")
    both = run_ranks(f"{RUNS}:train_rest_and_whole", **together, **arguments, until=STEPS, other=other)
    assert all(one == both[0] for one in both)
    assert both[0]["first"] == 3
    assert both[0]["rest"] == both[0]["whole"][3:]
    arguments |= {"checkpoints": str(tmp_path / "alone"), "shard_ranks": None}
    alone = run_ranks(f"{RUNS}:train", ranks=1, **arguments, until=STEPS)[0]
    assert both[0]["whole"] == pytest.approx(alone["losses"], rel=1e-5)


def test_a_run_continues_on_another_number_of_ranks(arguments: dict[str, Any]) -> None:
    whole = run_ranks(f"{RUNS}:train", ranks=2, **arguments, until=STEPS, save_at=4)[0]
    rest = run_ranks(f"{RUNS}:train", ranks=1, **arguments, until=STEPS, save_at=6)[0]
    assert rest["first"] == 4
    assert rest["losses"] == pytest.approx(whole["losses"][4:], rel=1e-5)
    last = run_ranks(f"{RUNS}:train", ranks=2, **arguments, until=STEPS)[0]
    assert last["first"] == 6
    assert last["losses"] == pytest.approx(whole["losses"][6:], rel=1e-5)


def test_what_another_rank_wrote_is_held_to_its_digest_by_all_ranks(arguments: dict[str, Any]) -> None:
    run_ranks(f"{RUNS}:train", ranks=2, **arguments, until=1, save_at=1)
    damaged = Path(arguments["checkpoints"]) / "step-00000001" / "__1_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    told = r"step-00000001 cannot be read: __1_0\.distcp is damaged"
    with pytest.raises(CheckpointError, match=told):
        run_ranks(f"{RUNS}:train", ranks=1, **arguments, until=STEPS)
    for rank in finish(start_ranks_of(f"{RUNS}:train", ranks=2, **arguments, until=STEPS)):
        assert rank.exit_code != 0
        assert re.search(told, rank.errors)


@pytest.mark.slow
def test_a_run_continues_with_its_head_spread_over_ranks_and_whole_again(arguments: dict[str, Any]) -> None:
    whole = run_ranks(f"{RUNS}:train", ranks=2, **arguments, until=STEPS, save_at=3)[0]
    spread = run_ranks(f"{RUNS}:train", ranks=3, **arguments, until=STEPS, save_at=6, spreads_head=True)[0]
    assert spread["first"] == 3
    assert spread["losses"] == pytest.approx(whole["losses"][3:], rel=1e-5)
    last = run_ranks(f"{RUNS}:train", ranks=1, **arguments, until=STEPS)[0]
    assert last["first"] == 6
    assert last["losses"] == pytest.approx(whole["losses"][6:], rel=1e-5)
