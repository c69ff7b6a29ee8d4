"""TLS: the server's certificate, also when it changes, and clients that are known by theirs."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from prometheus_client.parser import text_string_to_metric_families as families

from kdmesh import config
from kdmesh.auth.config import AccessConfig, ClientTlsConfig
from kdmesh.errors import ConfigError, PermissionDenied, Unauthenticated, Unavailable
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.rollouts.client import Ask, RolloutClient
from kdmesh.types import Sample, Sampling, SleepTag
from tests.support.certificates import CertificateAuthority, Pair, replace
from tests.support.identities import JOB, access_with, teacher_client, write_tokens
from tests.support.rollout_samples import expected_tokens, prompt
from tests.support.rollout_server import running_rollout
from tests.support.teacher_requests import sequence
from tests.support.teacher_server import running_teacher


def shown(pair: Pair) -> dict[str, str]:
    return {"cert": str(pair.cert), "key": str(pair.key)}


def mutual(authority: CertificateAuthority, server: Pair, **certificates: Any) -> Mapping[str, Any]:
    """The section of a server that knows clients by their certificates."""
    return {"tls": {**shown(server), "client_ca": str(authority.cert)}, "auth": {"certificates": certificates}}


def access(
    authority: CertificateAuthority, client: Pair | None = None, *, server_name: str | None = None
) -> AccessConfig:
    pair = {} if client is None else {"cert": client.cert, "key": client.key}
    return AccessConfig(tls=ClientTlsConfig(ca=authority.cert, server_name=server_name, **pair))


async def serial_numbers(address: str, rest: str, authority: CertificateAuthority) -> set[str]:
    """Of the certificates that gRPC and HTTP show now."""
    context = ssl.create_default_context(cafile=str(authority.cert))
    found = set()
    for place in (address, rest):
        host, _, port = place.rpartition(":")
        context.set_alpn_protocols(["h2"] if place == address else ["http/1.1"])
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        found.add(writer.get_extra_info("ssl_object").getpeercert()["serialNumber"])
        writer.transport.abort()
    return found


async def test_rows_and_metrics_come_encrypted_from_the_server_that_is_meant(tmp_path: Path) -> None:
    authority, stranger = CertificateAuthority(tmp_path), CertificateAuthority(tmp_path, "stranger")
    server = authority.issue("server", ["localhost"])
    tokens = write_tokens(tmp_path / "tokens.yaml", JOB)
    section = {"tls": shown(server), "auth": {"tokens": str(tokens)}}
    token = access_with(JOB, tmp_path)
    async with running_teacher(tmp_path, server=section) as teacher:
        address = teacher.addresses.grpc
        with_token = access(authority).model_copy(update={"token_file": token.token_file})
        async with teacher_client(address, with_token) as client:
            await client.prefill([sequence(9)], Deadline.after(10))
        for wrong, said in (
            (access(stranger), "certificate"),
            (access(authority, server_name="another.example"), "failed to connect"),
            (token, "Socket closed, as by a server that asks for TLS"),
        ):
            with pytest.raises(Unavailable, match=said):
                async with teacher_client(address, wrong):
                    pass
        context = ssl.create_default_context(cafile=str(authority.cert))
        async with httpx.AsyncClient(verify=context) as http:
            url = f"https://{teacher.addresses.rest}"
            assert (await http.get(f"{url}/readyz")).status_code == 200
            assert (await http.get(f"{url}/metrics")).status_code == 401
            metrics = await http.get(f"{url}/metrics", headers={"Authorization": f"Bearer {JOB}"})
        assert metrics.status_code == 200
        until = x509.load_pem_x509_certificate(server.cert.read_bytes()).not_valid_after_utc
        samples = {sample.name: sample.value for family in families(metrics.text) for sample in family.samples}
        assert samples["kdmesh_teacher_certificate_expires_timestamp_seconds"] == until.timestamp()


async def test_a_certificate_is_exchanged_while_a_client_streams(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = CertificateAuthority(tmp_path)
    server = authority.issue("server", ["localhost"])
    samples: list[Sample] = []
    async with running_rollout(server={"tls": shown(server)}) as rollout:
        address, rest = rollout.addresses.grpc, rollout.addresses.rest
        client = await RolloutClient.connect(address, job="streams", access=access(authority))
        before = await serial_numbers(address, rest, authority)
        assert len(before) == 1

        async def draw(seed: int) -> None:
            asked = Ask(
                prompt_ids=prompt(seed=1),
                sampling=Sampling(max_new_tokens=20),
                num_samples=1,
                seed=seed,
                min_weight_version=0,
            )
            await client.generate(asked, lambda _, sample: samples.append(sample), Deadline.after(20))

        async with asyncio.TaskGroup() as drawing:
            rollout.engine.hold()
            drawing.create_task(draw(7))
            authority.issue("server", ["localhost"])
            after = await serial_numbers(address, rest, authority)
            assert len(after) == 1
            assert not after & before
            assert not samples  # the stream was open all the time
            rollout.engine.let_go()
        with caplog.at_level(logging.ERROR):
            replace(server.cert, b"no certificate")
            assert await serial_numbers(address, rest, authority) == after
        assert [r for r in caplog.records if r.name == "kdmesh.auth.watched"]
        await draw(8)
        await client.close()
    assert [sample.token_ids.tolist() for sample in samples] == [
        expected_tokens(prompt(seed=1), seed, 20) for seed in (7, 8)
    ]


async def test_a_client_is_known_by_the_names_in_its_certificate(tmp_path: Path) -> None:
    authority, stranger = CertificateAuthority(tmp_path), CertificateAuthority(tmp_path, "stranger")
    section = mutual(authority, authority.issue("server", ["localhost"]), roles={"job-a": "job", "boss": "operator"})
    async with running_teacher(tmp_path, server=dict(section)) as teacher:
        address = teacher.addresses.grpc
        async with teacher_client(address, access(authority, authority.issue("any", ["x.example", "job-a"]))) as client:
            await client.prefill([sequence(9)], Deadline.after(10))
            with pytest.raises(PermissionDenied, match="Sleep needs role operator; job-a has role job"):
                await client.sleep(frozenset({SleepTag.WEIGHTS}), drain_s=1)
        boss = authority.issue("boss")
        async with teacher_client(address, access(authority, boss)) as client:
            await client.sleep(frozenset({SleepTag.WEIGHTS}), drain_s=1)
            await client.wake(frozenset({SleepTag.WEIGHTS}))
        with pytest.raises(PermissionDenied, match=r"certificate of nobody\.example is good, but it has no role"):
            async with teacher_client(address, access(authority, authority.issue("else", ["nobody.example"]))):
                pass
        for wrong in (access(authority), access(authority, stranger.issue("job-a"))):
            with pytest.raises(Unavailable):
                async with teacher_client(address, wrong):
                    pass
        await _look_over_http(teacher.addresses.rest, authority, boss)


async def _look_over_http(rest: str, authority: CertificateAuthority, boss: Pair) -> None:
    """Probes show no certificate; who wants to know more does."""
    context = ssl.create_default_context(cafile=str(authority.cert))
    async with httpx.AsyncClient(verify=context) as http:
        assert (await http.get(f"https://{rest}/readyz")).status_code == 200
        assert (await http.get(f"https://{rest}/v1/model")).status_code == 401
    context.load_cert_chain(boss.cert, boss.key)
    async with httpx.AsyncClient(verify=context) as http:
        assert (await http.get(f"https://{rest}/v1/model")).status_code == 200
        assert (await http.post(f"https://{rest}/v1/wake", json={"tags": ["weights"]})).status_code == 200


async def test_two_jobs_with_certificates_cannot_use_each_others_sessions(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path)
    section = mutual(authority, authority.issue("server", ["localhost"]), default_role="job")
    async with running_teacher(tmp_path, server=dict(section)) as teacher:
        address = teacher.addresses.grpc
        async with (
            teacher_client(address, access(authority, authority.issue("job-a"))) as owner,
            teacher_client(address, access(authority, authority.issue("job-b"))) as thief,
        ):
            with pytest.raises(Unauthenticated, match="a usable name"):
                async with teacher_client(address, access(authority, authority.issue("two words"))):
                    pass
            thief._session = owner._session
            with pytest.raises(Exception, match="the session is unknown or its lease has ended"):
                await thief.prefill([sequence(9)], Deadline.after(10))
            await owner.prefill([sequence(9)], Deadline.after(10))


@pytest.mark.parametrize("damage", ["key of another", "not there", "no PEM"])
async def test_a_server_does_not_start_with_files_of_no_use(tmp_path: Path, damage: str) -> None:
    authority = CertificateAuthority(tmp_path)
    server, other = authority.issue("server", ["localhost"]), authority.issue("other")
    match damage:
        case "key of another":
            server = Pair(server.cert, other.key)
        case "not there":
            server.key.unlink()
        case _:
            server.cert.write_text("no certificate")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        async with running_teacher(tmp_path, server={"tls": shown(server)}):
            pass


@pytest.fixture
def secrets_of_page(tmp_path: Path) -> Path:
    """The directory that the commands of docs/security.md make, with a file for `--access` beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    page = (Path(__file__).resolve().parents[2] / "docs/security.md").read_text(encoding="utf-8")
    (commands,) = [block for block in page.split("```\n") if block.startswith("mkdir -m 700 secrets")]
    script = commands.partition("kdmesh teacher")[0]
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    return tmp_path / "secrets"


async def test_the_page_s_secrets_let_its_job_in(
    secrets_of_page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = config.load(AccessConfig, Path("access.yaml"))
    section = {
        "tls": {"cert": str(secrets_of_page / "tls.crt"), "key": str(secrets_of_page / "tls.key")},
        "auth": {"tokens": str(secrets_of_page / "tokens.yaml")},
    }
    async with running_teacher(tmp_path, server=section) as teacher, teacher_client(teacher.addresses.grpc, given) as c:
        await c.prefill([sequence(9)], Deadline.after(10))
