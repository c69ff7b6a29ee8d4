"""Every divergence can be named in a configuration; weights and temperature may move with the step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from kdmesh.errors import ConfigError
from kdmesh.losses import FusedLoss, MixedTeacher, OutputHead, SampledDivergence, build_divergence
from kdmesh_trainer.algorithms.seam import StudentRows, Terms
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.objectives.head import Target
from kdmesh_trainer.objectives.objective import Distillation
from kdmesh_trainer.sections.objective_config import CustomDivergence, Distill, DivergenceConfig, Ramp
from kdmesh_trainer.sources.batches import PanelRows, TeacherRows

MEMBERS = [member for member in get_args(get_args(DivergenceConfig)[0]) if member is not CustomDivergence]
REQUIRED: dict[str, dict[str, Any]] = {"renyi": {"order": 2.0}}


def distill(**fields: Any) -> Distill:
    return TypeAdapter(Distill).validate_python(fields)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_is_a_divergence_whose_parameters_are_its_own(member: type[Any]) -> None:
    name = member.model_fields["name"].annotation.__args__[0]
    cfg = distill(divergence={"name": name, **REQUIRED.get(name, {})}).divergence
    built = build_divergence(cfg.name, cfg.model_dump(exclude={"name"}))
    log_q_CV, log_p_CV = torch.randn(2, 3, 9, dtype=torch.float64).log_softmax(-1)
    if isinstance(built, SampledDivergence):
        value_C, h_CV = built.function(log_q_CV, log_p_CV, torch.zeros(3, 1, dtype=torch.int64))
    else:
        value_C, h_CV = built(log_q_CV, log_p_CV)
    assert (value_C.shape, h_CV.shape) == ((3,), (3, 9))


def test_every_divergence_that_is_known_by_name_has_a_member() -> None:
    with pytest.raises(ConfigError) as caught:
        build_divergence("nothing")
    known = str(caught.value).partition("known: ")[2].split(", ")
    assert sorted(known) == sorted(member.model_fields["name"].annotation.__args__[0] for member in MEMBERS)


def test_a_ramp_begins_at_its_start_and_stays_at_its_end() -> None:
    for shape in ("linear", "cosine"):
        ramp = Ramp(start=4.0, end=1.0, steps=10, shape=shape)
        numbers = [ramp.at(step) for step in range(15)]
        assert numbers[0] == 4.0
        assert numbers[5] == pytest.approx(2.5)
        assert numbers[10:] == [1.0] * 5
        assert numbers == sorted(numbers, reverse=True)


def test_numbers_of_a_step_follow_their_ramps_and_the_squared_temperature() -> None:
    cfg = distill(
        temperature={"start": 2.0, "end": 4.0, "steps": 2},
        temperature_squared=True,
        kd_weight=0.5,
        ce_weight={"start": 1.0, "end": 0.0, "steps": 4},
    )
    assert cfg.numbers_at(1) == {"temperature": 3.0, "kd_weight": 0.5 * 9, "ce_weight": 0.75}
    assert cfg.imitates_data
    assert not distill().imitates_data


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": {"start": 1.0, "end": 0.0, "steps": 5}}, "temperature must be above 0 from its start"),
        ({"temperature": 0}, "greater than 0"),
        ({"kd_weight": {"start": 1.0, "steps": 5}}, "kd_weight.ramp.end"),
        ({"kd_weight": {"start": -1.0, "end": 1.0, "steps": 5}}, "kd_weight.ramp.start"),
        ({"keep": {}}, "give top_k or top_p, and not both"),
        ({"keep": {"top_k": 5, "top_p": 0.9}}, "give top_k or top_p, and not both"),
        ({"keep": {"top_k": 5}, "divergence": {"name": "sampled_reverse_kl"}}, "keep does not go with"),
        ({"keep": {"top_k": 5}, "divergence": {"name": "top1_cross_entropy"}}, "keep does not go with top1_cross"),
        ({"keep": {"top_p": 0.5}, "divergence": {"name": "masked_reverse_kl"}}, "may be that"),
        ({"keep": {"top_k": 5}, "divergence": {"name": "hierarchical_ranking"}}, "may be that"),
        ({"divergence": {"name": "renyi", "order": 1}}, "order is 1, which is forward_kl"),
        ({"divergence": {"name": "skewed_kl", "skew": 1.0}}, "less than 1"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        distill(**fields)
    places = [".".join(str(part) for part in error["loc"]) + ": " + error["msg"] for error in caught.value.errors()]
    assert len(places) == 1
    assert said in places[0]


def test_an_objective_of_a_step_minimises_with_the_numbers_of_that_step() -> None:
    cfg = distill(
        divergence={"name": "sampled_reverse_kl"},
        temperature={"start": 1.0, "end": 3.0, "steps": 2},
        kd_weight={"start": 1.0, "end": 0.0, "steps": 4},
    )
    torch.manual_seed(0)
    hidden_RD, teacher_RD, weight_VD = torch.randn(6, 4), torch.randn(6, 4), torch.randn(9, 4)
    labels_R = torch.arange(6)
    divergence = build_divergence(cfg.divergence.name)
    head = OutputHead(weight_VD=weight_VD)
    objective = Distillation(
        terms=Terms(divergence=divergence, **cfg.numbers_at(0)), teacher_head=_Heads(head), numbers_at=cfg.numbers_at
    )
    loss = objective.at(2)(StudentRows(hidden_RD=hidden_RD, head=head, labels_R=labels_R), _Rows(teacher_RD))
    log_q_R, log_p_R = (
        (rows_RD @ weight_VD.T / 3.0).log_softmax(-1)[range(6), labels_R] for rows_RD in (hidden_RD, teacher_RD)
    )
    torch.testing.assert_close(loss.divergence_R, log_q_R - log_p_R)
    torch.testing.assert_close(loss.loss_sum, 0.5 * (log_q_R - log_p_R).sum())


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_cross_entropy_without_a_weight_any_more_is_told_and_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    head = OutputHead(weight_VD=torch.randn(9, 4))
    teacher_RD, labels_R = torch.randn(6, 4), torch.arange(6)

    def loss_and_gradient(ce_weight: object) -> tuple[FusedLoss, torch.Tensor]:
        cfg = distill(divergence={"name": name}, temperature=2.0, ce_weight=ce_weight)
        divergence = build_divergence(cfg.divergence.name)
        terms = Terms(divergence=divergence, **cfg.numbers_at(0), imitates_data=cfg.imitates_data)
        objective = Distillation(terms=terms, teacher_head=_Heads(head), numbers_at=cfg.numbers_at)
        hidden_RD = torch.arange(24.0).reshape(6, 4).sin().requires_grad_()
        loss = objective.at(5)(StudentRows(hidden_RD=hidden_RD, head=head, labels_R=labels_R), _Rows(teacher_RD))
        loss.loss_sum.backward()
        assert hidden_RD.grad is not None
        return loss, hidden_RD.grad

    (ramped, gradient_RD), (without, expected_RD) = (
        loss_and_gradient(weight) for weight in ({"start": 1.0, "end": 0.0, "steps": 5}, 0.0)
    )
    assert len(without.cross_entropy_R) == 0
    logits_RV = torch.arange(24.0).reshape(6, 4).sin() @ head.weight_VD.T
    torch.testing.assert_close(
        ramped.cross_entropy_R, torch.nn.functional.cross_entropy(logits_RV, labels_R, reduction="none")
    )
    torch.testing.assert_close(ramped.loss_sum, without.loss_sum)
    torch.testing.assert_close(gradient_RD, expected_RD)


class _Rows:
    weight_version = 1

    def __init__(self, rows_RD: torch.Tensor) -> None:
        self.rows_RD = rows_RD


class _Heads:
    """One teacher, of any rows."""

    names = ("",)

    def __init__(self, head: OutputHead) -> None:
        self._head = head

    def targets(self, rows: TeacherRows | PanelRows) -> tuple[Target, ...]:
        assert isinstance(rows, _Rows)
        return (Target(index_R=None, teachers=(MixedTeacher(hidden_RE=rows.rows_RD, head=self._head, weight=1.0),)),)


def test_every_objective_of_the_page_on_losses_is_one_and_every_divergence_is_on_it() -> None:
    page = (Path(__file__).parents[2] / "docs/losses.md").read_text(encoding="utf-8")
    in_table = re.findall(r"^\| `(\{name: .*?\})` \|", page, re.MULTILINE)
    blocks = [yaml.safe_load(block)["objective"] for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    written = [{"divergence": yaml.safe_load(text)} for text in in_table] + blocks
    names = {TypeAdapter(Distill).validate_python(fields).divergence.name for fields in written}
    assert names == {member.model_fields["name"].annotation.__args__[0] for member in MEMBERS} | {"custom"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"algorithm": {"name": "uld"}, "divergence": {"name": "reverse_kl"}}, "uld has its own divergence"),
        ({"algorithm": {"name": "gold"}, "keep": {"top_k": 5}}, "gold has its own divergence"),
        ({"algorithm": {"name": "alm"}, "temperature": 2.0}, "its own tau flattens"),
        ({"algorithm": {"name": "alm", "tau": 0}}, "greater than 0"),
        ({"algorithm": {"name": "alm", "debias_above": 1}}, "less than 1"),
        ({"algorithm": {"name": "gold", "beta": 1}}, "less than 1"),
        ({"algorithm": {"name": "gold", "matched_weight": 0, "unmatched_weight": 0}}, "nothing would be learnt"),
    ],
)
def test_what_has_no_effect_across_tokenizers_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        distill(**fields)


def test_what_compares_two_tokenizers_needs_the_teachers() -> None:
    example = yaml.safe_load((Path(__file__).parents[2] / "examples/train-chunk-likelihood.yaml").read_text())
    assert TypeAdapter(TrainerConfig).validate_python(example).objective.name == "distill"
    del example["data"]["teacher_tokenizer"]
    with pytest.raises(ValidationError, match=r"algorithm alm compares two tokenizers.* needs data\.teacher_tokenizer"):
        TypeAdapter(TrainerConfig).validate_python(example)


def test_dual_space_without_a_second_tokenizer_is_told_once_what_needs_one() -> None:
    example = yaml.safe_load((Path(__file__).parents[2] / "examples/train-dskd.yaml").read_text(encoding="utf-8"))
    example["objective"]["algorithm"]["token_alignment"] = "cma"
    with pytest.raises(ValidationError, match="token_alignment cma needs") as refused:
        TypeAdapter(TrainerConfig).validate_python(example)
    assert str(refused.value).count("needs data.teacher_tokenizer") == 1
    assert "compares two tokenizers" not in str(refused.value)


def test_samples_that_another_tokenizer_cannot_judge_are_refused() -> None:
    path = Path(__file__).parents[2] / "examples/train-on-policy-other-tokenizer.yaml"
    example = yaml.safe_load(path.read_text(encoding="utf-8"))
    example["objective"] |= {"algorithm": {"name": "vanilla_kd"}, "divergence": {"name": "sampled_reverse_kl"}}
    with pytest.raises(ValidationError, match="whose tokens differ"):
        TypeAdapter(TrainerConfig).validate_python(example)
