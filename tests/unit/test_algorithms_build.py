"""An algorithm of the user's own is refused before anything loads when it does not have the form of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import nn

from kdmesh.errors import ConfigError, InvalidRequest
from kdmesh.losses import FusedLoss, OutputHead, forward_kl, fused_linear_cross_entropy
from kdmesh.preflight import check
from kdmesh_trainer.algorithms.build import resolve_algorithm
from kdmesh_trainer.algorithms.seam import LossRows, Setup, StudentRows, Terms
from kdmesh_trainer.algorithms.vanilla_kd import vanilla_kd
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.objectives.objective import Distillation
from kdmesh_trainer.sections.algorithm_config import AlgorithmConfig, CustomAlgorithm, VanillaKD
from tests.support.trainer_parts import Rows

HERE = "tests.unit.test_algorithms_build"


class Scaled:
    """Cross-entropy times a number."""

    def __init__(self, setup: Setup, *, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, rows: LossRows, terms: Terms) -> FusedLoss:
        loss = fused_linear_cross_entropy(rows.hidden_RD, rows.head, rows.labels_R)
        return FusedLoss(
            **{**{n: getattr(loss, n) for n in FusedLoss.__slots__}, "loss_sum": loss.loss_sum * self.factor}
        )


class ScaledModule(nn.Module):
    """The same, by a number that is learnt; a second one has no part in it."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]))
        self.idle = nn.Parameter(torch.tensor([float("inf"), 1.0]))

    def forward(self, rows: LossRows, terms: Terms) -> FusedLoss:
        return Scaled(None, factor=self.factor[0])(rows, terms)  # type: ignore[arg-type]


class WithoutCall:
    """Nothing that can be called."""

    def __init__(self, setup: Setup) -> None: ...


class ModuleWithoutForward(nn.Module):
    """Likewise."""

    def __init__(self, setup: Setup) -> None: ...


class TakesOne:
    """Called otherwise."""

    def __init__(self, setup: Setup) -> None: ...

    def __call__(self, rows: LossRows) -> FusedLoss: ...  # type: ignore[empty-body]


def function(setup: Setup) -> None: ...


def custom(name: str, params: Mapping[str, Any] | None = None) -> CustomAlgorithm:
    return CustomAlgorithm(name="custom", target=f"{HERE}:{name}", params=dict(params or {}))


@pytest.mark.parametrize(
    ("name", "params", "refusal"),
    [
        ("function", {}, "function is a function; an algorithm is a class"),
        ("WithoutCall", {}, "WithoutCall has no __call__"),
        ("ModuleWithoutForward", {}, "ModuleWithoutForward has no forward"),
        ("TakesOne", {}, r"TakesOne.__call__.* must take \(self, rows, terms\)"),
        ("Scaled", {"facter": 2.0}, "unknown params: facter"),
        ("Missing", {}, "has no function 'Missing'"),
    ],
)
def test_what_is_not_an_algorithm_is_refused(name: str, params: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        resolve_algorithm(custom(name, params))


def test_an_algorithm_is_built_with_its_params(setup: Setup) -> None:
    algorithm = resolve_algorithm(custom("Scaled", {"factor": 3.0}))(setup)
    assert vars(algorithm) == {"factor": 3.0}
    assert resolve_algorithm(VanillaKD())(setup) is vanilla_kd


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("def Mine(setup): ...", "Mine is a function, and must be a class"),
        ("class Mine:\n    def __init__(self, setup, *, weight): ...", "Mine requires 'weight'"),
        ("class Mine:\n    def __init__(self, setup, weight=1): ...", None),
        ("class Other: ...", "defines no 'Mine'"),
    ],
)
def test_check_reads_the_class_without_importing_it(
    text: str, refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "never_imported.py").write_text(f"{text}\nraise SystemExit\n")
    (tmp_path / "my.yaml").write_text(
        "{output: out, steps: 1, student: {model: s}, teacher: {addresses: ['a:1']}, "
        "data: {train: {format: chat, path: t.jsonl}}, "
        "objective: {name: distill, algorithm: {name: custom, target: 'never_imported:Mine'}}}"
    )
    lines = [line for line in check.missing(check.load_any(tmp_path / "my.yaml")) if "algorithm" in line]
    assert [refusal in line for line in lines] == [True] if refusal else lines == []


