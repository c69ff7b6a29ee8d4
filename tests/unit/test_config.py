"""Holds what loading a configuration refuses, and with which words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
from pydantic import BaseModel

from kdmesh import config
from kdmesh.auth import config as auth_config
from kdmesh.config import StrictModel
from kdmesh.errors import ConfigError
from kdmesh_teacher import config as teacher_config
from kdmesh_trainer import config as trainer_config
from kdmesh_trainer import sections as trainer_sections
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.sections.judge_config import FinishedJudge
from kdmesh_trainer.sections.other_names import OTHER_NAMES
from kdmesh_trainer.sections.source_config import OffPolicy, OnPolicy

GOOD = """
output: runs/x
steps: 100
student: {model: models/student}
teacher: {addresses: ["127.0.0.1:50051"]}
data: {train: {format: chat, path: train.jsonl}}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(TrainerConfig, written(tmp_path, text), overrides)
    return str(caught.value)


def test_defaults_fill_what_a_file_leaves_out(tmp_path: Path) -> None:
    cfg = config.load(TrainerConfig, written(tmp_path, GOOD))
    assert cfg.batch.sequences == 32
    assert cfg.trackers == ("tensorboard",)


def test_what_breaks_a_rule_is_said_in_words_of_a_configuration(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD, "teacher.addresses=127.0.0.1:50051", "ranks=3")
    assert "  teacher.addresses: give a list, as [first, second] (got '127.0.0.1:50051')" in said.splitlines()
    said = refusal(tmp_path, GOOD, "parallel.context=2", "ranks=3")
    assert said.splitlines()[1:] == ["  parallel.context (2) must divide ranks (3)"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.betas=[0.9]", "optimizer.betas.1: is required"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas: "),
        ("student.model=", "student.model: give a path (got null)"),
        ("batch=true", "batch: give a section, as {key: value} (got true)"),
        ("output=5", "output: give a path, in quotes: YAML takes it for something else without them (got 5)"),
        (
            "output=2026-11-28",
            "output: give a path, in quotes: YAML takes it for something else without them (got 2",
        ),
        ("output=''", "output: give a path (got '')"),
        ("output=[a]", "output: give a path (got a list)"),
        ('output="a\\0b"', "output: it has a character that no path can have (got 'a\\x00b')"),
        ('student.model="\\uD83D"', "student.model: it has a character that no path can have"),
        ("evaluation=", "evaluation: give a section, as {key: value}, or leave it out (got null)"),
        ("source=", "source: give a section, as {key: value}, or leave it out (got null)"),
        ("student=", "student: give a section, as {key: value} (got null)"),
        ("batch=[1]", "batch: give a section, as {key: value} (got a list)"),
        ("data.held_out=true", "data.held_out: give a section, as {key: value} (got true)"),
        ("objective.name=", "objective.name: must be one of 'distill', 'sft' (got null)"),
        ("trackers=[{}]", "trackers.0: Input should be 'tensorboard', 'wandb' or 'mlflow' (got a section)"),
        ("batch.sequences=many", "batch.sequences: give a whole number (got 'many')"),
        ("batch.sequences=true", "batch.sequences: give a whole number (got true)"),
        ("batch.sequences=1.5", "batch.sequences: give a whole number (got 1.5)"),
        ("metrics={port: true}", "metrics.port: give a whole number (got true)"),
        ("profile={steps: [2, true]}", "profile.steps.1: give a whole number (got true)"),
        ("optimizer.betas=[false, 0.9]", "optimizer.betas.0: give a number (got false)"),
        (
            "objective={name: distill, teacher_weights: {a: true}}",
            "objective.teacher_weights.a: give a number (got true)",
        ),
        (
            "objective={name: distill, layers: {pairs: {1: true}, weight: 1}}",
            "objective.layers.pairs.1: give a whole number (got true)",
        ),
        ("optimizer.max_gradient_norm=true", "optimizer.max_gradient_norm: give a number (got true)"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: give a number (got 'fast')"),
        ("student.freeze_vision=2", "student.freeze_vision: give true or false (got 2)"),
        ("batch={on: 3}", "batch: the key true: give a text, in quotes"),
        ("data.chat_template_settings={1: a}", "data.chat_template_settings: the key 1: give a text, in quotes"),
        (
            "objective={name: distill, layers: {pairs: {a: 1}, weight: 1}}",
            "objective.layers.pairs.a: give a whole number, as the key",
        ),
        (
            "data.chat_template_settings={a: [1]}",
            "data.chat_template_settings.a: give true or false, or give a whole number, or give a number, or give a",
        ),
        ("data.train={format: blend, datasets: {}}", "data.train.datasets: needs at least 1 item"),
        ("profile.steps=[]", "profile.steps: needs at least 1 item"),
    ],
)
def test_lists_paths_and_sections_that_are_short_of_something_are_told_so(
    tmp_path: Path, override: str, said: str
) -> None:
    [line] = refusal(tmp_path, GOOD, override).splitlines()[1:]
    assert line.startswith(f"  {said}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch.sequences=1000000000000", "batch.sequences: Input should be less than or equal to 1000000"),
        ("ranks=1000000000000", "ranks: Input should be less than or equal to 1024"),
        ("student.lora={rank: 1000000000}", "student.lora.rank: Input should be less than or equal to 65536"),
        ("student.lora={alpha: 1000000000}", "student.lora.alpha: Input should be less than or equal to 1000000"),
        ("teacher.deadline_s=1e300", "teacher.deadline_s: Input should be less than or equal to 2592000"),
        ("objective={name: distill, temperature: 1e300}", "objective.temperature: Input should be less than or"),
        ("objective={name: distill, kd_weight: 1e300}", "objective.kd_weight: Input should be less than or equal to"),
        (
            "objective={name: distill, divergence: {name: renyi, order: 1e300}}",
            "objective.divergence.order: Input should be less than or equal to",
        ),
        ("source={kind: on_policy, max_staleness: 1000000000000}", "source.max_staleness: Input should be less than"),
        (
            "source={kind: on_policy, sampling: {top_k: 1000000000000}}",
            "source.sampling.top_k: Input should be less than 2147483648",
        ),
        (
            "source={kind: on_policy, rollouts: {deadline_s: 1e300}}",
            "source.rollouts.deadline_s: Input should be less than or equal to 2592000",
        ),
        (
            "evaluation.questions={path: q.jsonl, samples: 1000000000000, sampling: {temperature: 1}}",
            "evaluation.questions.samples: Input should be less than or equal to 10000",
        ),
    ],
)
def test_a_number_that_no_run_can_have_is_refused(tmp_path: Path, override: str, said: str) -> None:
    [line] = refusal(tmp_path, GOOD, override).splitlines()[1:]
    assert line.startswith(f"  {said}")


