"""What names and addresses stand for."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import pytest

from kdmesh.rpc.fleet.discovery import Discovery, resolve


async def test_this_machine_s_names_are_resolved_to_host_and_port() -> None:
    assert "127.0.0.1:50051" in await resolve("localhost", 50051)
    with pytest.raises(OSError):
        await resolve("name.invalid", 50051)


async def test_an_address_of_version_6_gets_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*arguments: object, **options: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::1", 7, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert await resolve("teachers", 7) == ["[fd00::1]:7"]


async def test_addresses_come_as_given_and_names_as_found_each_once() -> None:
    asked: list[tuple[str, int]] = []

    async def look_up(name: str, port: int) -> Sequence[str]:
        asked.append((name, port))
        return [f"10.0.0.1:{port}", f"10.0.0.2:{port}"]

    discovery = Discovery(["10.0.0.2:7", "dns:///teachers.example:7"], look_up)
    assert discovery.changes
    assert await discovery.look() == ["10.0.0.2:7", "10.0.0.1:7"]
    assert asked == [("teachers.example", 7)]
    assert not Discovery(["10.0.0.2:7"], look_up).changes


@pytest.mark.parametrize("error", [OSError("no such name"), UnicodeError("label too long")])
async def test_what_was_found_before_is_kept_with_the_reason(error: Exception) -> None:
    answers: list[Sequence[str] | Exception] = [["10.0.0.1:7"], error, ["10.0.0.3:7"]]

    async def look_up(name: str, port: int) -> Sequence[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    discovery = Discovery(["dns:///teachers:7"], look_up)
    assert await discovery.look() == ["10.0.0.1:7"]
    assert await discovery.look() == ["10.0.0.1:7"]
    assert discovery.last_error == f"dns:///teachers:7: {error}"
    assert await discovery.look() == ["10.0.0.3:7"]
    assert discovery.last_error == ""
