"""When certificates end to be valid, without a library for them."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSION = 0xA0  # a tag of DER
_FORMATS = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}  # of time, by tag


def expires_at_s(chain: bytes) -> float | None:
    """When the first of them to end does, in Unix time; None: all are of OpenSSL's own kind, with trust settings.

    Args:
        chain: certificates in PEM that OpenSSL has taken.
    """
    ends_s = [_not_after_s(ssl.PEM_cert_to_DER_cert(pem)) for pem in _PEM.findall(chain.decode("latin-1"))]
    return min(ends_s, default=None)


def _not_after_s(der: bytes) -> float:
    """Source: RFC 5280, section 4.1: version, serial number, signature, issuer, validity."""
    ((_, whole),) = _elements(der)
    to_be_signed = next(_elements(whole))[1]
    fields = [value for tag, value in _elements(to_be_signed) if tag != _VERSION]
    _, (tag, until) = _elements(fields[3])
    return datetime.strptime(until.decode("ascii"), _FORMATS[tag]).replace(tzinfo=UTC).timestamp()


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """The tags and contents of the elements that follow one another."""
    at = 0
    while at < len(der):
        tag, length, start = der[at], der[at + 1], at + 2
        if length & 0x80:
            num_octets = length & 0x7F
            length = int.from_bytes(der[start : start + num_octets])
            start += num_octets
        yield tag, der[start : start + length]
        at = start + length