def test_every_bad_key_is_named_with_its_path(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD + "optimizer: {learning_rate: -1, lr: 2}\nbatch: {sequences: many}\ncolour: red\n")
    assert said.splitlines()[0].endswith("my.yaml: 4 problems")
    for part in (
        "optimizer.learning_rate",
        "(got -1)",
        "optimizer.lr: there is no such key",
        "batch.sequences",
        "colour",
    ):
        assert part in said


def test_evaluations_without_anything_to_judge_by_are_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD, "evaluation.every=200")
    rule = "evaluation.every (200) has nothing to judge by: give data.held_out or evaluation.questions, or leave it out"
    assert f"  {rule}" in said
    questions = ("evaluation.questions.path=q.jsonl", "evaluation.rollouts={}")
    said = refusal(tmp_path, GOOD, "evaluation={every: 200, max_sequences: 9}", *questions)
    assert said.splitlines()[1:] == ["  evaluation.max_sequences (9) needs data.held_out, which it bounds"]
    for enough in (questions, ("data.held_out=0.1",)):
        cfg = config.load(TrainerConfig, written(tmp_path, GOOD), ("evaluation.every=200", *enough))
        assert cfg.evaluation.every == 200


def test_a_tracker_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD, "trackers=[tensorboard, wandb, tensorboard]")
    assert "trackers names one twice: tensorboard, wandb, tensorboard" in said


