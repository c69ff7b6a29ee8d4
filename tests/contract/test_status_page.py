"""The page at / of a server: self-contained, up to date, and safe from the names that clients choose."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path

import httpx

from kdmesh.rpc.retry import Deadline
from tests.support.rollout_server import running_rollout
from tests.support.teacher_requests import sequence
from tests.support.teacher_server import running_teacher

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">$model"


class Reader(HTMLParser):
    """The tags, and the text of the cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = list[str]()
        self.cells = list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["td"]:
            self.cells[-1] += data


@asynccontextmanager
async def page_at(address: str) -> AsyncIterator[httpx.Response]:
    async with httpx.AsyncClient() as http:
        yield await http.get(f"http://{address}/")


async def test_page_shows_a_job_by_the_name_it_chose_and_runs_none_of_it(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        async with teacher.client(job=HOSTILE) as client:
            await client.prefill([sequence(9)], Deadline.after(10))
        async with page_at(teacher.addresses.rest) as answer:
            read = Reader(answer.text)
    assert read.cells[0] == HOSTILE
    assert read.cells[4] == "100%"
    assert not {"script", "img", "iframe", "object", "form"} & set(read.tags)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "http://" not in answer.text
    assert "https://" not in answer.text


async def test_page_says_why_no_work_is_taken(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, wait_ready=False, held=True) as teacher,
        page_at(teacher.addresses.rest) as answer,
    ):
        assert "the server is loading the model" in answer.text
        assert "td" not in Reader(answer.text).tags


async def test_rollout_server_has_the_same_page_without_a_slab() -> None:
    async with running_rollout() as server, page_at(server.addresses.rest) as answer:
        assert "kdmesh rollout server" in answer.text
        assert "Slab" not in answer.text
        assert "No job has come yet" in answer.text
