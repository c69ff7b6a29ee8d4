"""When a certificate ends, read without a library for certificates and compared with one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from kdmesh.auth.certificate_expiry import expires_at_s

LONG = "a" * 60  # of which several make lengths that take more than one octet


def certificate(until: datetime, *, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, LONG) for _ in range(6)])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(until - timedelta(days=1))
        .not_valid_after(until)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


EC, RSA = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize("key", [EC, RSA], ids=["ec", "rsa"])
@pytest.mark.parametrize("year", [2026, 2049, 2050, 2199])  # from 2050 on the time is of another kind
def test_the_end_is_what_was_signed(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, year: int) -> None:
    until = datetime(year, 2, 28, 23, 59, 7, tzinfo=UTC)
    assert expires_at_s(certificate(until, key=key)) == until.timestamp()


def test_of_a_chain_it_is_the_first_end() -> None:
    first, second = (datetime(2027, month, 1, tzinfo=UTC) for month in (3, 9))
    assert expires_at_s(certificate(second, key=EC) + certificate(first, key=RSA)) == first.timestamp()