def test_an_output_that_no_server_takes_as_the_name_of_a_job_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD, f"output=runs/{'long' * 40}")
    assert "output ends in the job's name: " in said and "has 160 characters; it must be of at most 128" in said


def test_a_parameter_of_another_divergence_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD + "objective: {name: distill, divergence: {name: forward_kl, beta: 0.1}}\n")
    assert said.splitlines()[1:] == ["  objective.divergence.beta: there is no such key for forward_kl"]


def test_a_key_that_is_called_like_its_section_s_choice_is_told_from_it(tmp_path: Path) -> None:
    judge = "{name: match, wrong: -1, match: {name: regex, pattern: '('}}"
    source = f"source: {{kind: on_policy, rollouts: {{addresses: ['a:1']}}, judge: {judge}}}\n"
    pattern, wrong = refusal(tmp_path, GOOD + source).splitlines()[1:]
    assert pattern.startswith("  source.judge.match.pattern: ")
    assert wrong == "  source.judge.wrong: Input should be greater than or equal to 0 (got -1)"


def test_a_choice_without_its_name_says_which_key_decides(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD.replace("format: chat, ", ""))
    assert "data.train: says no 'format', which decides what else belongs here" in said


def test_an_unknown_choice_names_the_known_ones(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD + "objective: {name: distil}\n")
    assert said.splitlines()[1:] == ["  objective.name: must be one of 'distill', 'sft' (got 'distil')"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("learning_rate=1", "learning_rate: there is no such key; did you mean optimizer.learning_rate?"),
        (
            "optimizer.learning_rat=1",
            "optimizer.learning_rat: there is no such key; did you mean optimizer.learning_rate?",
        ),
        ("max_tokens=1", "max_tokens: there is no such key; did you mean batch.max_tokens or data.max_tokens?"),
        ("optimizer.speed=1", "optimizer.speed: there is no such key"),
        ("optimizer.lr=1", "optimizer.lr: there is no such key; did you mean optimizer.learning_rate?"),
        ("num_train_epochs=1", "num_train_epochs: there is no such key; did you mean epochs?"),
        (
            "student.lora={target_modules:all-linear}",
            "student.lora.target_modules:all-linear: there is no such key; did you mean student.lora.target_modules, "
            "with a space behind its colon?",
        ),
        ("student.lora_r=8", "student.lora_r: there is no such key; did you mean student.lora.rank?"),
        (
            "batch.per_device_train_batch_size=1",
            "batch.per_device_train_batch_size: there is no such key; "
            "did you mean batch.sequences (of a whole step, on all ranks)?",
        ),
        ("objective.temperature=0", "objective.temperature: Input should be greater than 0 (got 0)"),
        ("objective.divergence=forward_kl", "objective.divergence: give a section, as {key: value} (got 'forward_kl')"),
        ("batch=3", "batch: give a section, as {key: value} (got 3)"),
        (
            "data.train={format: blend, datasets: {code: {format: chat, path: code.jsonl}}}",
            "data.train.datasets.code.weight: is required",
        ),
        ("objective.ce_weight={start: 1, steps: 2}", "objective.ce_weight.end: is required"),
    ],
)
def test_a_bad_key_is_named_as_the_file_has_it_with_what_may_be_meant(tmp_path: Path, override: str, line: str) -> None:
    assert refusal(tmp_path, GOOD + "objective: {name: distill}\n", override).splitlines()[1:] == [f"  {line}"]


def test_what_others_call_a_key_leads_to_one_that_there_is() -> None:
    known = {".".join(path) for path in config.key_paths(TrainerConfig)}
    assert {key.partition(" ")[0] for key in OTHER_NAMES.values()} <= known


def test_a_teacher_is_told_more_only_where_it_is_learnt_from(tmp_path: Path) -> None:
    told = "data.teacher_context={kind: system_prompt, text: x}"
    assert config.load(TrainerConfig, written(tmp_path, GOOD), [told]).data.teacher_context is not None
    assert "needs objective distill" in refusal(tmp_path, GOOD, told, "objective={name: sft}")
    assert "text" in refusal(tmp_path, GOOD, "data.teacher_context={kind: system_prompt, text: ''}")


