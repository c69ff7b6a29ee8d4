"""What a job is refused for: one sentence, exit code 2, before any step."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import GPTNeoXJapaneseConfig, GPTNeoXJapaneseForCausalLM

from kdmesh import log
from kdmesh_trainer import __main__ as trainer
from tests.support.tiny_models import FAMILIES, TinyModels, save_tokenizer
from tests.support.trainer_jobs import run_job, serving_teacher, write_config


@pytest.fixture(scope="module")
def teacher(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_teacher(tmp_path_factory.mktemp("teacher"), tiny_models.path("qwen3", seed=2)) as address:
        yield address


@pytest.fixture
def student(tiny_models: TinyModels) -> Path:
    return tiny_models.path("qwen3", seed=1)


class Refusals:
    """Runs a job in this process and returns the sentence it was refused with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def sentence(self, config: Path, *overrides: str, status: int = 2) -> str:
        argv = ["kdmesh_trainer", str(config), *(part for override in overrides for part in ("--set", override))]
        self._monkeypatch.setattr("sys.argv", argv)
        self._monkeypatch.setattr(log, "configure", lambda *_, **__: None)
        self._capsys.readouterr()
        assert trainer.main() == status
        errors = self._capsys.readouterr().err
        assert "Traceback" not in errors
        return errors


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusals:
    return Refusals(monkeypatch, capsys)


def test_a_bad_key_is_named(refusals: Refusals, student: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, student=student, teacher=None, steps=1, objective={"name": "sft"})
    assert "optimizer.learning_rat" in refusals.sentence(config, "optimizer.learning_rat=1")


