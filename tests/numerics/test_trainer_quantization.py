"""A student that computes with rounded matrices: what it learns, and that what is written is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.losses import FusedLoss, OutputHead
from kdmesh.models.body import load_causal_lm
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.preflight.model_files import rounding_problems
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.sections.export_config import Matrices
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.sections.quantization_config import QuantizationConfig
from kdmesh_trainer.sources.context_rows import ContextRows
from kdmesh_trainer.student.fake_quantization import QuantizedLinear
from kdmesh_trainer.student.model import Student, release
from kdmesh_trainer.student.rounded_modules import check_rounding, round_modules
from kdmesh_trainer.student.weights import weights_of, whole
from tests.numerics.test_fake_quantization import FORMATS, WITH_ACTIVATIONS, oracle, rounding
from tests.numerics.test_trainer_compiled import needs_compiler
from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import FAMILIES, TinyModels
from tests.support.trainer_parts import (
    LocalTeacher,
    build_stepper,
    build_student,
    in_copies,
    random_sequences,
    step_batch,
)
from tests.support.trainer_ranks import run_ranks

HERE = "tests.numerics.test_trainer_quantization"
VOCABULARY_SIZE = 310
SEQUENCES = random_sequences(6, seed=5, vocabulary_size=VOCABULARY_SIZE)
# rank -> micro-batches -> sequences; of uneven sizes.
PLANS = {
    1: [[[0, 5], [1, 2, 3, 4]]],
    2: [[[0], [1, 2]], [[3, 4, 5], []]],
    4: [[[0], [1]], [[2], []], [[3], [4]], [[5], []]],
}
RATE = OptimizerConfig(learning_rate=3e-3)
# 128 divides the inputs of every matrix.
EVEN: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 2}
INT4 = {"weights": "int4", "group_size": 32}


def paths(tiny_models: TinyModels, output: Path, dtype: torch.dtype = torch.float32, **student: Any) -> dict[str, str]:
    return {
        "student": str(tiny_models.path("qwen3", seed=1, dtype=dtype, **EVEN, **student)),
        "teacher": str(tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)),
        "output": str(output),
    }


def gradients(
    mesh: Mesh,
    *,
    student: str,
    teacher: str,
    output: str,
    quantization: dict[str, Any],
    gather: Gather,
    shard_ranks: int | None = None,
    **options: Any,
) -> None:
    """Writes the whole gradient of every parameter to `output`; runs on every rank."""
    mesh = in_copies(mesh, shard_ranks=shard_ranks)
    model = build_student(
        Path(student),
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=torch.float32,
        quantization=QuantizationConfig(**quantization),
        gather=gather,
        **options,
    )
    local_teacher = LocalTeacher(Path(teacher))
    stepper = build_stepper(model, local_teacher, mesh, config=RATE, steps=1)
    plan, context = PLANS[mesh.num_data_groups][mesh.data_group], ContextRows.of(mesh, [""])
    tally = stepper.accumulate(step_batch(SEQUENCES, plan, local_teacher, context=context))
    totals, _ = tally.over_all_ranks()
    found = {name: whole(p.grad, None) for name, p in model.lm.named_parameters() if p.grad is not None}
    if mesh.is_first:
        save_file(found | {"loss": torch.tensor([totals.loss])}, Path(output) / f"{mesh.world_size}.safetensors")


def textbook(student: Path, teacher: Path, quantization: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradient in float64 of a plain model that has the rounded matrices."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    other = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    leaves = {
        name: (
            oracle(value.detach(), quantization["weights"], quantization.get("group_size"))
            if "_proj" in name
            else value.detach().clone()
        ).requires_grad_()
        for name, value in model.named_parameters()
    }
    loss = torch.zeros((), dtype=torch.float64)
    for sequence in SEQUENCES:
        token_ids = torch.from_numpy(sequence.token_ids).long()[None]
        positions = torch.from_numpy(sequence.positions).long()
        logits_RV = functional_call(model, leaves, (token_ids,)).logits[0, positions, :VOCABULARY_SIZE]
        log_q_RV = logits_RV.log_softmax(-1)
        log_p_RV = other(token_ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1).detach()
        labels = torch.from_numpy(sequence.labels).long()
        loss = loss + (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum() - 0.3 * log_q_RV.gather(1, labels[:, None]).sum()
    (loss / sum(sequence.num_rows for sequence in SEQUENCES)).backward()
    return {"loss": loss.detach()[None], **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


@pytest.mark.parametrize(
    ("quantization", "gather"),
    [
        (INT4, "micro_batch"),
        pytest.param({"weights": "int8"}, "step", marks=pytest.mark.slow),
        pytest.param({"weights": "fp8"}, "micro_batch", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_masters_have_the_textbook_gradient_of_rounded_matrices_on_one_rank_and_on_two(
    tiny_models: TinyModels, tmp_path: Path, quantization: dict[str, Any], gather: Gather
) -> None:
    told = paths(tiny_models, tmp_path, tie_word_embeddings=True)
    expected = textbook(Path(told["student"]), Path(told["teacher"]), quantization)
    for ranks in (1, 2):
        run_ranks(f"{HERE}:gradients", ranks=ranks, **told, quantization=quantization, gather=gather)
        found = load_file(tmp_path / f"{ranks}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = (found[name] - value).norm() / value.norm()
            assert error < 1e-5, f"{ranks} ranks: {name} is off by {error}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"context": 2}),
        (4, {"context": 2}),
        (4, {"shard_ranks": 2}),
        (2, {"spreads_head": True}),
        pytest.param(2, {"checkpointed_every": 1, "is_compiled": True}, marks=needs_compiler),
    ],
    ids=str,
)
def test_masters_have_that_gradient_however_rows_matrices_and_ranks_are_laid_out(
    tiny_models: TinyModels, tmp_path: Path, ranks: int, options: dict[str, Any]
) -> None:
    told = paths(tiny_models, tmp_path, tie_word_embeddings=True)
    expected = textbook(Path(told["student"]), Path(told["teacher"]), INT4)
    asked = {"within_s": 300, "quantization": INT4, "gather": "auto", **told, **options}
    run_ranks(f"{HERE}:gradients", ranks=ranks, **asked)
    [written] = tmp_path.glob("*.safetensors")
    found = load_file(written)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < 1e-5, f"{name} is off by {error}"


@torch.no_grad()
def logits_of(student: Student, sequence: TokenSequence) -> Tensor:
    """Of the rows that `sequence` has, as the student computes. Collective."""
    found: list[Tensor] = []

    def row_loss(hidden_RD: Tensor, head: OutputHead, labels_R: Tensor) -> FusedLoss:
        found.append(head.logits(hidden_RD))
        return FusedLoss.of(hidden_RD.sum(), [torch.zeros(0)] * 6)

    student(student.pack([sequence]), row_loss)
    release(student)
    return found[0].float()


def train_and_export(
    mesh: Mesh,
    *,
    student: str,
    teacher: str,
    output: str,
    quantization: dict[str, Any],
    compute_dtype: str = "float32",
    dtype: str | None = None,
    matrices: Matrices = "rounded",
    shard_ranks: int | None = None,
    **options: Any,
) -> None:
    """Trains three steps, and writes the student, and the logits that it has."""
    mesh = in_copies(mesh, shard_ranks=shard_ranks)
    path = Path(student)
    model = build_student(
        path,
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=getattr(torch, compute_dtype),
        quantization=QuantizationConfig(**quantization),
        **options,
    )
    local_teacher = LocalTeacher(Path(teacher))
    stepper = build_stepper(model, local_teacher, mesh, config=RATE, steps=3)
    for step in range(3):
        stepper.update(step_batch(SEQUENCES, PLANS[mesh.world_size][mesh.rank], local_teacher, step=step))
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    element = None if dtype is None else getattr(torch, dtype)
    HuggingFaceExporter(
        Path(output) / "final", model, origin=path, tokenizer=tokenizer, mesh=mesh, dtype=element, matrices=matrices
    ).export()
    found = {"logits": logits_of(model, SEQUENCES[0])}
    masters = {f"master.{name}": whole(p, None) for name, p in model.lm.named_parameters()}
    if mesh.is_first:
        save_file(found | masters, Path(output) / "trained.safetensors")


@torch.no_grad()
def logits_of_directory(path: Path, dtype: torch.dtype) -> Tensor:
    """By transformers, but for activations, which are rounded as SGLang and vLLM round them."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    for module in model.modules():
        of_input = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        if of_input is not None:
            module.quantization_enabled = False  # the matrix is rounded already
            how = rounded_to_int8 if of_input.type == "int" else rounded_to_fp8
            module.register_forward_pre_hook(lambda _, given, how=how: (how(given[0]),))
    sequence = SEQUENCES[0]
    token_ids = torch.from_numpy(sequence.token_ids).long()[None]
    return model(token_ids).logits[0, torch.from_numpy(sequence.positions).long(), :VOCABULARY_SIZE].float()  # type: ignore[no-any-return]


