"""Commands and trainers that get into guarded servers of their own processes as their configuration says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from click.testing import CliRunner

from kdmesh import config
from kdmesh.commands import cli
from kdmesh.errors import ModelMismatch, Unauthenticated
from kdmesh_trainer.builders.rollouts import _weight_sender
from kdmesh_trainer.builders.teacher import open_teacher
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sources.outage import Outage
from kdmesh_trainer.stop import StopSignals
from kdmesh_trainer.student.model import Student
from tests.support.certificates import CertificateAuthority
from tests.support.identities import JOB, OPERATOR, write_tokens
from tests.support.rollout_server import rollout_process
from tests.support.teacher_process import teacher_process
from tests.support.tiny_models import TinyModels

STUDENT = cast(Student, SimpleNamespace(size_bytes=1))
MESH = cast(Mesh, SimpleNamespace(device=torch.device("cpu"), on_first=lambda call: call()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """Servers at an address that others reach, with a fake engine, and what gets in; without a token only TLS."""

    teacher: str
    rollout: str
    access: dict[str, Path]  # files, by token


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    authority = CertificateAuthority(directory)
    pair = authority.issue("server", ["localhost"])
    server = {
        "host": "0.0.0.0",
        "tls": {"cert": str(pair.cert), "key": str(pair.key)},
        "auth": {"tokens": str(write_tokens(directory / "tokens.yaml", JOB, OPERATOR))},
    }
    access = {}
    for token in ("", JOB, OPERATOR):
        (directory / f"{token}.token").write_text(token)
        tree: dict[str, Any] = {"tls": {"ca": str(authority.cert)}}
        access[token] = directory / f"access-{token}.yaml"
        access[token].write_text(
            yaml.safe_dump(tree | ({"token_file": str(directory / f"{token}.token")} if token else {}))
        )
    with ExitStack() as stack:
        teacher = stack.enter_context(teacher_process(directory, server=server))
        rollout = stack.enter_context(rollout_process(directory, server=server))
        yield Guarded(teacher=local(teacher.grpc), rollout=local(rollout.grpc), access=access)


def local(address: str) -> str:
    return f"127.0.0.1:{address.rpartition(':')[2]}"


@pytest.mark.parametrize("command", ["probe", "generate"])
def test_a_command_gets_in_with_its_file_of_access(
    guarded: Guarded, tiny_models: TinyModels, tmp_path: Path, command: str
) -> None:
    model = str(tiny_models.path())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    arguments = {
        "probe": ["--teacher", guarded.teacher, "--model", model, "--door", "stream"],
        "generate": ["--rollout", guarded.rollout, "--model", model, "--prompts", str(prompts), "--output", "x.jsonl"],
    }[command]
    # Inside, the fake engine has another tokenizer.
    for token, words in (("", "send a bearer token"), (JOB, "tokenizer")):
        done = CliRunner().invoke(cli.main, [command, *arguments, "--access", str(guarded.access[token])])
        assert done.exit_code != 0
        assert words in done.output


def trainer(guarded: Guarded, tmp_path: Path, token: str) -> TrainerConfig:
    access = yaml.safe_load(guarded.access[token].read_text())
    rollouts = {"addresses": [guarded.rollout], "access": access, "deadline_s": 10}
    tree = {
        "output": str(tmp_path / "run"),
        "student": {"model": str(tmp_path)},
        "teacher": {"addresses": [guarded.teacher], "door": "stream", "access": access, "deadline_s": 10},
        "source": {"kind": "on_policy", "rollouts": rollouts},
        "data": {"train": {"format": "chat", "path": "x.jsonl"}},
        "steps": 1,
    }
    return config.parse(TrainerConfig, tree, source=tmp_path)


@pytest.mark.parametrize(("token", "kind"), [("", Unauthenticated), (JOB, ModelMismatch)])
def test_a_trainer_gets_into_its_teacher(guarded: Guarded, tmp_path: Path, token: str, kind: type[Exception]) -> None:
    cfg = trainer(guarded, tmp_path, token)
    with ExitStack() as stack, pytest.raises(kind):  # inside, the fake engine has another tokenizer
        open_teacher(
            cfg,
            "",
            tokenizer_fingerprint="ours",
            vocabulary_size=60,
            mesh=MESH,
            signals=StopSignals(),
            outage=Outage(),
            stack=stack,
        )


def test_a_trainer_brings_weights_with_the_access_of_its_rollout_servers(guarded: Guarded, tmp_path: Path) -> None:
    source = trainer(guarded, tmp_path, OPERATOR).source
    assert isinstance(source, OnPolicy)
    with _weight_sender(source.rollouts.addresses, source.rollouts, STUDENT, MESH) as sender:
        (served,) = sender.describe()
    assert served.version == 0
