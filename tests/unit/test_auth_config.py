"""What configurations of identity and encryption refuse, and files that are read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kdmesh.auth.certificates import peer_names, read_certificate
from kdmesh.auth.config import AccessConfig, ServerTlsConfig
from kdmesh.auth.identity import Role, is_name
from kdmesh.auth.tokens import read_token, read_tokens
from kdmesh.auth.watched import Unreadable, Watched
from kdmesh.errors import ConfigError
from kdmesh.preflight import check
from kdmesh_rollout.config import RolloutServerConfig
from kdmesh_teacher.config import ServerConfig, TeacherConfig
from kdmesh_trainer.sections.rollouts_config import RolloutsConfig
from kdmesh_trainer.sections.teacher_config import TeacherConfig as TrainersTeacher
from tests.support.certificates import CertificateAuthority

TOKENS = {"tokens": "tokens.yaml"}
TLS = {"cert": "a.crt", "key": "a.key"}
JWT = {"issuer": "i", "audience": "a", "key": "k.pem"}


@pytest.mark.parametrize("model", [ServerConfig, RolloutServerConfig])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "teacher.example", "127.0.0.1.example"])
def test_nobody_listens_to_others_without_knowing_who_calls(
    model: type[ServerConfig] | type[RolloutServerConfig], host: str
) -> None:
    with pytest.raises(ValidationError, match=f"host {host} can be reached from other machines"):
        model.model_validate({"host": host})
    for allowed in ({"auth": TOKENS}, {"allow_anonymous": True}):
        assert model.model_validate({"host": host, **allowed}).host == host


def test_rdma_is_offered_to_others_only_in_secret() -> None:
    for open_to_all in ({"allow_anonymous": True}, {"auth": TOKENS}, {"allow_anonymous": True, "tls": TLS}):
        with pytest.raises(ValidationError, match="rdma needs auth and tls"):
            ServerConfig.model_validate({"host": "10.0.0.1", "rdma": True, **open_to_all})
    assert ServerConfig.model_validate({"host": "10.0.0.1", "rdma": True, "auth": TOKENS, "tls": TLS}).rdma
    assert ServerConfig.model_validate({"rdma": True}).rdma


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_identity(host: str) -> None:
    assert ServerConfig.model_validate({"host": host}).auth is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"auth": {}}, "none of tokens, jwt and certificates is set"),
        ({"auth": TOKENS, "allow_anonymous": True}, "contradict each other"),
        ({"auth": {"certificates": {}}}, "auth.certificates needs tls.client_ca"),
        ({"auth": {"certificates": {}}, "tls": TLS}, "auth.certificates needs tls.client_ca"),
        ({"auth": {"jwt": {**JWT, "key": None}}}, "exactly one of key, jwks and jwks_url must be set, not none"),
        (
            {"auth": {"jwt": {**JWT, "jwks": "x"}}},
            "exactly one of key, jwks and jwks_url must be set, not key and jwks",
        ),
        ({"auth": {"jwt": {**JWT, "jwks_ca": "x"}}}, "jwks_ca needs jwks_url"),
        ({"auth": {"jwt": {**JWT, "key": None, "jwks_url": "http://issuer.example/keys"}}}, "pattern"),
        ({"auth": {"jwt": {**JWT, "algorithms": ["HS256"]}}}, "RS256"),
        ({"auth": {"jwt": {**JWT, "algorithms": ["none"]}}}, "RS256"),
        ({"auth": {"jwt": {**JWT, "algorithms": []}}}, "at least 1"),
        ({"auth": {"jwt": {**JWT, "roles": {"x": "king"}}}}, "viewer"),
        ({"tls": {"cert": "a.crt"}}, "key"),
    ],
)
def test_sections_that_would_not_guard_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ServerConfig.model_validate(section)


def test_a_client_has_its_certificate_and_key_together() -> None:
    with pytest.raises(ValidationError, match="cert and key belong together"):
        AccessConfig.model_validate({"tls": {"cert": "a.crt"}})


def test_files_that_are_not_there_are_named_before_anything_starts() -> None:
    server = {"auth": {**TOKENS, "jwt": JWT}, "tls": {**TLS, "client_ca": "ca.crt"}}
    cfg = TeacherConfig.model_validate({"engine": {"kind": "fake"}, "server": server})
    keys = {"tls.cert", "tls.key", "tls.client_ca", "auth.tokens", "auth.jwt.key"}
    assert {line.split(": there is no file")[0] for line in check.missing(cfg)} == {f"server.{key}" for key in keys}


def test_each_role_may_do_all_that_the_ones_before_it_may() -> None:
    order = [Role.VIEWER, Role.JOB, Role.OPERATOR]
    for index, role in enumerate(order):
        assert [role.includes(other) for other in order] == [place <= index for place in range(3)]


SECRET = "a-secret-that-is-long-enough"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no file of tokens"),
        (f"tokens: [{{name: x, role: job, token: '{SECRET}'", "is not YAML"),
        (f"tokens: [{{name: x, role: job, token: {SECRET}, sha256: {'a' * 64}}}]", "exactly one of token and sha256"),
        ("tokens: [{name: x, role: job}]", "exactly one of token and sha256"),
        (f"tokens: [{{name: x, role: {SECRET}, token: {SECRET}}}]", "role"),
        (f"tokens: [{{name: two words, role: job, token: {SECRET}}}]", "name"),
        ("tokens: [{name: x, role: job, token: short}]", "at least 16"),
        (f"tokens: [{{name: x, role: job, token: '{SECRET} {SECRET}'}}]", "pattern"),
        (f"tokens: [{{name: x, role: job, tokens: {SECRET}}}]", "Extra"),
        (
            f"tokens: [{{name: x, role: job, token: {SECRET}}}, {{name: y, role: job, token: {SECRET}}}]",
            "y and x have the same token",
        ),
        (f"tokens: [{{name: x, role: job, role: operator, token: {SECRET}}}]", "has a key twice .line 1"),
        (f"tokens: [{{name: x, role: job, token: {SECRET}}}]\ntokens: []", "has a key twice .line 2"),
        (f"tokens: [{{name: 2026-13-01, role: job, token: {SECRET}}}]", "is not YAML"),
    ],
)
def test_a_file_of_tokens_is_refused_without_a_word_of_its_secrets(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as refusal:
        read_tokens(path)
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize("data", [b"", b"\n", b"two tokens", b"one\ntwo", b"\xff\xfe"])
def test_a_clients_file_holds_one_token(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "mine.token"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="must hold one token and nothing else"):
        read_token(path)


def test_a_file_is_read_when_it_has_changed_and_only_then(tmp_path: Path) -> None:
    path, reads, failures = tmp_path / "file", [], []
    path.write_text("1")

    def read() -> str:
        reads.append(1)
        if (text := path.read_text()) == "bad":
            raise ConfigError("bad")
        return text

    watched = Watched((path,), read, on_failure=lambda: failures.append(1))
    assert [watched.current() for _ in range(3)] == ["1"] * 3
    path.write_text("22")
    assert [watched.current() for _ in range(3)] == ["22"] * 3
    path.write_text("bad")
    assert [watched.current() for _ in range(3)] == ["22"] * 3
    assert (len(reads), len(failures)) == (3, 1)
    path.write_text("4444")
    assert watched.current() == "4444"


def test_a_change_that_could_not_be_read_is_read_again_and_told_once(tmp_path: Path) -> None:
    path, reads, failures = tmp_path / "file", [], []
    now_s = 0.0
    is_readable = True
    path.write_text("1")

    def read() -> str:
        reads.append(1)
        if not is_readable:  # as when a process has too many files open
            raise Unreadable("too many open files")
        return path.read_text()

    watched = Watched((path,), read, on_failure=lambda: failures.append(1), clock=lambda: now_s)
    path.write_text("22")
    is_readable = False
    assert [watched.current() for _ in range(3)] == ["1"] * 3
    now_s = 1.0
    assert watched.current() == "1"
    assert (len(reads), len(failures)) == (3, 1)
    is_readable = True
    assert watched.current() == "1"
    now_s = 2.0
    assert [watched.current() for _ in range(3)] == ["22"] * 3
    assert (len(reads), len(failures)) == (4, 1)


def test_files_that_cannot_be_read_are_told_from_those_that_say_nonsense(tmp_path: Path) -> None:
    with pytest.raises(Unreadable):
        read_tokens(tmp_path / "gone.yaml")
    with pytest.raises(Unreadable):
        read_certificate(ServerTlsConfig(cert=tmp_path / "gone.pem", key=tmp_path / "gone.key"))


def test_a_certificate_of_a_kind_that_only_openssl_reads_is_refused(tmp_path: Path) -> None:
    pair = CertificateAuthority(tmp_path).issue("teacher")
    pair.cert.write_bytes(pair.cert.read_bytes().replace(b" CERTIFICATE", b" TRUSTED CERTIFICATE"))
    with pytest.raises(ConfigError, match="holds no BEGIN CERTIFICATE"):
        read_certificate(ServerTlsConfig(cert=pair.cert, key=pair.key))


def test_servers_that_are_found_by_name_are_known_by_one() -> None:
    section = {"addresses": ["dns:///teachers.example:50051"], "access": {"tls": {}}}
    with pytest.raises(ValidationError, match="tls needs server_name"):
        TrainersTeacher.model_validate(section)
    TrainersTeacher.model_validate({**section, "access": {"tls": {"server_name": "teachers.example"}}})
    with pytest.raises(ValidationError, match="tls needs server_name"):
        RolloutsConfig.model_validate(section)
    RolloutsConfig.model_validate({**section, "access": {"tls": {"server_name": "teachers.example"}}})


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("dns:///localhost:1", True),
        ("dns:///far.example:1", False),
        ("1.2.3.4:1", False),
    ],
)
def test_a_token_in_the_clear_stays_on_this_machine(address: str, is_local: bool) -> None:
    assert (AccessConfig(token_file=Path("x")).refusal(address) is None) is is_local
    assert AccessConfig(token_file=Path("x"), plaintext_token=True).refusal(address) is None
    assert AccessConfig().refusal(address) is None


@pytest.mark.parametrize(
    "text", ["distil-7b", "system:serviceaccount:research:distil", "a", "spiffe://x/job", "x" * 128]
)
def test_a_name_is_what_logs_and_metrics_can_show(text: str) -> None:
    assert is_name(text)


@pytest.mark.parametrize("text", ["", "two words", "-x", "x\n", "ä", "*.example", "x" * 129])
def test_anything_else_is_no_name(text: str) -> None:
    assert not is_name(text)


def test_a_certificate_may_name_more_than_names() -> None:
    directory = ("DirName", ((("commonName", "somebody"),),))
    told = {"subjectAltName": (directory, ("DNS", "job-one")), "subject": ((("commonName", "common"),),)}
    assert peer_names(told) == ("job-one", "common")