@pytest.fixture
def setup() -> Setup:
    head = OutputHead(weight_VD=torch.zeros(5, 2))
    return Setup(student_head=head, teacher_heads=lambda: {"": head}, shared=None, device=torch.device("cpu"))


class Service:
    """A teacher's head."""

    def head(self) -> tuple[OutputHead, int]:
        return OutputHead(weight_VD=torch.ones(5, 3)), 1


def objective(algorithm: Any) -> Distillation:
    return Distillation(
        terms=Terms(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.0),
        teacher_head=TeacherHead(Service(), vocabulary_size=5, device=torch.device("cpu")),
        algorithm=algorithm,
    )


@pytest.mark.parametrize("num_rows", [0, 3])
def test_every_parameter_of_an_algorithm_has_a_gradient_whether_it_has_a_part_or_not(
    num_rows: int, setup: Setup
) -> None:
    algorithm = ScaledModule(setup)
    hidden_RD, labels_R = torch.ones(num_rows, 2), torch.zeros(num_rows, dtype=torch.int64)
    rows = Rows(rows_RD=torch.ones(num_rows, 3)) if num_rows else None
    loss = objective(algorithm)(StudentRows(hidden_RD=hidden_RD, head=setup.student_head, labels_R=labels_R), rows)
    loss.loss_sum.backward()  # type: ignore[no-untyped-call]
    expected = num_rows * torch.tensor(5.0).log()
    assert loss.loss_sum.item() == pytest.approx(2 * expected.item())
    assert algorithm.factor.grad is not None and algorithm.idle.grad is not None
    torch.testing.assert_close(algorithm.factor.grad, expected[None])
    assert algorithm.idle.grad.tolist() == [0, 0]


def test_an_algorithm_that_returns_no_loss_of_its_rows_is_refused(setup: Setup) -> None:
    hidden_RD, labels_R, rows = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), Rows(rows_RD=torch.ones(3, 3))
    with pytest.raises(InvalidRequest, match="returned Tensor"):
        objective(lambda rows, terms: rows.hidden_RD.sum())(
            StudentRows(hidden_RD=hidden_RD, head=setup.student_head, labels_R=labels_R), rows
        )
    one_less = fused_linear_cross_entropy(hidden_RD[1:], setup.student_head, labels_R[1:])
    with pytest.raises(InvalidRequest, match="2 cross-entropies of 3 rows"):
        objective(lambda rows, terms: one_less)(
            StudentRows(hidden_RD=hidden_RD, head=setup.student_head, labels_R=labels_R), rows
        )


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"teacher": None, "teachers": {"one": {}}}, "single `teacher`"),
        ({"objective": {"name": "distill", "divergence": {"name": "sampled_reverse_kl"}}}, "sampled_reverse_kl"),
        ({"objective": {"name": "distill", "algorithm": {"token_alignment": "cma"}}}, "needs data.teacher_tokenizer"),
    ],
)
def test_dskd_is_refused_where_there_is_no_second_space(changes: dict[str, Any], refusal: str) -> None:
    tree: dict[str, Any] = {
        "output": "out",
        "steps": 1,
        "student": {"model": "s"},
        "teacher": {},
        "data": {"train": {"format": "chat", "path": "t.jsonl"}},
        "objective": {"name": "distill"},
    } | changes
    tree["objective"] |= {"algorithm": {"name": "dskd"} | tree["objective"].get("algorithm", {})}
    with pytest.raises(ValidationError, match=refusal):
        TrainerConfig.model_validate({key: value for key, value in tree.items() if value is not None})


def test_the_page_on_algorithms_has_every_one() -> None:
    page = (Path(__file__).parents[2] / "docs/algorithms.md").read_text(encoding="utf-8")
    in_table = re.findall(r"^\| `(\{name: .*?\})` \|", page, re.MULTILINE)
    named = {TypeAdapter(AlgorithmConfig).validate_python(yaml.safe_load(text)).name for text in in_table}
    members = get_args(get_args(AlgorithmConfig)[0])
    assert named == {member.model_fields["name"].annotation.__args__[0] for member in members}