def test_an_override_makes_a_section_of_one_that_is_off(tmp_path: Path) -> None:
    cfg = config.load(TrainerConfig, written(tmp_path, GOOD), ["student.lora=null", "student.lora.rank=4"])
    assert cfg.student.lora is not None
    assert cfg.student.lora.rank == 4


def test_overrides_reach_any_depth_and_are_yaml(tmp_path: Path) -> None:
    cfg = config.load(
        TrainerConfig, written(tmp_path, GOOD), ["optimizer.learning_rate=2e-5", "teacher.addresses=[a:1]"]
    )
    assert cfg.optimizer.learning_rate == 2e-5
    assert cfg.teacher is not None
    assert cfg.teacher.addresses == ("a:1",)


def test_a_number_may_have_an_exponent_and_no_point(tmp_path: Path) -> None:
    numbers = (("1e-1", 0.1), ("5E+2", 500.0), ("-2.e3", -2000.0), ("'1e-1'", "1e-1"), ("1e", "1e"), ("12", 12))
    for text, value in numbers:
        path = written(tmp_path, f"params: {{alpha: {text}}}\n")
        found = config.read_tree(path, [f"params.beta={text}"])["params"]
        assert [(type(found[key]), found[key]) for key in ("alpha", "beta")] == [(type(value), value)] * 2