def rounded_to_int8(tokens: Tensor) -> Tensor:
    scales = tokens.float().abs().amax(-1, keepdim=True) / 127
    return ((tokens / scales).round() * scales).to(tokens.dtype)


def rounded_to_fp8(tokens: Tensor) -> Tensor:
    scales = tokens.float().abs().amax(-1, keepdim=True) / 448
    return ((tokens / scales).to(torch.float8_e4m3fn).float() * scales).to(tokens.dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("quantization", "ranks", "options"),
    [
        (INT4, 2, {}),
        *(pytest.param(settings, 1, {}, id=str(settings)) for settings in [*FORMATS[1:], *WITH_ACTIVATIONS]),
        pytest.param(INT4 | {"keep": ["model.layers.0.mlp", "model.layers.*.self_attn.o_proj"]}, 1, {}, id="keep"),
        pytest.param(INT4, 1, {"frozen": ["model.embed_tokens", "model.layers.0.mlp.up_proj"]}, id="frozen"),
        pytest.param(INT4, 2, {"offloads": True}, id="offload", marks=pytest.mark.slow),
        pytest.param(INT4, 2, {"shard_ranks": 1}, id="copies", marks=pytest.mark.slow),
        pytest.param(INT4, 2, {"checkpointed_every": 1}, id="checkpointed", marks=pytest.mark.slow),
        pytest.param(INT4, 2, {"is_compiled": True}, id="compiled", marks=[needs_compiler, pytest.mark.slow]),
    ],
    ids=str,
)
@pytest.mark.timeout(500)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_written_student_has_the_logits_of_the_trained_one(
    tiny_models: TinyModels,
    tmp_path: Path,
    quantization: dict[str, Any],
    ranks: int,
    options: dict[str, Any],
    dtype: str,
) -> None:
    told = paths(tiny_models, tmp_path, torch.bfloat16) | {"compute_dtype": dtype, "dtype": dtype}
    run_ranks(f"{HERE}:train_and_export", ranks=ranks, within_s=400, **told, quantization=quantization, **options)
    trained = load_file(tmp_path / "trained.safetensors")
    written = logits_of_directory(tmp_path / "final", getattr(torch, dtype))
    error = relative(written, trained["logits"])
    assert error < (2e-6 if dtype == "float32" else 1.5e-2), error
    masters = {name.removeprefix("master."): value for name, value in trained.items() if name.startswith("master.")}
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    kept = set(config["quantization_config"]["ignore"])
    assert "lm_head" in kept
    stored = load_file(tmp_path / "final" / "model.safetensors")
    for name, master in masters.items():
        is_rounded = "_proj" in name and name.removesuffix(".weight") not in kept
        assert (f"{name}_scale" in stored) == is_rounded, name
        if not is_rounded:
            assert torch.equal(stored[name], master.to(stored[name].dtype)), name
    plain = AutoModelForCausalLM.from_pretrained(told["student"], dtype=getattr(torch, dtype))
    plain.load_state_dict(masters, strict=False)
    plain.save_pretrained(tmp_path / "masters")
    far = relative(logits_of_directory(tmp_path / "masters", getattr(torch, dtype)), trained["logits"])
    assert far > 2 * error, (far, error)