def test_copies_that_the_ranks_do_not_fill_are_refused_before_the_ranks_meet(
    refusals: Refusals, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # of the others there is none
    config = write_config(tmp_path, student=student, teacher=None, steps=1, objective={"name": "sft"})
    sentence = refusals.sentence(config, "parallel.shard_ranks=3")
    assert "parallel.shard_ranks is 3 and the job has 4 ranks" in sentence


def test_ranks_that_cannot_hold_rows_together_are_refused_before_they_meet(
    refusals: Refusals, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")  # of the others there is none
    config = write_config(tmp_path, student=student, teacher=None, steps=1, objective={"name": "sft"})
    sentence = refusals.sentence(config, "parallel.context=2")
    assert "parallel.context is 2 and the job has 3 ranks" in sentence


def test_distilling_needs_an_address(refusals: Refusals, student: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, student=student, teacher=None, steps=1)
    assert "teacher.addresses is empty" in refusals.sentence(config, "teacher.prefetch=1")


def test_a_teacher_that_is_not_there_is_waited_for_no_longer_than_its_deadline(
    refusals: Refusals, student: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, student=student, teacher="127.0.0.1:9", steps=1)
    assert "127.0.0.1:9" in refusals.sentence(config, "teacher.deadline_s=0.5", status=3)


def test_another_tokenizer_is_refused_with_both_fingerprints(
    refusals: Refusals, student: Path, teacher: str, tmp_path: Path
) -> None:
    other = shutil.copytree(student, tmp_path / "other")
    save_tokenizer(other, bos_token="<s>")
    sentence = refusals.sentence(write_config(tmp_path, student=other, teacher=teacher, steps=1))
    assert "has another tokenizer (fingerprint " in sentence
    assert "than the student (fingerprint " in sentence


def test_data_beyond_the_teachers_limits_is_refused(
    refusals: Refusals, student: Path, teacher: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path, student=student, teacher=teacher, steps=1)
    text = " ".join(["many more words than the model has positions"] * 60)
    chat = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(chat))
    sentence = refusals.sentence(config, "data.max_tokens=4000", "batch.max_tokens=4000")
    assert "dataset train has a sequence of" in sentence
    assert "takes at most 256" in sentence


def test_a_student_that_cannot_be_trained_as_asked_is_refused_before_the_first_step(
    refusals: Refusals, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", {})
    student = tiny_models.path("gpt2")
    config = write_config(tmp_path, student=student, teacher=None, steps=1, objective={"name": "sft"})
    assert "positions for 256 tokens" in refusals.sentence(config, "data.max_tokens=300", "batch.max_tokens=300")
    assert "(attn_pdrop in config.json)" in refusals.sentence(config)


def test_a_row_that_names_no_teacher_is_refused_before_any_teacher_is_asked(
    refusals: Refusals, student: Path, teacher: str, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, student=student, teacher=None, steps=1, teachers={"code": {"addresses": [teacher]}, "maths": {}}
    )
    two = f"teachers.maths.addresses=['{teacher}']"
    column = "data.teacher_column=who"
    assert "teachers.maths.addresses is empty" in refusals.sentence(config, column)
    assert "train.jsonl:1: no column 'who'" in refusals.sentence(config, column, two)
    rows = [json.loads(line) | {"who": "code"} for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[4]["who"] = "law"
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sentence = refusals.sentence(config, column, two)
    assert "train.jsonl:5: who: there is no teacher 'law'; known: code, maths" in sentence


def test_missing_data_is_refused(refusals: Refusals, student: Path, teacher: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, student=student, teacher=teacher, steps=1)
    (tmp_path / "held_out.jsonl").unlink()
    assert "held_out.jsonl" in refusals.sentence(config)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("source", ["off_policy", "on_policy"])
@pytest.mark.parametrize("name", ["train", "held_out"])
def test_a_row_that_cannot_be_used_is_said_before_any_teacher_is_waited_for(
    student: Path, tmp_path: Path, ranks: int, source: str, name: str
) -> None:
    sampled = {"kind": source, "rollouts": {"addresses": ["127.0.0.1:9"]}, "samples_per_prompt": 1}
    config = write_config(
        tmp_path,
        student=student,
        teacher="127.0.0.1:9",
        steps=1,
        source=sampled | {"sampling": {"max_new_tokens": 8}} if source == "on_policy" else {"kind": source},
    )
    rows = (tmp_path / f"{name}.jsonl").read_text().splitlines()
    (tmp_path / f"{name}.jsonl").write_text("\n".join([*rows[:3], '{"messages": 7}', *rows[3:]]))
    outcomes = run_job(config, ranks=ranks)
    assert [outcome.exit_code for outcome in outcomes] == [2] * ranks
    said = "".join(outcome.errors for outcome in outcomes)
    assert said.count(f"{name}.jsonl:4: ") == 1
    assert "waiting for a server" not in said
    assert "Traceback" not in said


def test_an_output_that_another_run_writes_to_is_refused(refusals: Refusals, student: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, student=student, teacher=None, steps=1, objective={"name": "sft"})
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is writing to" in refusals.sentence(config)


def test_a_run_cannot_go_on_as_another_one(refusals: Refusals, student: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, student=student, teacher=None, steps=1, objective={"name": "sft"})
    (outcome,) = run_job(config)
    assert outcome.exit_code == 0, outcome.errors
    sentence = refusals.sentence(config, "batch.sequences=5")
    assert "batch.sequences is 5 now and was 4" in sentence


def test_adapters_go_on_with_the_same_section_and_base_alone(
    refusals: Refusals, student: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = write_config(tmp_path, student=student, teacher=None, steps=1, objective={"name": "sft"})
    assert "target_modules: wq is unknown; linear modules" in refusals.sentence(
        config, "student.lora.target_modules=[wq]"
    )
    assert "base nf4 keeps 64 numbers of a row together, and model.layers.0" in refusals.sentence(
        config, "student.lora.base=nf4"
    )
    (outcome,) = run_job(config, "student.lora.rank=2")
    assert outcome.exit_code == 0, outcome.errors
    sentence = refusals.sentence(config, "student.lora.rank=4")
    assert re.search(r'student.lora is .*"rank": 4.* now and was .*"rank": 2', sentence)
    other = tiny_models.path("qwen3", seed=6)
    assert "student (fingerprint) is" in refusals.sentence(config, "student.lora.rank=2", f"student.model={other}")


def test_of_many_ranks_one_speaks(student: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, student=student, teacher=None, steps=1, objective={"name": "sft"})
    (tmp_path / "train.jsonl").write_text('{"messages": []}')
    outcomes = run_job(config, ranks=2)
    assert [outcome.exit_code for outcome in outcomes] == [2, 2]
    spoken = "".join(outcome.errors for outcome in outcomes)
    assert "Traceback" not in spoken
    assert spoken.count("train.jsonl:1") == 1


def test_of_many_ranks_that_one_speaks_which_failed_by_a_mistake_of_the_users_own(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_rank_0.py").write_text(
        "import os\ndef chats():\n    yield [{'role': role, 'content': os.environ['RANK']} for role in "
        "('user', 'assistant')]\n    {'0': None}[os.environ['RANK']]\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    data = {"train": {"format": "custom", "target": "of_rank_0:chats"}, "max_tokens": 128}
    config = write_config(tmp_path, student=student, teacher=None, steps=1, objective={"name": "sft"}, data=data)
    outcomes = run_job(config, ranks=2)
    assert [outcome.exit_code for outcome in outcomes] == [1, 1]
    assert "KeyError: '1'" in outcomes[1].errors
    assert "Traceback" not in outcomes[0].errors


def test_a_checkpoint_of_another_configuration_is_refused_before_a_teacher_is_waited_for(
    refusals: Refusals, student: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, student=student, teacher="127.0.0.1:9", steps=1)
    state = tmp_path / "run/checkpoints/step-00000001/state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"next_step": 1, "world_size": 1, "identity": {"seed": "7"}}))
    sentence = refusals.sentence(config, "teacher.deadline_s=0.5")
    assert f"{state.parent} belongs to another run: " in sentence
    assert "seed is 0 now and was 7" in sentence


def test_an_adapter_that_peft_refuses_is_known_before_a_server_is_waited_for(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    student = tiny_models.path("falcon_h1", seed=1)
    config = write_config(tmp_path, student=student, teacher="127.0.0.1:9", steps=1)
    (outcome,) = run_job(config, "student.lora.rank=2", "teacher.deadline_s=1")
    assert outcome.exit_code == 2
    assert "student.lora.target_modules: [PEFT:PeftType.LORA] Module 'out_proj' is incompatible" in outcome.errors
    assert "waiting for a server" not in outcome.errors


def test_layers_that_keep_all_activations_are_known_before_a_server_is_waited_for(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shape = GPTNeoXJapaneseConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_multiple_size=2
    )
    GPTNeoXJapaneseForCausalLM(shape).save_pretrained(student)
    save_tokenizer(student)
    config = write_config(tmp_path, student=student, teacher="127.0.0.1:9", steps=1)
    (outcome,) = run_job(config, "student.activation_checkpointing=all", "teacher.deadline_s=1")
    assert outcome.exit_code == 2
    assert "layers GPTNeoXJapaneseLayer of gpt_neox_japanese keep all their activations" in outcome.errors
    assert "waiting for a server" not in outcome.errors
