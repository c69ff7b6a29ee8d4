"""`kdmesh generate` over prompts with images, from a rollout server and from a teacher of the same model."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from kdmesh.commands import cli
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile, ImagesConfig
from tests.support.copies import serving
from tests.support.teacher_process import TeacherProcess, await_ready
from tests.support.tiny_vision import TinyVisionModels, png, save_image_processor

PICTURES = {"one.png": png(40, 24, seed=1), "two.png": png(40, 24, seed=2)}


@pytest.fixture(scope="module")
def model(tiny_vision: TinyVisionModels) -> Path:
    return tiny_vision.path()


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TeacherProcess]]:
    """By the option that names each."""
    engine = {"kind": "transformers", "model": str(model), "device": "cpu", "deterministic": True, "threads": 1}
    trees: dict[str, tuple[str, dict[str, Any]]] = {
        "--teacher": ("kdmesh_teacher", {"engine": engine, "slab": {"slots": 4, "slot_mib": 1}}),
        "--rollout": ("kdmesh_rollout", {"engine": engine}),
    }
    with ExitStack() as stack:
        processes = {}
        for option, (package, tree) in trees.items():
            directory = tmp_path_factory.mktemp(package)
            path = directory / "server.yaml"
            path.write_text(yaml.safe_dump(tree | {"server": {"port": 0, "rest_port": 0, "drain_s": 5}}))
            processes[option] = stack.enter_context(serving(package, path))
        yield {option: await_ready(process) for option, process in processes.items()}
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def write(directory: Path, *rows: dict[str, Any]) -> Path:
    for name, data in PICTURES.items():
        (directory / name).write_bytes(data)
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}


def run(prompts: Path, model: Path, output: Path, *arguments: str) -> Result:
    where = ("--model", str(model), "--prompts", str(prompts), "--output", str(output))
    how = ("--temperature", "0", "--max-new-tokens", "8", "--keep-cut-off")
    return CliRunner().invoke(cli.main, ["generate", *where, *how, *arguments])


def test_answers_to_images_are_a_dataset_that_a_trainer_reads(
    servers: dict[str, TeacherProcess], model: Path, tmp_path: Path
) -> None:
    inline = f"data:image/png;base64,{base64.b64encode(PICTURES['one.png']).decode()}"
    rows = [
        {"messages": [asked({"type": "image", "image": "one.png"}), {"role": "assistant", "content": "forget this"}]},
        {"messages": [asked({"type": "image", "image": "two.png"})]},
        {"messages": [asked({"type": "image"})], "images": ["one.png"]},
        {"messages": [asked({"type": "image_url", "image_url": {"url": inline}})]},
        {"prompt": "and without?"},
    ]
    prompts = write(tmp_path, *rows)
    written = {}
    for option, server in servers.items():
        output = tmp_path / f"{option[2:]}.jsonl"
        result = run(prompts, model, output, option, server.grpc)
        assert result.exit_code == 0, result.output
        written[option] = [json.loads(line) for line in output.read_text().splitlines()]
    assert written["--rollout"] == written["--teacher"]
    answers = [row["messages"][-1]["content"] for row in written["--rollout"]]
    assert answers[0] == answers[2] == answers[3] != answers[1]
    assert [row["messages"][:-1] for row in written["--rollout"]] == [
        *([row["messages"][0]] for row in rows[:4]),
        [{"role": "user", "content": "and without?"}],
    ]
    assert written["--rollout"][2]["images"] == ["one.png"]
    chats = list(open_dataset(ChatFile(path=tmp_path / "rollout.jsonl"), images=ImagesConfig())())
    assert [len(chat.messages[0].images) for chat in chats] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("part", "more", "words"),
    [
        ({"type": "image", "image": "absent.png"}, {}, "line 1: messages[0].content[0]: cannot read the image"),
        ({"type": "image", "image": "../one.png"}, {}, "--image-root may name another directory"),
        ({"type": "image", "image": "http://127.0.0.1/one.png"}, {}, "is on the web, and nothing is fetched here"),
        ({"type": "image"}, {}, "names no image, and the row has 0"),
        ({"type": "text", "text": "none"}, {"images": ["one.png"]}, "images holds 1 images, and the messages have 0"),
    ],
)
def test_an_image_that_is_not_to_be_had_is_named_and_nothing_is_written(
    servers: dict[str, TeacherProcess], model: Path, tmp_path: Path, part: Any, more: Any, words: str
) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    prompts = write(directory, {"messages": [asked(part)], **more})
    result = run(prompts, model, tmp_path / "answers.jsonl", "--rollout", servers["--rollout"].grpc)
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "answers.jsonl").exists()


def test_paths_may_begin_elsewhere(servers: dict[str, TeacherProcess], model: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    write(pictures)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [asked({"type": "image", "image": "one.png"})]}) + "\n")
    where = ("--rollout", servers["--rollout"].grpc)
    assert run(prompts, model, tmp_path / "answers.jsonl", *where).exit_code == 2
    assert run(prompts, model, tmp_path / "answers.jsonl", *where, "--image-root", str(pictures)).exit_code == 0


def test_a_model_that_reads_them_otherwise_or_not_at_all_is_refused(
    servers: dict[str, TeacherProcess],
    tiny_vision: TinyVisionModels,
    tmp_path: Path,
) -> None:
    where = ("--rollout", servers["--rollout"].grpc)
    prompts = write(tmp_path, {"messages": [asked({"type": "image", "image": "one.png"})]})
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_vision.path().iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_image_processor(other, max_pixels=1024)
    result = run(prompts, other, tmp_path / "answers.jsonl", *where)
    assert result.exit_code == 2
    assert "make different numbers of tokens of an image" in result.output
    for name in ("preprocessor_config.json", "processor_config.json"):
        (other / name).unlink(missing_ok=True)
    result = run(prompts, other, tmp_path / "answers.jsonl", *where)
    assert result.exit_code == 2
    assert "read text alone" in result.output