def test_a_key_that_is_there_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, "batch: {sequences: 4}\nsteps: 3\nbatch: {max_tokens: 64}\n")
    assert "key 'batch' is there twice" in said and "line 3" in said
    assert "key 'lr' is there twice" in refusal(tmp_path, "optimizer: {lr: 1, lr: 2}\n")
    merged = written(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert config.read_tree(merged)["b"] == {"x": 3, "y": 2}


def test_a_value_is_laid_over_one_of_the_sections_that_an_alias_makes_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, "a: &both {x: {y: 1}}\nb: *both\n")
    assert config.read_tree(path, ["b.x.y=2", "b.z=3"]) == {"a": {"x": {"y": 1}}, "b": {"x": {"y": 2}, "z": 3}}


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.load(TrainerConfig, written(tmp_path, GOOD), ["output=~/runs/x"]).output == tmp_path / "runs" / "x"
    assert "there is no such home" in refusal(tmp_path, GOOD, "output=~nobody-of-that-name/x")


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=3", "steps.inner=3", "steps=[1"])
def test_a_malformed_override_is_refused_with_its_own_text(tmp_path: Path, override: str) -> None:
    assert repr(override) in refusal(tmp_path, GOOD, override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "must hold keys with values, as `steps: 100`, and not a list"),
        ("steps\n", "and not only 'steps'"),
        ("a: [1\n", "is not YAML: line 2, column 1: while parsing a flow sequence that begins in line 1, expected"),
        ("", "says nothing; it must hold keys with values"),
        ("# steps: 100\n", "says nothing; it must hold keys with values"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text)


def test_a_tab_is_called_one_with_its_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, "output: x\nstudent:\n\tmodel: x\n")
    assert "line 3, column 1: a tab, where YAML takes spaces alone\n    \tmodel: x\n    ^" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("output: 2026-13-01", "is not YAML: line 2, column 9: timestamp: month must be in 1..12"),
        ("seed: " + "1" * 5000, "is not YAML: line 2, column 7: int: Exceeds the limit"),
        ("batch: " + "[" * 5000 + "]" * 5000, "has lists or sections in each other, too many to be read"),
    ],
)
def test_what_only_looks_like_a_value_is_refused_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    assert words in refusal(tmp_path, f"steps: 1\n{line}\n")
    assert "is not YAML" in refusal(tmp_path, GOOD, line.replace(": ", "="))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "none.yaml"))):
        config.load(TrainerConfig, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("teacher: null", "objective distill needs a `teacher` section"),
        ("optimizer: {warmup_steps: 100}", r"warmup_steps \(100\) must be less than steps \(100\)"),
        (
            "optimizer: {warmup_fraction: 0.5, schedule: {name: wsd, decay_fraction: 0.6}}",
            r"optimizer: warm-up \(50 steps\) and decay \(60\) must be no more than steps \(100\)",
        ),
        ("epochs: 2", r"give steps \(100\) or epochs \(2\), not both; null leaves one out"),
        ("steps: null", "give steps or epochs"),
        ("data: {max_tokens: 9000, train: {format: chat, path: x.jsonl}}", "must not exceed batch.max_tokens"),
        ("objective: {name: distill, kd_weight: 0}", "nothing would be learnt"),
        ("objective: {name: distill, kd_weight: {start: 0, end: 0, steps: 9}}", "nothing would be learnt"),
        ("student: {model: x, weights: random, lora: {}}", "lora needs weights pretrained"),
        ("optimizer: {momentum: 0.9}", "momentum is muon's; adamw has betas"),
        ("optimizer: {name: muon, moments: 8bit}", "moments 8bit does not go with muon"),
        ("optimizer: {name: muon, momentum: 1.0}", "optimizer.momentum: Input should be less than 1"),
        (
            "data: {train: {format: chat, path: x}, held_out: {format: text, path: y, weight_column: w}}",
            "weight_column is for training: every held-out row counts alike",
        ),
        (
            "data: {train: {format: chat, path: x, weight_column: w}, teacher_tokenizer: {path: t}}",
            "weight_column does not go with teacher_tokenizer",
        ),
        ("student: {model: x, lora: {base: nf4, use_dora: true}}", "base nf4 does not go with use_dora"),
        ("student: {model: x, lora: {base: int8}}", "student.lora.base: Input should be 'full' or 'nf4'"),
        ("student: {model: x, freeze: [lm_head], lora: {}}", "freeze does not go with lora"),
        ("student: {model: x, freeze: ['']}", "student.freeze.0: String should have at least 1 character"),
        ("student: {model: x, attention: varlen}", "attention varlen needs a GPU and compute_dtype bfloat16"),
        ("student: {model: x, compile: layers, liger_kernels: true}", "liger_kernels does not go with compile layers"),
        ("profile: {steps: []}", "profile.steps"),
        ("profile: {steps: [99, 100]}", "profile.steps has 100; steps are counted from 0, and the last is 99"),
        ("student: {model: x, lora: {target_modules: []}}", "target_modules is empty: nothing would be learnt"),
        ("student: {model: x, lora: {target_modules: q_proj}}", "student.lora.target_modules"),
        ("teacher: {addresses: ['k8s:///a.b.c:grpc']}", "is not of the form k8s:///service:port or k8s:///service.nam"),
        ("teacher: {addresses: ['dns:///teachers']}", "'dns:///teachers' is not of the form dns:///name:port"),
        ("teacher: {addresses: ['http://teacher:50051']}", "'http://teacher:50051' is not of the form host:port"),
        ("teacher: {addresses: [teacher]}", "'teacher' is not of the form host:port"),
        ("teacher: {addresses: ['::1']}", "'::1' is not of the form host:port"),
        ("teacher: {addresses: ['teacher:99999']}", "'teacher:99999' is not of the form host:port"),
        ("teacher: {addresses: ['teacher:0']}", "'teacher:0' is not of the form host:port"),
        ("source: {kind: on_policy, rollouts: {addresses: ['a b:1']}}", "'a b:1' is not of the form host:port"),
        ("teacher: {addresses: ['dns:///a:1'], follows_student: {}}", "needs every address as host:port"),
        ("source: {kind: on_policy, rollouts: {addresses: ['dns:///a']}}", "'dns:///a' is not of the form dns:///na"),
        (
            "data: {train: {format: custom, target: 'a:b'}, teacher_context: {kind: messages}}",
            "teacher_context messages needs files",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(tmp_path: Path, change: str, words: str) -> None:
    key = change.split(":")[0]
    kept = "\n".join(line for line in GOOD.splitlines() if not line.startswith(key))
    assert re.search(words, refusal(tmp_path, f"{kept}\n{change}\n"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ranks=6", r"parallel.context \(4\) must divide ranks \(6\)"),
        ("data.teacher_tokenizer={path: x}", "parallel.context is 4, which does not go with data.teacher_tokenizer"),
        ("student.compile=layers", "parallel.context is 4, which does not go with student.compile"),
    ],
)
def test_what_ranks_that_hold_rows_together_cannot_do_is_refused(tmp_path: Path, override: str, words: str) -> None:
    together = GOOD + "parallel: {context: 4}\n"
    assert config.load(TrainerConfig, written(tmp_path, together), ["ranks=8"]).parallel.context == 4
    assert re.search(words, refusal(tmp_path, together, override))


ON_POLICY = (
    GOOD
    + """
source:
  kind: on_policy
  rollouts: {addresses: ["127.0.0.1:50061"]}
  samples_per_prompt: 4
  sampling: {max_new_tokens: 64}
"""
)


def test_muon_is_refused_where_it_has_no_whole_matrices(tmp_path: Path) -> None:
    muon = "optimizer.name=muon"
    assert config.load(TrainerConfig, written(tmp_path, GOOD), [muon]).optimizer.momentum == 0.95
    assert "muon does not go with student.lora" in refusal(tmp_path, GOOD, muon, "student.lora={}")
    assert "muon does not go with parallel.offload all" in refusal(tmp_path, GOOD, muon, "parallel.offload=all")


def test_weights_of_rows_are_refused_where_they_would_not_be_heeded(tmp_path: Path) -> None:
    weighted = "data.train.weight_column=w"
    for override, words in {
        "objective={name: distill, algorithm: {name: dskd}}": "does not go with objective.algorithm dskd",
        "parallel={context: 2}": "parallel.context is 2, which does not go with data.train.weight_column",
    }.items():
        assert words in refusal(tmp_path, GOOD, weighted, override)
    assert "weight_column needs source.sampled_fraction below 1" in refusal(tmp_path, ON_POLICY, weighted)
    assert config.load(TrainerConfig, written(tmp_path, GOOD), [weighted]).data.has_weights
    assert config.load(TrainerConfig, written(tmp_path, ON_POLICY), [weighted, "source.sampled_fraction=0.5"])


@pytest.mark.parametrize(
    ("judge", "override", "words"),
    [
        ("{name: exact}", "seed=1", "'finished', 'match', 'custom'"),
        ("{name: match}", "seed=1", "source.judge.match: is required"),
        ("{name: match, match: {name: exact}, right: 0}", "seed=1", "right and wrong are both 0"),
        ("{name: finished, cut: -1}", "seed=1", "source.judge.cut: Input should be greater than or equal to 0"),
        ("{name: finished, cut: .inf}", "seed=1", "source.judge.cut: Input should be a finite number"),
        ("{name: custom, target: mine}", "seed=1", "source.judge.target"),
        ("{name: finished}", "parallel.context=2", "parallel.context is 2, which does not go with source.judge"),
        ("{name: finished}", "objective.algorithm={name: dskd}", "does not go with objective.algorithm dskd"),
        ("{name: finished}", "data.teacher_tokenizer={path: a}", "does not go with data.teacher_tokenizer"),
        (
            "{name: custom, target: 'mine:weigh'}",
            "data.token_cache={directory: tokens}",
            "data.token_cache does not go with source.judge custom, which needs the rows",
        ),
    ],
)
def test_judges_are_refused_that_would_not_be_heeded(tmp_path: Path, judge: str, override: str, words: str) -> None:
    judged = f"source.judge={judge}"
    assert words in refusal(tmp_path, ON_POLICY, judged, "objective={name: distill}", override)


def test_a_judge_of_ends_alone_goes_with_files_of_tokens(tmp_path: Path) -> None:
    overrides = ["source.judge={name: finished}", "data.token_cache={directory: tokens}"]
    cfg = config.load(TrainerConfig, written(tmp_path, ON_POLICY), overrides)
    assert isinstance(cfg.source, OnPolicy)
    assert cfg.source.judge == FinishedJudge(name="finished", cut=0)


def test_a_teacher_that_follows_the_student_needs_somebody_who_learns_from_it(tmp_path: Path) -> None:
    cfg = config.load(TrainerConfig, written(tmp_path, GOOD), ["teacher.follows_student={every: 3}"])
    assert cfg.teacher_update_every == 3
    assert config.load(TrainerConfig, written(tmp_path, GOOD)).teacher_update_every is None
    said = refusal(tmp_path, GOOD, "teacher.follows_student={}", "objective={name: sft}")
    assert "teacher.follows_student needs objective distill" in said
    assert "teacher.follows_student.decay" in refusal(tmp_path, GOOD, "teacher.follows_student={decay: 1.0}")


def test_the_data_s_own_answers_are_the_default(tmp_path: Path) -> None:
    cfg = config.load(TrainerConfig, written(tmp_path, GOOD))
    assert cfg.source == OffPolicy()
    sampled = config.load(TrainerConfig, written(tmp_path, ON_POLICY))
    assert isinstance(sampled.source, OnPolicy)
    assert (sampled.source.max_staleness, sampled.source.update_policy) == (0, "finish")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective={name: sft}", "source on_policy needs objective distill"),
        ("objective={name: distill, ce_weight: 0.1}", r"ce_weight \(0.1\) must be 0 with source on_policy"),
        ("source.sampled_fraction=0.01", r"sampled_fraction \(0.01\) makes 0 samples of batch.sequences \(32\)"),
        ("source.sampled_fraction=0.99", r"sampled_fraction \(0.99\) makes 32 samples of batch.sequences \(32\)"),
        ("batch.sequences=30", r"batch.sequences \(30\) must be a multiple of source.samples_per_prompt \(4\)"),
        ("data.max_tokens=64", r"max_new_tokens \(64\) must be less than data.max_tokens \(64\)"),
        ("source.sampling.top_p=0", "source.sampling.top_p: Input should be greater than 0"),
        ("source={kind: on_policy, colocated: true, max_staleness: 1}", "colocated needs max_staleness 0, not 1"),
        ("source.max_staleness=-1", "source.max_staleness: Input should be greater than or equal to 0"),
        (
            "source.rollouts.address=a:1",
            "source.rollouts.address: there is no such key; did you mean source.rollouts.addresses",
        ),
        ("source.kind=on-policy", "'off_policy', 'on_policy'"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tmp_path: Path, override: str, words: str) -> None:
    assert re.search(words, refusal(tmp_path, ON_POLICY, override))


def test_some_of_a_step_may_be_the_data_s_own_answers_and_imitated(tmp_path: Path) -> None:
    half = ["source.sampled_fraction=0.4", "batch.sequences=30", "objective={name: distill, ce_weight: 0.1}"]
    cfg = config.load(TrainerConfig, written(tmp_path, ON_POLICY), half)
    assert isinstance(cfg.source, OnPolicy)
    assert cfg.source.prompts_of(cfg.batch.sequences) == 3


def test_every_broken_rule_of_several_sections_is_told_at_once(tmp_path: Path) -> None:
    overrides = [
        "trackers=[wandb, wandb]",
        "evaluation.every=3",
        "batch.max_tokens=64",
        "parallel.context=2",
        "ranks=3",
    ]
    said = refusal(tmp_path, GOOD, *overrides)
    assert said.splitlines()[0].endswith("my.yaml: 4 problems")
    assert said.splitlines()[1:] == [
        "  evaluation.every (3) has nothing to judge by: give data.held_out or evaluation.questions, or leave it out",
        "  data.max_tokens (4096) must not exceed batch.max_tokens (64)",
        "  parallel.context (2) must divide ranks (3)",
        "  trackers names one twice: wandb, wandb",
    ]


def test_a_source_without_samples_takes_no_sampling(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD + "source: {kind: off_policy, max_staleness: 1}\n")
    assert "source.max_staleness: there is no such key for off_policy" in said


def sections(module: object) -> Iterator[type[BaseModel]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, StrictModel) and value is not StrictModel:
            yield value


TRAINERS = [
    import_module(found.name) for found in iter_modules(trainer_sections.__path__, f"{trainer_sections.__name__}.")
]


@pytest.mark.parametrize("module", [auth_config, teacher_config, trainer_config, *TRAINERS])
def test_every_key_is_described_and_every_section_closed_and_frozen(module: object) -> None:
    for section in sections(module):
        assert section.__doc__
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"] is True
        for name, field in section.model_fields.items():
            is_tag = name in ("name", "kind", "format")
            assert field.description or is_tag, f"{section.__name__}.{name} has no description"
