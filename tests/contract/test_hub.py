"""What `hf://` names in a configuration comes from the hub once, whole, and stays what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from kdmesh import config
from kdmesh.commands.model_directory import ModelDirectory
from kdmesh.config import StrictModel
from kdmesh.errors import ConfigError
from kdmesh.hub import HubPath
from kdmesh.preflight import check
from tests.support.hub import Repository, hub
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import write_chats

MODEL = Repository(
    name="someone/student",
    commit="1" * 40,
    files={
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "consolidated.safetensors": b"the same weights",
        "pytorch_model.bin": b"and again",
        "onnx/model.json": b"{}",
    },
)
DATA = Repository(
    name="someone/chats",
    commit="2" * 40,
    files={
        "README.md": b"# chats",
        "main/train.jsonl": b"{}\n",
        "main/test.jsonl": b"{}\n",
        "other/train.jsonl": b"{}\n",
    },
    is_dataset=True,
)


class Section(StrictModel):
    """Some of what names files."""

    model: Path | None = None
    path: Path | None = None
    several: tuple[Path, ...] = ()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def hub_of(monkeypatch: pytest.MonkeyPatch, *repositories: Repository) -> Iterator[list[str]]:
    with hub(*repositories) as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield asked


def local(**tree: object) -> Section:
    return config.parse(Section, dict(tree), source=Path("my.yaml"))


def names_in(directory: Path | None) -> set[str]:
    assert directory is not None
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hf://a/b", HubPath(repository="a/b", is_dataset=False, revision=None, inside="")),
        ("hf://a/b/", HubPath(repository="a/b", is_dataset=False, revision=None, inside="")),
        ("hf://a/b.c-1@v1.0/x/y", HubPath(repository="a/b.c-1", is_dataset=False, revision="v1.0", inside="x/y")),
        ("hf://datasets/a/b/t.csv", HubPath(repository="a/b", is_dataset=True, revision=None, inside="t.csv")),
        (
            "hf://datasets/a/b@refs/convert/parquet/default/train",
            HubPath(repository="a/b", is_dataset=True, revision="refs/convert/parquet", inside="default/train"),
        ),
        ("hf://a/b@refs/pr/7", HubPath(repository="a/b", is_dataset=False, revision="refs/pr/7", inside="")),
        ("hf://datasets/a/b@main", HubPath(repository="a/b", is_dataset=True, revision="main", inside="")),
    ],
)
def test_names_on_the_hub(text: str, told: HubPath) -> None:
    assert HubPath.parse(text) == told


@pytest.mark.parametrize("text", ["hf://", "hf://a", "hf://a/b@", "hf://a/b/../c", "hf://a b/c", "hf://datasets/a"])
def test_what_names_nothing_there_is_refused_before_anything_is_asked(text: str, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"path: hf://.* is neither hf://OWNER/MODEL"):
        local(path=text)


def test_a_model_comes_once_and_without_what_nobody_reads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of(monkeypatch, MODEL) as asked:
        model = local(model="hf://someone/student").model
        assert names_in(model) == {"config.json", "model.safetensors", "tokenizer.json"}
        asked.clear()
        assert local(model="hf://someone/student").model == model
        assert local(model=f"hf://someone/student@{MODEL.commit}").model == model
        assert asked == []


def test_a_tokenizer_comes_without_weights_and_does_not_pass_for_a_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_of(monkeypatch, MODEL):
        assert names_in(local(path="hf://someone/student").path) == {"config.json", "tokenizer.json"}
        assert "model.safetensors" in names_in(local(model="hf://someone/student").model)


def test_a_branch_stays_where_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of(monkeypatch, MODEL):
        first = local(model="hf://someone/student").model
    moved = replace(MODEL, commit="3" * 40)
    with hub_of(monkeypatch, moved):
        assert local(model="hf://someone/student").model == first
        other = local(model=f"hf://someone/student@{moved.commit}").model
        assert other is not None and other.name == moved.commit


def test_another_part_is_of_the_commit_of_the_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of(monkeypatch, MODEL):
        tokenizer = local(path="hf://someone/student").path
    moved = replace(MODEL, commit="3" * 40)
    with hub_of(monkeypatch, moved, MODEL):  # commits stay there
        assert local(model="hf://someone/student").model == tokenizer


def test_what_the_hub_made_of_a_dataset(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = replace(DATA, branch="refs/convert/parquet", files={"default/train/0000.parquet": b"PAR1"})
    with hub_of(monkeypatch, rows) as asked:
        made = local(path="hf://datasets/someone/chats@refs/convert/parquet/default/train").path
        assert names_in(made) == {"0000.parquet"}
        asked.clear()
        assert local(path="hf://datasets/someone/chats@refs/convert/parquet/default/train").path == made
        assert asked == []


def test_files_and_directories_of_datasets(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of(monkeypatch, DATA):
        made = local(several=["hf://datasets/someone/chats/main/test.jsonl", "hf://datasets/someone/chats/main"])
        file, directory = made.several
        assert file.read_bytes() == b"{}\n"
        assert names_in(directory) == {"train.jsonl", "test.jsonl"}
        with pytest.raises(ConfigError, match=r"several\.0: someone/chats has no side that kdmesh reads"):
            local(several=["hf://datasets/someone/chats/side"])


def test_a_dataset_without_a_file_at_its_top(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        hub_of(monkeypatch, DATA),
        pytest.raises(ConfigError, match="someone/chats has no file at its top that kdmesh"),
    ):
        local(path="hf://datasets/someone/chats")


def test_what_came_in_part_is_fetched_to_its_end(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = replace(MODEL, files={"config.json": b"{}", "tokenizer.json": b"{}"}, listed=tuple(MODEL.files))
    with hub_of(monkeypatch, cut), pytest.raises(ConfigError, match=r"model: someone/student could not be fetched"):
        local(model="hf://someone/student")
    with pytest.raises(ConfigError, match=r"model: someone/student could not be fetched"):  # nobody answers there
        local(model="hf://someone/student")
    with hub_of(monkeypatch, MODEL):
        assert "model.safetensors" in names_in(local(model="hf://someone/student").model)


@pytest.mark.parametrize(
    ("repository", "text", "said"),
    [
        (
            MODEL,
            "hf://someone/else",
            r"the hub has no model someone/else, or none that you may read \(`hf auth login`\)",
        ),
        (MODEL, "hf://datasets/a/b/c", r"the hub has no dataset a/b, or none that you may read"),
        (MODEL, "hf://someone/student@v7", r"someone/student has no revision v7"),
        (
            replace(MODEL, is_gated=True),
            "hf://someone/student",
            r"agreed to its terms: .*/someone/student, then `hf auth",
        ),
    ],
)
def test_refusals_of_the_hub(
    repository: Repository, text: str, said: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_of(monkeypatch, repository), pytest.raises(ConfigError, match=rf"^model: .*{said}"):
        local(model=text)


def test_nothing_is_fetched_for_a_configuration_that_is_bad(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of(monkeypatch, MODEL) as asked, pytest.raises(ConfigError, match="modle"):
        local(model="hf://someone/student", modle=1)
    assert asked == []


def test_check_says_what_is_still_to_be_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(job(tmp_path / "run", "hf://someone/student", "hf://datasets/a/b@v1/train.jsonl")))
    with hub_of(monkeypatch, MODEL) as asked:
        cfg = check.load_any(file)
        missing = check.missing(cfg)
    assert asked == []
    assert [line for line in missing if "hub" in line] == [
        "student.model: someone/student has not been fetched from the hub yet: training or serving does so, or "
        "`hf download someone/student`",
        "data.train.path: a/b has not been fetched from the hub yet: training or serving does so, or "
        "`hf download a/b --repo-type dataset --revision v1`",
    ]


def test_commands_take_models_of_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of(monkeypatch, MODEL):
        tokenizer = ModelDirectory(with_weights=False).convert("hf://someone/student", None, None)
        assert names_in(tokenizer) == {"config.json", "tokenizer.json"}
        model = ModelDirectory(with_weights=True).convert("hf://someone/student", None, None)
        assert names_in(model) == {"config.json", "tokenizer.json", "model.safetensors"}
        with pytest.raises(ConfigError, match="the hub has no model someone/else"):
            ModelDirectory(with_weights=False).convert("hf://someone/else", None, None)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("models/student", "OWNER/MODEL"),
        ("mine/student", "OWNER/MODEL"),
        ("a/b/c", "OWNER/MODEL"),
    ],
)
def test_a_name_without_its_beginning_is_guessed_and_a_path_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(job(tmp_path / "run", written, "train.jsonl")))
    assert check.missing(check.load_any(file))[0] == (
        f"student.model: there is no directory {written} "
        f"(a model is a Hugging Face directory, or on the hub hf://{meant})"
    )


def test_a_job_trains_a_student_of_the_hub_on_its_data(tiny_models: TinyModels, tmp_path: Path) -> None:
    """As a person begins it; afterwards all is here."""
    student = tiny_models.path("qwen3", seed=1)
    rows = write_chats(tmp_path / "chats.jsonl", 8, seed=1).read_bytes()
    model = Repository(
        name="someone/student", commit="4" * 40, files={file.name: file.read_bytes() for file in student.iterdir()}
    )
    file, output = tmp_path / "my.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(job(output, "hf://someone/student", "hf://datasets/someone/chats/train.jsonl")))
    with hub(model, replace(DATA, files={"train.jsonl": rows})) as (address, asked):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        done = kdmesh("check", file, environment)
        assert done.returncode == 2
        assert "student.model: someone/student has not been fetched from the hub yet" in done.stderr
        assert asked == []
        done = kdmesh("train", file, environment)
        assert done.returncode == 0, done.stderr
    assert (output / "final" / "model.safetensors").is_file()
    (start,) = [json.loads(line) for line in (output / "starts.jsonl").read_text("utf-8").splitlines()]
    assert f"snapshots/{model.commit}" in start["config"]["student"]["model"]
    assert kdmesh("check", file, environment).returncode == 0  # without a hub


def job(output: Path, student: str, train: str) -> dict[str, object]:
    return {
        "output": str(output),
        "student": {"model": student, "device": "cpu"},
        "objective": {"name": "sft"},
        "data": {"train": {"format": "chat", "path": train}, "max_tokens": 96},
        "batch": {"sequences": 4, "max_tokens": 128},
        "optimizer": {"learning_rate": 0.001, "schedule": "constant"},
        "steps": 2,
    }


def kdmesh(command: str, file: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("kdmesh")
    return subprocess.run(
        [program, command, file], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
