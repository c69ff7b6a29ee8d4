"""Jobs on data with images, with the real services: one of them while its teacher is killed."""

from __future__ import annotations

import json
import random
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.support.reference_vision import hugging_face_vision_rows
from tests.support.tiny_models import save_model
from tests.support.tiny_vision import TinyVisionModels, png, reader_of, vision_sequence
from tests.support.tiny_vision_tokens import save_tokenizer
from tests.system.processes import Process, Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job, Recipe

pytestmark = pytest.mark.slow

_WORDS = ("the", "quick", "brown fox", "jumps", "over", "lazy", "dog and", "returns", "a value", "when", "it is asked")


def write_pictures(directory: Path, name: str, count: int, *, seed: int) -> None:
    """Chats in `name`.jsonl, two of three about one picture or two of different sizes, which lie beside them."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        parts: list[dict[str, str]] = [{"type": "text", "text": " ".join(draw.choices(_WORDS, k=4))}]
        for index in range(number % 3):
            picture = f"{name}-{number}-{index}.png"
            size = draw.choice([(16, 24), (40, 24), (32, 32)])
            (directory / picture).write_bytes(png(*size, seed=1000 * seed + 3 * number + index))
            parts.insert(0, {"type": "image", "image": picture})
        answer = " ".join(draw.choices(_WORDS, k=draw.randint(1, 8)))
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages}))
    (directory / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Jobs of one recipe."""

    student: Path
    undisturbed: Job
    disturbed: Job  # its teacher was killed after some steps, and started again
    sampled: Job  # learns from responses to images that its student drew
    refused: dict[str, Process]  # by who reads text alone


@pytest.fixture(scope="module")
def story(
    tiny_vision: TinyVisionModels,
    processes: Processes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Story:
    root = tmp_path_factory.mktemp("vision")
    write_pictures(root, "train", 24, seed=1)
    write_pictures(root, "held_out", 6, seed=2)
    recipe = Recipe(
        student=tiny_vision.path(seed=1), data=root, objective={"divergence": {"name": "forward_kl"}}, is_judged=True
    )
    blind = root / "blind"
    save_model(blind, "qwen3", seed=3, dtype=torch.float32)
    save_tokenizer(blind)
    blind_teacher = Teacher(processes, root / "blind-teacher", blind)
    teachers = [Teacher(processes, root / name, tiny_vision.path(seed=2)) for name in ("teacher", "killed")]
    jobs = [
        Job(processes, root / name, recipe, teacher.address)
        for name, teacher in zip(("undisturbed", "disturbed"), teachers, strict=True)
    ]
    rollouts = Rollouts(processes, root / "rollouts", recipe.student)
    source = {
        "kind": "on_policy",
        "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 12},
    }
    sampled = Job(processes, root / "sampled", recipe, teachers[0].address, steps=8, source=source)
    refused = {
        "teacher": Job(processes, root / "blind-1", recipe, blind_teacher.address),
        "student": Job(processes, root / "blind-2", replace(recipe, student=blind), teachers[0].address),
    }
    for server in (blind_teacher, *teachers, rollouts):
        server.start()
    running, other = (job.start() for job in jobs)
    other.until(lambda: len(jobs[1].steps()) >= 4)
    teachers[1].process.signal(signal.SIGKILL)
    teachers[1].process.exit_code()
    teachers[1].start()
    for process in (running, other, sampled.start()):
        process.succeed()
    ended = {name: job.start() for name, job in refused.items()}
    return Story(student=recipe.student, undisturbed=jobs[0], disturbed=jobs[1], sampled=sampled, refused=ended)


def test_held_out_distance_to_the_teacher_falls(story: Story) -> None:
    scores = [line["kl_nats_per_token"] for line in story.undisturbed.lines() if line["kind"] == "evaluation"]
    assert scores[-1] < 0.7 * scores[0]


def test_a_teacher_that_lost_its_images_gets_them_again_and_nothing_changes(story: Story) -> None:
    assert len(story.undisturbed.steps()) == 16
    assert story.disturbed.record() == story.undisturbed.record()


def test_responses_to_images_are_drawn_from_the_student_and_bring_it_nearer(story: Story) -> None:
    assert len(story.sampled.steps()) == 8
    for step in story.sampled.steps():
        assert abs(step["sampler_kl_k1_nats"]) < 1e-4
    scores = [line["kl_nats_per_token"] for line in story.sampled.lines() if line["kind"] == "evaluation"]
    assert scores[-1] < 0.9 * scores[0]


@pytest.mark.parametrize(
    ("who", "sentence"),
    [
        ("teacher", r"dataset train has 24 images, and teacher blind reads none: it needs a model that does, .*"),
        ("student", r"/\S+/train\.jsonl:2: messages\[0\]\.content\[0\] is an image, and the student reads text .*"),
    ],
)
def test_who_reads_text_alone_is_refused_in_one_sentence(story: Story, who: str, sentence: str) -> None:
    process = story.refused[who]
    assert process.exit_code() == 2
    (said,) = process.words()
    assert re.fullmatch(f"Error: {sentence}", said)


def test_the_trained_model_reads_images_as_it_was_left(story: Story) -> None:
    final = story.undisturbed.output / "final"
    sequences = [vision_sequence(reader_of(final), 5, png(24, 40, seed=1), 9, seed=1)]
    trained_RD = hugging_face_vision_rows(final, sequences)
    assert not torch.allclose(trained_RD, hugging_face_vision_rows(story.student, sequences), atol=0.1)