@pytest.mark.parametrize("family", ["gemma2", "phi"])  # of constants in its embedding; of biases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_students_of_other_families_are_accepted_and_written_as_they_compute(
    tiny_models: TinyModels, tmp_path: Path, family: str, dtype: str
) -> None:
    path = tiny_models.path(family, seed=1, **EVEN | {"num_key_value_heads": 4})
    check_rounding(QuantizationConfig(**INT4), path, getattr(torch, dtype))
    told = paths(tiny_models, tmp_path) | {"student": str(path), "compute_dtype": dtype, "dtype": dtype}
    run_ranks(f"{HERE}:train_and_export", ranks=1, **told, quantization=INT4)
    trained = load_file(tmp_path / "trained.safetensors")
    written = logits_of_directory(tmp_path / "final", getattr(torch, dtype))
    assert relative(written, trained["logits"]) < (2e-6 if dtype == "float32" else 1.5e-2)


def published(mesh: Mesh, *, student: str, output: str) -> None:
    """Writes what others get of a student that is spread; runs on every rank."""
    model = build_student(
        Path(student),
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=torch.float32,
        quantization=QuantizationConfig(weights="int8"),
    )
    found = {name: weight.whole(torch.float32) for name, weight in model.weights().items()}
    if mesh.is_first:
        save_file(found, Path(output) / "published.safetensors")


