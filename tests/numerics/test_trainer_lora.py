"""A student with adapters: its base stays as it is, and the adapters learn what the mathematics says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.packing import pack
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.saving.export_adapter import AdapterExporter
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.student.lora import add_adapter
from kdmesh_trainer.student.model import release
from kdmesh_trainer.student.weights import weights_of, whole
from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import FAMILIES, HYBRIDS, TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

HERE = "tests.numerics.test_trainer_lora"
RUNS = "tests.support.trainer_runs"
VOCABULARY_SIZE = 310
SEQUENCES = random_sequences(6, seed=5, vocabulary_size=VOCABULARY_SIZE)
# rank -> micro-batches -> sequences; of uneven sizes.
PLANS = {1: [[[0, 5], [1, 2, 3, 4]]], 2: [[[0], [1, 2]], [[3, 4, 5], []]]}
LORA = {"rank": 3, "alpha": 12, "target_modules": ("q_proj", "layers.1.mlp.down_proj")}
RATE = OptimizerConfig(learning_rate=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_with_a_new_adapter_says_exactly_what_its_base_says(
    tiny_models: TinyModels, dtype: torch.dtype
) -> None:
    packed = pack(SEQUENCES[:3])
    lm = load_causal_lm(tiny_models.path(seed=1), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        before_TD = hidden_states_TD(lm.to(dtype), packed)
        adapter = add_adapter(lm, LoraConfig(), seed=0)
        assert torch.equal(hidden_states_TD(lm.to(dtype), packed), before_TD)
        assert len(adapter.layers) == 14
        next(p for name, p in lm.named_parameters() if "lora_B" in name).fill_(0.1)
        assert not torch.equal(hidden_states_TD(lm.to(dtype), packed), before_TD)


def gradients(mesh: Mesh, *, student: str, teacher: str, output: str, gather: Gather, **options: Any) -> None:
    """Writes an adapter that is not zero, and its whole gradient, to `output`; runs on every rank."""
    lora = LoraConfig.model_validate({**LORA, **options})
    model = build_student(
        Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32, lora=lora, gather=gather
    )
    trained = {name: p for name, p in model.lm.named_parameters() if p.requires_grad}
    values = _values(trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(_like(values[name], parameter))
    local_teacher = LocalTeacher(Path(teacher))
    stepper = build_stepper(model, local_teacher, mesh, config=RATE, steps=1)
    tally = stepper.accumulate(step_batch(SEQUENCES, PLANS[mesh.world_size][mesh.rank], local_teacher))
    totals, _ = tally.over_all_ranks()
    assert {name for name, p in model.lm.named_parameters() if p.grad is not None} == trained.keys()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    found = {name: whole(p.grad, None) for name, p in trained.items()}
    if mesh.is_first:
        save_file(found | {"loss": torch.tensor([totals.loss])}, Path(output) / f"{mesh.world_size}.safetensors")


def _values(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {name: 0.2 * torch.randn(p.shape, generator=random) for name, p in sorted(trained.items())}


def _like(value: Tensor, shard: Tensor) -> Tensor:
    if not isinstance(shard, DTensor):  # one rank has it whole
        return value
    return torch.distributed.tensor.distribute_tensor(value, shard.device_mesh, shard.placements)


def textbook(student: Path, teacher: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradient in float64, of a plain model whose matrices are W + alpha / rank * B A.

    With magnitudes in `found` every row of these is divided by its length, which is taken as a constant (DoRA, section
    4.3), and multiplied by its magnitude.
    """
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    other = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    leaves = {name: value.double().requires_grad_() for name, value in _values(found).items()}
    plain = dict(model.named_parameters())
    changed = {
        f"{layer}.weight": plain[f"{layer}.weight"].detach()
        + 4.0 * leaves[f"{layer}.lora_B.default.weight"] @ leaves[f"{layer}.lora_A.default.weight"]
        for layer in {name.partition(".lora_")[0] for name in found}
    }
    for name in [name for name in leaves if "magnitude" in name]:
        changed_name = f"{name.partition('.lora_')[0]}.weight"
        lengths = changed[changed_name].detach().norm(dim=1, keepdim=True)
        changed[changed_name] = leaves[name][:, None] * changed[changed_name] / lengths
    loss = torch.zeros((), dtype=torch.float64)
    for sequence in SEQUENCES:
        token_ids = torch.from_numpy(sequence.token_ids).long()[None]
        positions = torch.from_numpy(sequence.positions).long()
        logits_RV = functional_call(model, changed, (token_ids,)).logits[0, positions, :VOCABULARY_SIZE]
        log_q_RV = logits_RV.log_softmax(-1)
        log_p_RV = other(token_ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1).detach()
        labels = torch.from_numpy(sequence.labels).long()
        loss = loss + (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum() - 0.3 * log_q_RV.gather(1, labels[:, None]).sum()
    (loss / sum(sequence.num_rows for sequence in SEQUENCES)).backward()
    return {"loss": loss.detach()[None], **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize(
    ("is_tied", "gather", "dtype", "use_dora"),
    [
        pytest.param(False, "micro_batch", torch.bfloat16, False, marks=pytest.mark.slow),
        (True, "step", torch.float32, False),
        pytest.param(False, "micro_batch", torch.bfloat16, True, marks=pytest.mark.slow),
    ],
)
def test_only_adapters_have_a_gradient_and_it_is_the_textbook_one(
    tiny_models: TinyModels,
    tmp_path: Path,
    is_tied: bool,
    gather: Gather,
    dtype: torch.dtype,
    use_dora: bool,
) -> None:
    student = tiny_models.path("qwen3", seed=1, tie_word_embeddings=is_tied, dtype=dtype)
    teacher = tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)
    for ranks in PLANS:
        paths = {"student": str(student), "teacher": str(teacher), "output": str(tmp_path)}
        run_ranks(f"{HERE}:gradients", ranks=ranks, **paths, gather=gather, use_dora=use_dora)
        found = load_file(tmp_path / f"{ranks}.safetensors")
        layers = {name.partition(".lora_")[0] for name in found} - {"loss"}
        assert layers == {
            *(f"model.layers.{n}.self_attn.q_proj" for n in range(2)),
            "model.layers.1.mlp.down_proj",
        }
        names = found.keys() - {"loss"}
        assert len(names) == 3 * (3 if use_dora else 2)
        expected = textbook(student, teacher, {name: found[name] for name in names})
        for name, value in expected.items():
            error = (found[name] - value).norm() / value.norm()
            assert error < 1e-5, f"{ranks} ranks: {name} is off by {error}"


def test_a_student_with_new_magnitudes_says_what_its_base_says(tiny_models: TinyModels) -> None:
    packed = pack(SEQUENCES[:3])
    lm = load_causal_lm(tiny_models.path(seed=1), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        before_TD = hidden_states_TD(lm, packed)
        adapter = add_adapter(lm, LoraConfig(use_dora=True), seed=0)
        assert torch.allclose(hidden_states_TD(lm, packed), before_TD, rtol=1e-4, atol=1e-5)
        for name, parameter in lm.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
        weights = weights_of(lm, adapter)
        grown = [w for name, w in weights.items() if name.endswith("_proj.weight")]
        assert len(grown) == 14
        assert all(torch.allclose(w.whole(None), 1.5 * w.base.float(), rtol=1e-5, atol=1e-7) for w in grown)


def test_a_base_that_bfloat16_holds_is_kept_in_it(tiny_models: TinyModels) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        lm = load_causal_lm(tiny_models.path(seed=1, dtype=dtype), torch.float32, torch.device("cpu"))
        before = {name: parameter.clone() for name, parameter in lm.state_dict().items()}
        adapter = add_adapter(lm, LoraConfig(), seed=0)
        after = weights_of(lm, adapter)
        assert all(torch.equal(after[name].whole(torch.float32), value) for name, value in before.items())
        assert {weight.base.dtype for name, weight in after.items() if "proj" in name} == {dtype}
        assert {p.dtype for p in lm.parameters() if p.requires_grad} == {torch.float32}


@pytest.fixture
def arguments(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Any]:
    return {
        **tiny_models.student_and_teacher(),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": 6,
        "until": 6,
    }


@pytest.mark.slow
def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    arguments |= {"lora": {"rank": 4, "dropout": 0.1}, "compute_dtype": "bfloat16"}
    check_exact_continuation(arguments, tmp_path / "other")


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_ranks_from_adapters_alone(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    arguments |= {"lora": {"rank": 5, "target_modules": ["q_proj"]}}
    whole = run_ranks(f"{RUNS}:train", ranks=2, **arguments, save_at=3)[0]
    rest = run_ranks(f"{RUNS}:train", ranks=1, **arguments)[0]
    assert rest["first"] == 3
    assert rest["losses"] == pytest.approx(whole["losses"][3:], rel=1e-5)
    saved = FileSystemReader(tmp_path / "checkpoints" / "step-00000003").read_metadata().state_dict_metadata
    names = {f"layers.{n}.self_attn.q_proj.lora_{side}.default.weight" for n in range(2) for side in "AB"}
    of_model = {name for name in saved if not name.startswith("random.")}
    assert {name.removeprefix("model.lm.model.") for name in of_model if name.startswith("model.")} == names
    assert len(of_model) == len(names) * (1 + 3)  # with two moments and a count of steps


def train_and_export(mesh: Mesh, *, student: str, teacher: str, output: str, **options: Any) -> None:
    """Trains three steps, and writes both the model and the adapter after each."""
    path = Path(student)
    lora = LoraConfig.model_validate({"rank": 4, "alpha": 16, **options})
    model = build_student(path, mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32, lora=lora)
    local_teacher = LocalTeacher(Path(teacher))
    stepper = build_stepper(model, local_teacher, mesh, config=RATE, steps=3)
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None and model.adapter is not None
    exporters = (
        HuggingFaceExporter(Path(output) / "final", model, origin=path, tokenizer=tokenizer, mesh=mesh),
        AdapterExporter(Path(output) / "adapter", model, model.adapter, origin=path, mesh=mesh),
    )
    for step in range(3):
        stepper.update(step_batch(SEQUENCES, PLANS[mesh.world_size][mesh.rank], local_teacher, step=step))
        for exporter in exporters:
            exporter.export()
    release(model)
    trained = {name: whole(p, None) for name, p in model.lm.named_parameters()}
    if mesh.is_first:
        torch.save(trained, Path(output) / "trained.pt")


# peft asks transformers for a name that it will drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("is_tied", "dtype", "options"),
    [
        (True, torch.float32, {}),
        pytest.param(True, torch.float32, {"use_rslora": True}, marks=pytest.mark.slow),
        pytest.param(False, torch.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param(True, torch.float32, {"use_dora": True}, marks=pytest.mark.slow),
    ],
)
def test_the_written_model_and_the_written_adapter_are_the_trained_student(
    tiny_models: TinyModels, tmp_path: Path, is_tied: bool, dtype: torch.dtype, options: dict[str, bool]
) -> None:
    student = tiny_models.path("qwen3", seed=1, tie_word_embeddings=is_tied, dtype=dtype)
    paths = {"student": str(student), "teacher": str(tiny_models.path("qwen3", seed=2)), "output": str(tmp_path)}
    run_ranks(f"{HERE}:train_and_export", ranks=2, **paths, **options)
    trained = torch.load(tmp_path / "trained.pt")
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    for name, parameter in base.named_parameters():
        layer, _, last = name.rpartition(".")
        assert torch.equal(trained.pop(f"{layer}.base_layer.{last}" if "_proj" in layer else name), parameter)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    loaded = {name.removeprefix("base_model.model."): p for name, p in adapted.named_parameters() if "lora_" in name}
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    merged = dict(adapted.merge_and_unload().named_parameters())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    assert written.dtype == dtype
    original = dict(AutoModelForCausalLM.from_pretrained(student, dtype=dtype).named_parameters())
    for name, parameter in written.named_parameters():
        exactly = 1e-6 if dtype == torch.float32 else 2.0**-8
        assert torch.allclose(parameter.float(), merged[name], rtol=exactly, atol=1e-7), name
        assert torch.equal(parameter, original[name]) == ("_proj" not in name), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "final", "trained.pt"]


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        (("q_proj", "w_q"), "w_q is unknown; linear modules of the body: down_proj, gate_proj, k_proj"),
        (("embed_tokens",), "embed_tokens is not linear, or outside of the body; linear"),
        (("lm_head",), "lm_head is not linear, or outside of the body"),
        (("proj",), "proj is unknown"),
    ],
)
def test_a_target_that_can_have_no_adapter_is_refused_with_what_there_is(
    tiny_models: TinyModels, targets: tuple[str, ...], why: str
) -> None:
    lm = load_causal_lm(tiny_models.path(seed=1), torch.float32, torch.device("cpu"))
    with pytest.raises(ConfigError, match=f"^student.lora.target_modules: {why}"):
        add_adapter(lm, LoraConfig(target_modules=targets), seed=0)
    assert all(parameter.requires_grad for parameter in lm.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen2_moe", "all-linear"),
        ("deepseek_v3", ["q_b_proj", "o_proj"]),
        ("qwen3_5_text", "all-linear"),
        ("qwen3_5_moe_text", "all-linear"),
        ("qwen3_next", ["in_proj_qkvz", "in_proj_ba", "out_proj", "o_proj"]),
        ("olmo_hybrid", "all-linear"),
        ("granitemoehybrid", "all-linear"),
        ("nemotron_h", ["in_proj", "q_proj", "o_proj"]),
        ("falcon_h1", ["in_proj", "q_proj", "o_proj", "up_proj"]),
        ("bamba", "all-linear"),
        ("lfm2_moe", "all-linear"),
    ],
)
def test_a_mixture_or_hybrid_is_written_whole_and_as_an_adapter_that_say_the_same(
    tiny_models: TinyModels, tmp_path: Path, family: str, targets: Any
) -> None:
    student, teacher = tiny_models.path(family, seed=1), tiny_models.path("qwen3", seed=2)
    paths = {"student": str(student), "teacher": str(teacher), "output": str(tmp_path)}
    run_ranks(f"{HERE}:train_and_export", ranks=2, **paths, target_modules=targets)
    base, final = (AutoModelForCausalLM.from_pretrained(path) for path in (student, tmp_path / "final"))
    token_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before, written = base(token_ids).logits, final(token_ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(token_ids).logits
    assert (adapted - written).norm() < 1e-5 * written.norm()
    assert (written - before).norm() > 0.1 * before.norm()


_MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    ("family", "shape", "targets", "why"),
    [
        (
            "glm4_moe",
            _MIXTURE,
            "all-linear",
            "in glm4_moe peft puts no adapter on 6 .*as .k_proj, o_proj, q_proj",
        ),
        ("qwen3_next", HYBRIDS["qwen3_next"], "all-linear", "in qwen3_next peft puts no adapter on 6 .*as .in_proj_ba"),
        ("glm4_moe", _MIXTURE, ("q_proj", "gate_proj"), "Cannot convert PEFT"),
        ("nemotron_h", HYBRIDS["nemotron_h"], "all-linear", ".*'out_proj' is incompatible with Mamba.* remove it"),
        ("falcon_h1", HYBRIDS["falcon_h1"], "all-linear", ".*'out_proj' is incompatible with Mamba.* remove it"),
        ("gpt2", {}, "all-linear", "the body of gpt2 has no linear modules"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"dropout": 0.1}])
