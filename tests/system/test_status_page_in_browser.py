"""The status page in a real Chromium."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI

from kdmesh.serving import rest
from kdmesh.serving.fair_queue import FairQueue
from kdmesh.serving.gate import Gate
from kdmesh.serving.job_config import JobTerms
from kdmesh.serving.job_state import Holdings, job_states
from kdmesh.serving.job_table import JobTable
from kdmesh.serving.status import SlabStatus, Working
from kdmesh.serving.status_routes import add_status_routes

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]


class Looks:
    """A server whose weights have a new number at every look."""

    def __init__(self) -> None:
        self.table = JobTable(JobTerms())
        self.table.computed(HOSTILE, 1000)
        self.table.computed("plain", 3000)
        self.count = 0
        self.looked = asyncio.Event()

    def __call__(self) -> Working:
        self.count += 1
        self.looked.set()
        return Working(
            model="some-model",
            weight_version=self.count,
            waiting_requests=0,
            waiting_tokens=0,
            tokens_per_s=4000,
            engine_tokens_per_s=None,
            slab=SlabStatus(slots={"free": 3, "held": 1}, slot_bytes=2**20, orphans=0),
            jobs=job_states(self.table, FairQueue(), {"plain": Holdings(sessions=1, slots=1, slab_bytes=2**20)}),
        )


async def start(directory: Path, *arguments: str) -> asyncio.subprocess.Process:
    assert BROWSER is not None
    return await asyncio.create_subprocess_exec(
        BROWSER,
        *("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )


@asynccontextmanager
async def serving(looks: Looks) -> AsyncIterator[str]:
    app, gate = FastAPI(), Gate[object]()
    gate.open(object())
    add_status_routes(app, gate, "teacher", looks)
    async with rest.serving(app, host="127.0.0.1", port=0) as port:
        yield f"http://127.0.0.1:{port}/"


async def test_chromium_shows_the_page_and_runs_nothing_of_it(tmp_path: Path) -> None:
    async with serving(Looks()) as address:
        chromium = await start(tmp_path, "--dump-dom", address)
        output, _ = await chromium.communicate()
    dom = output.decode()
    assert "<title>kdmesh teacher</title>" in dom
    cells = re.findall(r"<td>(.*?)</td>", dom, re.DOTALL)
    assert (cells[0], cells[4]) == ("plain", "75%")
    assert "&lt;script&gt;document.title='taken'&lt;/script&gt;&lt;img src=x" in dom


async def test_chromium_looks_again_by_itself(tmp_path: Path) -> None:
    looks = Looks()
    async with serving(looks) as address:
        chromium = await start(tmp_path, "--remote-debugging-port=0", address)
        async with asyncio.timeout(60):
            while looks.count < 3:
                looks.looked.clear()
                await looks.looked.wait()
        chromium.terminate()
        await chromium.communicate()
