"""A student that reads images has the textbook loss and gradient, also where one rank sees none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdmesh.models.body import load_causal_lm
from kdmesh.models.forward import hidden_states_TD
from kdmesh.types import TokenSequence
from kdmesh_trainer.builders.vision import build_packer
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.student.compiled_layers import compile_layers
from kdmesh_trainer.student.model import Student, shard
from kdmesh_trainer.student.weights import whole
from tests.support.reference_vision import hugging_face_inputs, hugging_face_model
from tests.support.row_families import ROW_FAMILIES
from tests.support.tiny_vision import TinyVisionModels, png, reader_of, vision_sequence
from tests.support.tiny_vision_tokens import VOCABULARY_SIZE
from tests.support.trainer_parts import LocalTeacher, build_stepper, step_batch
from tests.support.trainer_ranks import run_ranks

# rank -> micro-batches -> sequences; 0 and 3 have images, and the second rank sees none.
LAYOUTS = {1: [[[0, 1, 2, 3]]], 2: [[[0, 1], [3]], [[2], []]]}


def batch_sequences(path: Path) -> list[TokenSequence]:
    reader = reader_of(path)
    return [
        vision_sequence(reader, 5, png(24, 40, seed=1), 6, png(16, 16, seed=2), 9, seed=1),
        vision_sequence(reader, 11, seed=2, rows=7),
        vision_sequence(reader, 8, seed=3, rows=2),
        vision_sequence(reader, 2, png(64, 48, seed=3), 7, seed=4, rows=5),
    ]


def gradients(mesh: Mesh, *, student: str, teacher: str, output: str, gather: Gather) -> None:
    """Writes the loss and the whole gradient to `output`, of all that learns; runs on every rank."""
    path = Path(student)
    sequences, local_teacher = batch_sequences(path), LocalTeacher(Path(teacher))
    batch = step_batch(sequences, LAYOUTS[mesh.world_size][mesh.rank], local_teacher)
    for freeze_vision in (False, True):
        lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
        packer = build_packer(lm, reader_of(path), 3, freeze_vision=freeze_vision)
        model = Student(lm, vocabulary_size=VOCABULARY_SIZE, packer=packer)
        shard(model, mesh.device_mesh, compute_dtype=torch.float32, gather=gather)
        stepper = build_stepper(model, local_teacher, mesh, config=OptimizerConfig(), steps=1)
        totals, _ = stepper.accumulate(batch).over_all_ranks()
        results = {name: whole(p.grad, None) for name, p in lm.named_parameters() if p.requires_grad}
        results["loss"] = torch.tensor([totals.loss], dtype=torch.float64)
        if mesh.is_first:
            save_file(results, Path(output) / f"{mesh.world_size}-{freeze_vision}.safetensors")


def textbook(student: Path, teacher: Path) -> dict[str, Tensor]:
    """In float64: whole logits of Hugging Face's own forward, one sequence at a time."""
    model, other = (hugging_face_model(path, torch.float64) for path in (student, teacher))
    sequences = batch_sequences(student)
    loss = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        positions = torch.from_numpy(sequence.positions).long()
        inputs = hugging_face_inputs(student, sequence)
        log_q_RV = model(**inputs).logits[0, positions].log_softmax(-1)
        log_p_RV = other(**inputs).logits[0, positions].log_softmax(-1).detach()
        labels = torch.from_numpy(sequence.labels).long()
        loss = loss + (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum()
        loss = loss - 0.3 * log_q_RV.gather(1, labels[:, None]).sum()
    (loss / sum(sequence.num_rows for sequence in sequences)).backward()
    return {"loss": loss.detach()[None], **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.slow), *ROW_FAMILIES]
)
def test_images_give_the_textbook_gradient_on_one_rank_and_on_two(
    tiny_vision: TinyVisionModels, tmp_path: Path, family: str
) -> None:
    student = tiny_vision.path(family, seed=1)
    teacher = tiny_vision.path(family if family in ROW_FAMILIES else "qwen2_5_vl", seed=2)
    # What is gathered with every micro-batch hangs unless all ranks run the same layers.
    for ranks, gather in ((1, "step"), (2, "micro_batch")):
        run_ranks(
            "tests.numerics.test_trainer_vision:gradients",
            ranks=ranks,
            student=str(student),
            teacher=str(teacher),
            output=str(tmp_path),
            gather=gather,
        )
    expected = textbook(student, teacher)
    of_language = ("model.language_model.", "model.text_model.", "lm_head.", "loss")
    language = {name: value for name, value in expected.items() if name.startswith(of_language)}
    assert len(expected) > len(language) + 20
    for ranks in LAYOUTS:
        for freeze_vision, wanted in ((False, expected), (True, language)):
            actual = load_file(tmp_path / f"{ranks}-{freeze_vision}.safetensors")
            assert actual.keys() == wanted.keys()
            for name, value in wanted.items():
                # Towers have no rotary positions there, so what is added to all keys alike changes nothing.
                if name.endswith("k_proj.bias") and name not in language:
                    assert max(actual[name].norm(), value.norm()) < 1e-5, name
                    continue
                error = (actual[name] - value).norm() / value.norm()
                assert error < 1e-4, f"{ranks} ranks, frozen {freeze_vision}: {name} is off by {error}"


