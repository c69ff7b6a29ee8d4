"""Students whose layers carry a state from token to token are trained, kept, adapted and written as others are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.packing import pack
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh_trainer.builders.context import refuse_unfit_student
from kdmesh_trainer.builders.student import check_speed
from kdmesh_trainer.builders.vision import build_packer
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.student.lora import add_adapter
from kdmesh_trainer.student.model import Student, shard
from kdmesh_trainer.student.weights import weights_of
from tests.support.reference_vision import hugging_face_inputs, hugging_face_model
from tests.support.tiny_models import HYBRIDS, TinyModels
from tests.support.tiny_vision import TinyVisionModels, png, reader_of, vision_sequence
from tests.support.tiny_vision_tokens import VOCABULARY_SIZE as VISION_VOCABULARY_SIZE
from tests.support.trainer_parts import LocalTeacher, build_stepper, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

HERE = "tests.numerics.test_trainer_hybrids"
RUNS = "tests.support.trainer_runs"
MIXER = "model.layers.0.linear_attn"
MIXERS = (MIXER, "model.layers.0.mamba", "model.layers.0.mixer", "model.layers.0.conv")
_NAMED = ("in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj")
_WITHOUT_OUTPUTS = ("in_proj", "q_proj", "k_proj", "v_proj", "o_proj")  # of Mamba-2, which peft refuses


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_5_text", {"checkpointed_every": 1, "offloads": True}),
        pytest.param("qwen3_5_text", {"frozen": [MIXER]}, marks=pytest.mark.slow),
        pytest.param(
            "qwen3_next", {"lora": {"rank": 4, "dropout": 0.1, "target_modules": _NAMED}}, marks=pytest.mark.slow
        ),
        pytest.param("qwen3_5_moe_text", {"spreads_head": True}, marks=pytest.mark.slow),
        pytest.param("olmo_hybrid", {"checkpointed_every": 2}, marks=pytest.mark.slow),
        ("nemotron_h", {"checkpointed_every": 1, "offloads": True}),
        pytest.param("granitemoehybrid", {"checkpointed_every": 1, "offloads": True}, marks=pytest.mark.slow),
        pytest.param("falcon_h1", {"checkpointed_every": 1, "offloads": True}, marks=pytest.mark.slow),
        pytest.param("bamba", {"lora": {"rank": 4, "dropout": 0.1}}, marks=pytest.mark.slow),
        pytest.param("lfm2", {"checkpointed_every": 2, "offloads": True}, marks=pytest.mark.slow),
        pytest.param("lfm2_moe", {"spreads_head": True}, marks=pytest.mark.slow),
        pytest.param("lfm3", {"checkpointed_every": 1, "offloads": True}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_goes_on_has_exactly_the_losses_of_one_that_was_not_interrupted(
    tiny_models: TinyModels, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    arguments = {
        "student": str(tiny_models.path(family, seed=1)),
        "teacher": str(tiny_models.path("qwen3", seed=2)),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": 4,
        "compute_dtype": "bfloat16",
        **options,
    }
    run_ranks(f"{RUNS}:train", ranks=2, **arguments, until=2, save_at=2)
    both = run_ranks(f"{RUNS}:train_rest_and_whole", ranks=2, **arguments, until=4, other=str(tmp_path / "other"))[0]
    assert both["first"] == 2
    assert both["rest"] == both["whole"][2:]


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3_5_text", "all-linear"),
        ("qwen3_5_moe_text", "all-linear"),
        ("qwen3_next", _NAMED),  # all-linear is refused, as of other models with routed and shared experts
        ("olmo_hybrid", "all-linear"),
        ("granitemoehybrid", "all-linear"),
        ("nemotron_h", _WITHOUT_OUTPUTS),
        ("falcon_h1", _WITHOUT_OUTPUTS),
        ("bamba", "all-linear"),
        ("lfm2", "all-linear"),
        ("lfm2_moe", "all-linear"),
        ("lfm3", "all-linear"),
    ],
)
def test_projections_of_recurrent_layers_have_adapters_that_learn(
    tiny_models: TinyModels, family: str, targets: Any
) -> None:
    lm = load_causal_lm(tiny_models.path(family, seed=1), torch.float32, torch.device("cpu"))
    packed = pack(random_sequences(3, seed=5, vocabulary_size=310))
    before_TD = hidden_states_TD(lm, packed).detach()
    adapter = add_adapter(lm, LoraConfig(target_modules=targets), seed=0)
    assert torch.equal(hidden_states_TD(lm, packed), before_TD)
    linear = {
        name.removesuffix(".weight")
        for name, tensor in lm.state_dict().items()
        if name.startswith(MIXERS) and tensor.dim() == 2 and "lora" not in name
    }
    if targets == _WITHOUT_OUTPUTS:
        linear = {name for name in linear if "out_proj" not in name}
    assert linear
    assert {name.removesuffix(".base_layer") for name in linear} <= set(adapter.layers)
    hidden_states_TD(lm, packed).sum().backward()
    trained = {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert all(adapter.saved_name(name) is not None for name in trained)
    assert weights_of(lm, adapter).keys() == set(AutoModelForCausalLM.from_config(lm.config).state_dict())


def test_an_adapter_of_a_convolution_is_refused(tiny_models: TinyModels) -> None:
    lm = load_causal_lm(tiny_models.path("qwen3_5_text"), torch.float32, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"conv1d is not linear, .*: down_proj, gate_proj, in_proj_a"):
        add_adapter(lm, LoraConfig(target_modules=("conv1d",)), seed=0)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"student": {"compile": "layers"}}, "student.compile layers"),
        ({"student": {"liger_kernels": True}}, "student.liger_kernels"),
        ({"parallel": {"context": 2}}, "parallel.context is 2"),
    ],
)
@pytest.mark.parametrize("family", HYBRIDS)
def test_what_does_not_go_with_a_state_is_refused_before_anything_loads(
    tiny_models: TinyModels, family: str, section: dict[str, Any], key: str
) -> None:
    tree: dict[str, Any] = {
        "output": "run",
        "teacher": {"addresses": ["127.0.0.1:1"]},
        "data": {"train": {"format": "chat", "path": "train.jsonl"}},
        "steps": 1,
        **section,
    }
    tree["student"] = {"model": tiny_models.path(family), **section.get("student", {})}
    cfg = TrainerConfig.model_validate(tree)
    with pytest.raises(ConfigError, match=rf"^{key} .* layers that carry a state from token to token"):
        refuse_unfit_student(cfg)
        check_speed(cfg)


def test_a_directory_that_reads_images_is_trained_on_texts_and_written_whole_without_what_predicts_ahead(
    tiny_vision: TinyVisionModels, tmp_path: Path
) -> None:
    origin = shutil.copytree(tiny_vision.path("qwen3_5", dtype=torch.bfloat16), tmp_path / "origin")
    own = load_file(origin / "model.safetensors")
    save_file(own | {"mtp.fc.weight": torch.randn(8, 8)}, origin / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "final"
    run_ranks(f"{HERE}:train_on_texts", ranks=2, student=str(origin), output=str(output))
    before, after = (hugging_face_model(path, torch.float32) for path in (origin, output))
    written = load_file(output / "model.safetensors")
    assert written.keys() == own.keys()
    learnt = {name for name, tensor in written.items() if not torch.equal(tensor, own[name])}
    assert any("linear_attn" in name for name in learnt) and not any("visual" in name for name in learnt)
    inputs = hugging_face_inputs(origin, vision_sequence(reader_of(origin), 5, png(24, 40, seed=1), 9, seed=1))
    with torch.no_grad():
        assert not torch.equal(before(**inputs).logits, after(**inputs).logits)
    assert (output / "preprocessor_config.json").is_file()


def test_files_with_a_layers_experts_in_two_tensors_and_decays_in_float32_are_written_so(
    tiny_vision: TinyVisionModels, tmp_path: Path
) -> None:
    origin = shutil.copytree(tiny_vision.path("qwen3_5_moe", dtype=torch.bfloat16), tmp_path / "origin")
    own = AutoModelForImageTextToText.from_pretrained(origin).state_dict()
    own = {name: tensor.float() if "A_log" in name else tensor for name, tensor in own.items()}
    own["model.language_model.layers.0.linear_attn.A_log"] += 1e-4  # which bfloat16 has not
    save_file(own, origin / "model.safetensors", metadata={"format": "pt"})
    lm = load_causal_lm(origin, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(origin)
    assert tokenizer is not None
    with joined("cpu", longest_wait_s=60) as mesh:
        student = Student(lm, vocabulary_size=VISION_VOCABULARY_SIZE)
        HuggingFaceExporter(tmp_path / "final", student, origin=origin, tokenizer=tokenizer, mesh=mesh).export()
    written = load_file(tmp_path / "final" / "model.safetensors")
    assert written.keys() == own.keys()
    assert sum(name.endswith(".experts.gate_up_proj") for name in written) == 2
    for name, tensor in written.items():
        assert tensor.dtype == own[name].dtype and torch.equal(tensor, own[name]), name


def train_on_texts(mesh: Mesh, *, student: str, output: str) -> None:
    """One step, and the model written to `output`; runs on every rank."""
    path = Path(student)
    lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
    packer = build_packer(lm, reader_of(path), 0, freeze_vision=False)
    model = Student(lm, vocabulary_size=VISION_VOCABULARY_SIZE, packer=packer)
    shard(model, mesh.device_mesh, compute_dtype=torch.float32)
    teacher = LocalTeacher(path)
    stepper = build_stepper(model, teacher, mesh, config=OptimizerConfig(learning_rate=1e-2), steps=1)
    sequences = random_sequences(4, seed=5, vocabulary_size=VISION_VOCABULARY_SIZE)
    stepper.update(step_batch(sequences, [[[0, 1]], [[2, 3]]][mesh.rank], teacher))
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    HuggingFaceExporter(Path(output), model, origin=path, tokenizer=tokenizer, mesh=mesh).export()
