"""Teachers that let in only who shows a token, over TLS, and secrets that change."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.certificates import CertificateAuthority, replace

_VIEWER = "token-of-a-viewer"


class Guard:
    """One authority, a certificate for all servers, and a token for each job."""

    def __init__(self, directory: Path, *jobs: str) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._authority = CertificateAuthority(directory)
        self._tokens = {job: f"first-token-of-{job}" for job in jobs}
        self._exchanges = 0
        self._issue()
        self._write_server_tokens(self._tokens)
        for job in jobs:
            self._write_token(job)

    def server(self) -> Mapping[str, Any]:
        """The section of a teacher's configuration."""
        tls = {"cert": str(self._directory / "server.crt"), "key": str(self._directory / "server.key")}
        return {"tls": tls, "auth": {"tokens": str(self._server_tokens)}}

    def access(self, job: str) -> Mapping[str, Any]:
        """What stands under `teacher.access` in a job's."""
        return {"token_file": str(self._token_file(job)), "tls": {"ca": str(self._authority.cert)}}

    def reading(self) -> Mapping[str, Any]:
        """What httpx needs to read REST."""
        context = ssl.create_default_context(cafile=str(self._authority.cert))
        return {"verify": context, "headers": {"Authorization": f"Bearer {_VIEWER}"}}

    def exchange(self) -> None:
        """Every certificate and every job's token; the old tokens count no more, and their streams end."""
        self._exchanges += 1
        self._issue()
        for job in self._tokens:
            self._tokens[job] = f"token-number-{self._exchanges}-of-{job}"
            self._write_token(job)
        self._write_server_tokens(self._tokens)

    @property
    def _server_tokens(self) -> Path:
        return self._directory / "tokens.yaml"

    def _token_file(self, job: str) -> Path:
        return self._directory / f"{job}.token"

    def _issue(self) -> None:
        self._authority.issue("server", ["localhost"])

    def _write_token(self, job: str) -> None:
        replace(self._token_file(job), self._tokens[job].encode())

    def _write_server_tokens(self, tokens: Mapping[str, str]) -> None:
        entries = [{"name": job, "role": "job", "token": token} for job, token in tokens.items()]
        entries.append({"name": "eye", "role": "viewer", "token": _VIEWER})
        replace(self._server_tokens, yaml.safe_dump({"tokens": entries}).encode())