def gradients_of_texts(mesh: Mesh, *, student: str, output: str) -> None:
    """Writes the whole gradient to `output`, in bfloat16, with two micro-batches on each rank."""
    path = Path(student)
    sequences, teacher = [vision_sequence(reader_of(path), 11, seed=seed) for seed in range(4)], LocalTeacher(path)
    each = {1: [[0, 1], [2, 3]], 2: [[2 * mesh.rank], [2 * mesh.rank + 1]]}[mesh.world_size]
    lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
    model = Student(lm, vocabulary_size=VOCABULARY_SIZE, packer=build_packer(lm, None, 0, freeze_vision=False))
    shard(model, mesh.device_mesh, compute_dtype=torch.bfloat16, gather="step")
    stepper = build_stepper(model, teacher, mesh, config=OptimizerConfig(), steps=1)
    stepper.accumulate(step_batch(sequences, each, teacher))
    results = {name: whole(p.grad, None) for name, p in lm.named_parameters() if p.requires_grad}
    if mesh.is_first:
        save_file(results, Path(output) / f"texts-{mesh.world_size}.safetensors")


def test_a_student_that_reads_images_learns_from_texts_alone_on_ranks_that_keep_its_gradients(
    tiny_vision: TinyVisionModels, tmp_path: Path
) -> None:
    for ranks in (1, 2):
        run_ranks(
            "tests.numerics.test_trainer_vision:gradients_of_texts",
            ranks=ranks,
            student=str(tiny_vision.path(seed=1)),
            output=str(tmp_path),
        )
    expected, actual = (load_file(tmp_path / f"texts-{ranks}.safetensors") for ranks in (1, 2))
    assert actual.keys() == expected.keys()
    assert not any(".visual." in name for name in actual)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 0.05 * value.norm(), name


@pytest.mark.parametrize(("num_images", "freeze_vision"), [(0, False), (0, True), (3, False), (3, True)])
@pytest.mark.parametrize("family", ["qwen2_5_vl", *ROW_FAMILIES])
def test_a_tower_that_sees_nothing_is_frozen(
    tiny_vision: TinyVisionModels, family: str, num_images: int, freeze_vision: bool
) -> None:
    path = tiny_vision.path(family, seed=1)
    lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
    build_packer(lm, reader_of(path), num_images, freeze_vision=freeze_vision)
    language = ("model.language_model.", "model.text_model.", "lm_head.")
    parts = {name: p.requires_grad for name, p in lm.named_parameters() if not name.startswith(language)}
    if num_images > 0 and not freeze_vision:
        # Behind what is read of the tower: LLaVA's models read no norm of it, and some not its last layer.
        behind = {"llava_onevision": (".post_layernorm.",)}
        behind |= dict.fromkeys(("llava", "llava_next"), (".layers.1.", ".post_layernorm."))
        unread = {name for name in parts if any(part in name for part in behind.get(family, ()))}
        assert {name for name, is_trained in parts.items() if not is_trained} == unread
    else:
        assert not any(parts.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's compiler
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "idefics3"])
def test_compiled_layers_of_a_tower_and_its_language_model_say_what_the_others_say(
    tiny_vision: TinyVisionModels, family: str
) -> None:
    path = tiny_vision.path(family, seed=1)
    hidden = []
    for compiles in (False, True):
        lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
        packer = build_packer(lm, reader_of(path), 3, freeze_vision=False)
        if compiles:
            compile_layers(lm)
        hidden.append(hidden_states_TD(lm, packer.pack(batch_sequences(path))).detach())
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-4, atol=1e-5)