def test_a_model_that_peft_would_adapt_elsewhere_is_refused(
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    shape: dict[str, int],
    targets: Any,
    why: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.setitem(FAMILIES, family, shape)
    lm = load_causal_lm(tiny_models.path(family, seed=1), torch.float32, torch.device("cpu"))
    with pytest.raises(ConfigError, match=rf"^student\.lora.*: {why}"):
        add_adapter(lm, LoraConfig(target_modules=targets, **options), seed=0)


@pytest.mark.parametrize(
    ("family", "shape", "targets", "count"),
    [
        ("glm4_moe", _MIXTURE, _ATTENTION, 8),
        ("phimoe", {"num_local_experts": 4}, "all-linear", 8),  # its routers are linear, and give two tensors
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, "all-linear", 8),
    ],
)
def test_mixtures_learn_where_they_are_told_to(
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    shape: dict[str, int],
    targets: Any,
    count: int,
) -> None:
    monkeypatch.setitem(FAMILIES, family, shape)
    lm = load_causal_lm(tiny_models.path(family, seed=1), torch.float32, torch.device("cpu"))
    adapter = add_adapter(lm, LoraConfig(target_modules=targets), seed=0)
    assert len(adapter.layers) == count
    hidden_states_TD(lm, pack(SEQUENCES[:3])).sum().backward()
    trained = {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert all(adapter.saved_name(name) is not None for name in trained)
    assert weights_of(lm, adapter).keys() == set(AutoModelForCausalLM.from_config(lm.config).state_dict())
