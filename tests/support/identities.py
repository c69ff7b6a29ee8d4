"""Files of tokens, and clients that use them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import yaml

from kdmesh.auth.config import AccessConfig
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.session_options import SessionOptions
from tests.support.certificates import replace

JOB, OTHER, OPERATOR, VIEWER = ("token-of-a-job-1", "token-of-a-job-2", "token-of-an-operator", "token-of-a-viewer")
NAMES = {JOB: ("job-one", "job"), OTHER: ("job-two", "job"), OPERATOR: ("ops", "operator"), VIEWER: ("eye", "viewer")}


def write_tokens(path: Path, *tokens: str) -> Path:
    """A server's file that knows these."""
    entries = [{"name": NAMES[token][0], "role": NAMES[token][1], "token": token} for token in tokens]
    replace(path, yaml.safe_dump({"tokens": entries}).encode())
    return path


def access_with(token: str, directory: Path) -> AccessConfig:
    """A client's access, with a token file of its own."""
    path = directory / f"{token[-12:]}.token"
    replace(path, f"{token}\n".encode())
    return AccessConfig(token_file=path)


@contextlib.asynccontextmanager
async def teacher_client(address: str, access: AccessConfig, *, job: str = "label") -> AsyncIterator[TeacherClient]:
    """A connected client that reads rows as a stream."""
    client = await TeacherClient.connect(address, SessionOptions(job=job, door="stream", access=access))
    try:
        yield client
    finally:
        await client.close()
