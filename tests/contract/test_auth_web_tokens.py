"""JSON web tokens: whose signature, for whom, until when, and the name and role in them."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from kdmesh.errors import PermissionDenied, Unauthenticated, Unavailable
from tests.support.certificates import replace
from tests.support.identities import access_with, teacher_client
from tests.support.teacher_server import running_teacher

ISSUER, AUDIENCE = "https://issuer.example", "kdmesh"
KEY = ec.generate_private_key(ec.SECP256R1())
STRANGE = ec.generate_private_key(ec.SECP256R1())
SHARED = b"a secret that the key set tells everybody"
PUBLIC = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def claims(**changed: Any) -> dict[str, Any]:
    """Of a good token, with some replaced; None leaves one out."""
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "job-one", "exp": time.time() + 3600, "role": "job"} | changed
    return {name: value for name, value in good.items() if value is not None}


def signed(key: ec.EllipticCurvePrivateKey = KEY, key_id: str = "", **changed: Any) -> str:
    return jwt.encode(claims(**changed), key, "ES256", headers={"kid": key_id} if key_id else None)


@asynccontextmanager
async def guarded(directory: Path, **config: Any) -> AsyncIterator[str]:
    """The address of a teacher that checks tokens."""
    (directory / "issuer.pem").write_bytes(PUBLIC)
    source = {} if config.keys() & {"jwks", "jwks_url"} else {"key": str(directory / "issuer.pem")}
    settings = {"issuer": ISSUER, "audience": AUDIENCE, "role_claim": "role", **source, **config}
    async with running_teacher(directory, server={"auth": {"jwt": settings}}) as teacher:
        yield teacher.addresses.grpc


async def show(address: str, token: str, directory: Path) -> None:
    """Raises why the server does not let a job with that token in."""
    async with teacher_client(address, access_with(token, directory)):
        pass


async def test_a_good_token_is_let_in_as_often_as_it_is_shown(tmp_path: Path) -> None:
    async with guarded(tmp_path) as address:
        token = signed()
        for _ in range(2):
            await show(address, token, tmp_path)


NONE = jwt.encode(claims(), "", "none")
# The trap: the public key, which everybody has, as the secret of an HMAC.
CONFUSED = jwt.PyJWS().encode(json.dumps(claims()).encode(), b"x" * 32, "HS256")


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (signed(exp=time.time() - 60), "it has expired"),
        (signed(aud="another"), "it is not for kdmesh"),
        (signed(iss="https://elsewhere.example"), f"its issuer is not {ISSUER}"),
        (signed(exp=None), "it lacks the claim exp"),
        (signed(aud=None), "it lacks the claim aud"),
        (signed(nbf=time.time() + 3600), "its time has not come yet"),
        (signed(STRANGE), "no JSON web token that a key of the issuer has signed"),
        (signed()[:-4] + "AAAA", "no JSON web token that a key of the issuer has signed"),
        ("no.token.at.all", "no JSON web token that a key of the issuer has signed"),
        (NONE, "its algorithm is none of RS256, ES256"),
        (CONFUSED, "its algorithm is none of RS256, ES256"),
        (signed(sub=None), "claim sub holds no usable name"),
        (signed(sub="two words"), "claim sub holds no usable name"),
    ],
    ids=lambda value: "token" if "." in value else value,  # tokens are others in every process that collects
)
async def test_a_token_that_does_not_count_is_refused_with_the_reason(tmp_path: Path, token: str, why: str) -> None:
    async with guarded(tmp_path) as address:
        with pytest.raises(Unauthenticated, match=why) as refusal:
            await show(address, token, tmp_path)
    assert token not in str(refusal.value)


def forged(secret: bytes, algorithm: str, key_id: str = "") -> str:
    """Authenticated by a secret that the forger knows, whatever it says of itself."""

    def encoded(data: bytes) -> str:
        return urlsafe_b64encode(data).rstrip(b"=").decode()

    header = {"alg": algorithm} | ({"kid": key_id} if key_id else {})
    body = f"{encoded(json.dumps(header).encode())}.{encoded(json.dumps(claims()).encode())}"
    return f"{body}.{encoded(hmac.digest(secret, body.encode(), hashlib.sha256))}"


@pytest.mark.parametrize("algorithm", ["HS256", "ES256", "RS256"])
async def test_what_everybody_knows_signs_nothing(tmp_path: Path, algorithm: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(key_set(one=KEY))
    async with guarded(tmp_path) as address:
        with pytest.raises(Unauthenticated):
            await show(address, forged(PUBLIC, algorithm), tmp_path)
    async with guarded(tmp_path, jwks=str(path)) as address:
        with pytest.raises(Unauthenticated):
            await show(address, forged(SHARED, algorithm, key_id="shared"), tmp_path)


async def test_a_token_for_a_key_of_another_kind_is_refused_as_every_other(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(key_set(one=KEY))
    async with guarded(tmp_path, jwks=str(path)) as address:
        with pytest.raises(Unauthenticated, match="no JSON web token that a key of the issuer has signed"):
            await show(address, forged(SHARED, "RS256", key_id="one"), tmp_path)


async def test_an_expiry_that_an_issuer_writes_as_a_text_counts(tmp_path: Path) -> None:
    async with guarded(tmp_path) as address:
        await show(address, signed(exp=str(int(time.time()) + 3600)), tmp_path)


async def test_words_of_any_encoding_may_stand_before_a_key(tmp_path: Path) -> None:
    path = tmp_path / "commented.pem"
    path.write_bytes("# Schlüssel\n".encode("latin-1") + PUBLIC)
    async with guarded(tmp_path, key=str(path)) as address:
        await show(address, signed(), tmp_path)


async def test_the_role_is_the_claimed_one_or_that_of_the_name(tmp_path: Path) -> None:
    async with guarded(tmp_path, roles={"job-two": "job", "eye": "viewer"}) as address:
        await show(address, signed(role=None, sub="job-two"), tmp_path)
        with pytest.raises(PermissionDenied, match="OpenSession needs role job; eye has role viewer"):
            await show(address, signed(role=None, sub="eye"), tmp_path)
        with pytest.raises(PermissionDenied, match="the token of stranger is valid, but it has no role"):
            await show(address, signed(role=None, sub="stranger"), tmp_path)
        with pytest.raises(PermissionDenied, match="none of viewer, job, operator"):
            await show(address, signed(role="king"), tmp_path)


async def test_other_keys_in_the_file_count_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(key_set(one=KEY))
    async with guarded(tmp_path, jwks=str(path)) as address:
        token = signed(key_id="one")
        await show(address, token, tmp_path)
        replace(path, key_set(two=STRANGE).encode())
        with pytest.raises(Unauthenticated):
            await show(address, token, tmp_path)
        await show(address, signed(STRANGE, key_id="two"), tmp_path)


async def test_keys_are_fetched_from_the_issuer(tmp_path: Path) -> None:
    answers = [key_set(one=KEY)]
    with issuer(answers) as url:
        async with guarded(tmp_path, jwks_url=url) as address:
            await show(address, signed(key_id="one"), tmp_path)
            with pytest.raises(Unauthenticated):
                await show(address, signed(STRANGE, key_id="two"), tmp_path)  # not looked for again so soon
            await show(address, signed(key_id="one"), tmp_path)


@pytest.mark.parametrize("missing_bytes", [0, 100])
async def test_an_issuer_that_does_not_answer_makes_the_server_unavailable(tmp_path: Path, missing_bytes: int) -> None:
    with issuer(["no keys"], missing_bytes=missing_bytes) as url:
        async with guarded(tmp_path, jwks_url=url) as address:
            with pytest.raises(Unavailable, match="keys could not be fetched"):
                await show(address, signed(key_id="one"), tmp_path)


async def test_rsa_keys_work_too(tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = tmp_path / "rsa.pem"
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    async with guarded(tmp_path, key=str(path)) as address:
        await show(address, jwt.encode(claims(), private, "RS256"), tmp_path)
        with pytest.raises(Unauthenticated):
            await show(address, signed(), tmp_path)


async def test_a_key_that_names_no_algorithm_goes_with_every_one_that_is_allowed(tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    told = json.loads(RSAAlgorithm.to_jwk(key.public_key())) | {"kid": "one"}
    assert "alg" not in told
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [told]}))
    async with guarded(tmp_path, jwks=str(tmp_path / "keys.json"), algorithms=["RS512", "PS256"]) as address:
        for algorithm in ("RS512", "PS256"):
            await show(address, jwt.encode(claims(), key, algorithm, headers={"kid": "one"}), tmp_path)
        with pytest.raises(Unauthenticated, match="its algorithm is none of RS512, PS256"):
            await show(address, jwt.encode(claims(), key, "RS256", headers={"kid": "one"}), tmp_path)
        with pytest.raises(Unauthenticated):
            await show(address, signed(key_id="one"), tmp_path)


async def test_keys_of_no_use_in_a_set_leave_the_others(tmp_path: Path) -> None:
    good = json.loads(key_set(one=KEY))["keys"][0]
    useless = [{"alg": "none"}, {"kid": ["a"]}, {"kid": 5}, {"alg": ["ES256"]}, {"alg": "nothing"}, {"crv": "P-1"}]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [*({**good, "kid": "other", **change} for change in useless), good]}))
    async with guarded(tmp_path, jwks=str(path)) as address:
        await show(address, signed(key_id="one"), tmp_path)
        with pytest.raises(Unauthenticated):
            await show(address, signed(key_id="other"), tmp_path)


def key_set(**keys: ec.EllipticCurvePrivateKey) -> str:
    """With a key that everybody could sign with, which must not be taken."""
    public = [json.loads(ECAlgorithm.to_jwk(key.public_key())) | {"kid": name} for name, key in keys.items()]
    shared = {"kty": "oct", "kid": "shared", "alg": "HS256", "k": urlsafe_b64encode(SHARED).rstrip(b"=").decode()}
    return json.dumps({"keys": [*public, shared]})


@contextmanager
def issuer(answers: list[str], *, missing_bytes: int = 0) -> Iterator[str]:
    """Where the first of these can be fetched, but for some bytes that it promises and never sends."""

    class Answering(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers[0].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + missing_bytes))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/keys"
        finally:
            server.shutdown()
            thread.join()