def test_ranks_without_rows_of_a_matrix_have_their_part_in_what_others_get(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    path = tiny_models.path("qwen3", seed=1, **EVEN | {"num_key_value_heads": 1, "head_dim": 2})  # k_proj has two rows
    run_ranks(f"{HERE}:published", ranks=3, student=str(path), output=str(tmp_path))
    lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
    found = load_file(tmp_path / "published.safetensors")
    for name, parameter in lm.named_parameters():
        expected = rounding({"weights": "int8"}).rounded(parameter.detach()) if "_proj" in name else parameter
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("matrices", ["masters", "both"])
def test_masters_are_written_on_request(tiny_models: TinyModels, tmp_path: Path, matrices: Matrices) -> None:
    told = paths(tiny_models, tmp_path) | {"matrices": matrices}
    run_ranks(f"{HERE}:train_and_export", ranks=1, **told, quantization=INT4)
    trained = load_file(tmp_path / "trained.safetensors")
    final = tmp_path / "final"
    with_masters = final if matrices == "masters" else final / "masters"
    written = AutoModelForCausalLM.from_pretrained(with_masters, dtype=torch.float32)
    assert "quantization_config" not in json.loads((with_masters / "config.json").read_text())
    for name, parameter in written.named_parameters():
        assert torch.equal(parameter, trained[f"master.{name}"]), name
    if matrices == "both":
        assert relative(logits_of_directory(final, torch.float32), trained["logits"]) < 2e-6
        assert {path.stat().st_mode for path in with_masters.iterdir()} == {(final / "config.json").stat().st_mode}


@pytest.mark.parametrize("settings", [INT4, {"weights": "fp8"}, WITH_ACTIVATIONS[0]], ids=str)
def test_a_written_student_can_be_served_and_trained_again_unless_its_activations_are_rounded(
    tiny_models: TinyModels, tmp_path: Path, settings: dict[str, Any]
) -> None:
    told = paths(tiny_models, tmp_path)
    run_ranks(f"{HERE}:train_and_export", ranks=1, **told, quantization=settings)
    final = tmp_path / "final"
    if "activations" in settings:
        with pytest.raises(ConfigError, match="quantization_config has input_activations"):
            load_causal_lm(final, torch.float32, torch.device("cpu"))
        return
    with pytest.raises(ConfigError, match=r"whose matrices are rounded already .*begin from its masters"):
        check_rounding(QuantizationConfig(**settings), final, torch.float32)
    [told_before] = rounding_problems("student.quantization", None, (), final, written="origin")
    assert "are rounded already" in told_before and "begin from its masters" in told_before
    trained = load_file(tmp_path / "trained.safetensors")
    how = rounding(settings)
    for name, parameter in load_causal_lm(final, torch.float32, torch.device("cpu")).named_parameters():
        master = trained[f"master.{name}"]
        assert torch.equal(parameter, how.rounded(master) if "_proj" in name else master), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"compute_dtype": "bfloat16", "checkpointed_every": 1}, {"optimizer": {"name": "muon"}}, {"offloads": True}],
    ids=str,
)
@pytest.mark.timeout(800)
def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    tiny_models: TinyModels, tmp_path: Path, options: dict[str, Any]
) -> None:
    arguments = {
        "student": str(tiny_models.path("qwen3", seed=1, tie_word_embeddings=True, **EVEN)),
        "teacher": str(tiny_models.path("qwen3", seed=2)),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": 6,
        "until": 6,
        "quantization": INT4,
        **options,
    }
    check_exact_continuation(arguments, tmp_path / "other", within_s=350)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_others_get_of_a_student_is_what_it_computes_with(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    lm = load_causal_lm(tiny_models.path("qwen3", seed=1, **EVEN), torch.float32, torch.device("cpu"))
    before = {name: parameter.clone() for name, parameter in lm.state_dict().items()}
    round_modules(lm, QuantizationConfig(weights="int4", group_size=64), dtype)
    after = weights_of(lm, None)
    assert after.keys() == before.keys()
    for name, weight in after.items():
        is_rounded = name.endswith("_proj.weight")
        expected = oracle(before[name].to(dtype), "int4", 64).to(dtype).float() if is_rounded else before[name]
        found = weight.whole(torch.float32)
        assert (found - expected).norm() <= 2e-3 * expected.norm(), name  # ties
        assert torch.equal(weight.master().whole(torch.float32), before[name])
        assert weight.can_change


def test_rounded_modules_are_the_linear_ones_of_the_body_and_no_others(tiny_models: TinyModels) -> None:
    lm = load_causal_lm(tiny_models.path("qwen3", seed=1, **EVEN), torch.float32, torch.device("cpu"))
    names = set(dict(lm.named_parameters()))
    round_modules(
        lm, QuantizationConfig(weights="int8", keep=("model.layers.1", "model.layers.0.mlp.*")), torch.float32
    )
    rounded = {name for name, module in lm.named_modules() if isinstance(module, QuantizedLinear)}
    assert rounded == {f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"}
    assert set(dict(lm.named_parameters())) == names


@pytest.mark.parametrize(
    ("settings", "family", "overrides", "told"),
    [
        (
            {"weights": "int4", "group_size": 128},
            "qwen3",
            {},
            r"group_size is 128, and model\.layers\.0\.self_attn\.q_proj has 32 inputs, which it does not divide",
        ),
        ({"weights": "int8", "keep": ["model.layers.7"]}, "qwen3", {}, r"keep: .*model\.layers\.7 names no parameter"),
        ({"weights": "int8", "keep": ["lm_head"]}, "qwen3", {}, r"keep: .*lm_head names no parameter"),
        ({"weights": "int8", "keep": ["model"]}, "qwen3", {}, r"leaves no linear module of qwen3 to round"),
        (
            {"weights": "int8", "keep": ["model.layers.*.self_attn.v_proj"]},
            "qwen3",
            {},
            r"keep has model\.layers\.0\.self_attn\.v_proj and not all of .*q_proj.*keep all of them or none",
        ),
        (
            {"weights": "int8"},
            "qwen3_moe",
            {},
            r"model\.layers\.0\.mlp\.experts of qwen3_moe holds matrices of several",
        ),
        (
            {"weights": "int8"},
            "qwen3",
            {"dtype": torch.float16},
            r"origin and .* has float16, which does not hold every",
        ),
        ({"weights": "int8"}, "qwen3_5_text", {}, r"does not go with layers that carry a state from token to token"),
    ],
)
def test_a_student_that_cannot_be_rounded_is_refused_before_it_loads(
    tiny_models: TinyModels, settings: dict[str, Any], family: str, overrides: dict[str, Any], told: str
) -> None:
    path = tiny_models.path(family, seed=1, **overrides)
    with pytest.raises(ConfigError, match=told):
        check_rounding(QuantizationConfig(**settings), path, torch.float32)
    if "keep" not in settings:
        size = settings.get("group_size")
        assert len(list(rounding_problems("student.quantization", size, (), path, written="origin"))) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_s_files_tell_of_every_family_whether_it_can_be_rounded(
    tiny_models: TinyModels, family: str, dtype: torch.dtype
) -> None:
    path = tiny_models.path(family, dtype=dtype)
    told = list(rounding_problems("student.quantization", None, (), path, written="origin"))
    try:
        check_rounding(QuantizationConfig(weights="int8"), path, dtype)
    except ConfigError as error:
        assert len(told) == 1
        assert ("a state from token to token" in told[0]) == ("a state from token to token" in str(error)) or (
            "experts" in told[0]
        )
    else:
        assert told == []


def distil(mesh: Mesh, *, path: Path, quantization: QuantizationConfig | None) -> dict[str, Tensor]:
    """Masters of a student that begins as its teacher, after 40 steps."""
    student = build_student(
        path, mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32, quantization=quantization
    )
    teacher = LocalTeacher(path)
    config = OptimizerConfig(learning_rate=5e-4)
    stepper = build_stepper(student, teacher, mesh, config=config, steps=40, ce_weight=0.0)
    for step in range(40):
        sequences = random_sequences(16, seed=step, vocabulary_size=VOCABULARY_SIZE)
        stepper.update(step_batch(sequences, [list(range(16))], teacher, step=step))
    release(student)
    return {name: weight.master().whole(None).clone() for name, weight in student.weights().items()}


@torch.no_grad()
def distance(path: Path, masters: dict[str, Tensor], quantization: QuantizationConfig) -> float:
    """KL(teacher || rounded student) over tokens that neither has seen, in nats."""
    teacher, student = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    student.load_state_dict(masters)
    round_modules(student, quantization, torch.float32)
    sum_nats, tokens = 0.0, 0
    for sequence in random_sequences(24, seed=999, vocabulary_size=VOCABULARY_SIZE):
        token_ids = torch.from_numpy(sequence.token_ids).long()[None]
        rows = torch.from_numpy(sequence.positions).long()
        log_p_RV, log_q_RV = (
            lm(token_ids).logits[0, rows, :VOCABULARY_SIZE].double().log_softmax(-1) for lm in (teacher, student)
        )
        sum_nats += float((log_p_RV.exp() * (log_p_RV - log_q_RV)).sum())
        tokens += len(rows)
    return sum_nats / tokens


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_student_that_learns_rounded_is_nearer_to_its_teacher_than_one_that_is_rounded_after(
    tiny_models: TinyModels,
) -> None:
    path = tiny_models.path("qwen3", seed=2, **EVEN)
    quantization = QuantizationConfig(weights="int4")
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    found = {"not trained": distance(path, original, quantization)}
    with joined("cpu", longest_wait_s=60) as mesh:
        for name, settings in (("rounded after", None), ("rounded in every pass", quantization)):
            found[name] = distance(path, distil(mesh, path=path, quantization=settings), quantization)
    told = json.dumps(found)
    assert found["rounded in every pass"] < 0.87 * found["rounded after"], told
    assert found["rounded in every pass"] < 0.87 * found["not trained"], told
