"""A stand-in for the cluster's DNS: it knows pods behind headless Services, as the API server's Endpoints say it."""

from __future__ import annotations

import socket
import struct
import threading
from types import TracebackType
from typing import Self

import httpx

from tests.node.apart import ADDRESS

_A, _IN = 1, 1
_ANSWERS, _NO_SUCH_NAME = 0x8580, 0x8583  # with authority, and recursion available
_TTL_S = 1


class Names:
    """Answers while it is open, a context manager.

    `SERVICE.NAMESPACE.svc.DOMAIN` has the addresses of ready pods, `HOST.SERVICE.NAMESPACE.svc.DOMAIN` that of the one
    which has this name there.
    """

    def __init__(self, client: httpx.Client, domain: str) -> None:
        self._client = client
        self._suffix = f".svc.{domain}"
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((ADDRESS, 53))
        self._thread = threading.Thread(target=self._serve, name="names")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", (ADDRESS, 53))
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            question, who = self._socket.recvfrom(512)
            if not question:
                return
            self._socket.sendto(self._answer(question), who)

    def _answer(self, question: bytes) -> bytes:
        """One question each, as all resolvers ask."""
        labels, end = [], 12
        while question[end]:
            labels.append(question[end + 1 : end + 1 + question[end]].decode())
            end += 1 + question[end]
        asked = question[12 : end + 5]
        (kind,) = struct.unpack_from("!H", question, end + 1)
        found = self._addresses(".".join(labels))
        given = found if kind == _A and found else []
        flags = _NO_SUCH_NAME if found is None else _ANSWERS
        head = question[:2] + struct.pack("!5H", flags, 1, len(given), 0, 0)
        # 0xC00C: the name that was asked for.
        records = (struct.pack("!3HIH", 0xC00C, _A, _IN, _TTL_S, 4) + socket.inet_aton(address) for address in given)
        return head + asked + b"".join(records)

    def _addresses(self, name: str) -> list[str] | None:
        """None: there is no such name."""
        match name.removesuffix(self._suffix).split(".") if name.endswith(self._suffix) else ():
            case (service, namespace):
                host = None
            case (host, service, namespace):
                pass
            case _:
                return None
        answer = self._client.get(f"/api/v1/namespaces/{namespace}/endpoints/{service}")
        if answer.status_code != 200:
            return None
        subsets = answer.json().get("subsets", ())
        found = [one for subset in subsets for one in subset.get("addresses", ())]
        return [one["ip"] for one in found if host is None or one.get("hostname") == host] or None
