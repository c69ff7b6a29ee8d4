"""The status page in a real Chromium."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.http import rest
from kdmesh.serving.http.status import SlabStatus, Working
from kdmesh.serving.http.status_routes import add_status_routes
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.fair_queue import FairQueue
from kdmesh.serving.jobs.state import Holdings, job_states
from kdmesh.serving.jobs.table import JobTable

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

    def working(self) -> Working:
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
    app, gate = FastAPI(), Gate[Looks]()
    gate.open(looks)
    add_status_routes(app, gate, "teacher")
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


class Phone:
    """A tab of a Chromium that is as small as a phone, told what to do through a pair of pipes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count(1)
        self._session: str | None = None

    async def __aenter__(self) -> Phone:
        assert BROWSER is not None
        (theirs_in, self._to), (from_them, theirs_out) = os.pipe(), os.pipe()
        # It reads descriptor 3 and writes descriptor 4.
        shell = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$0" "$@"'
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
        self._process = await asyncio.create_subprocess_exec(
            *("bash", "-c", shell, BROWSER, *options, f"--user-data-dir={self._directory}"),
            pass_fds=(theirs_in, theirs_out),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._reader = asyncio.StreamReader(limit=2**24)
        pipe = os.fdopen(from_them, "rb")
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), pipe
        )
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        await self.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        os.close(self._to)
        self._process.terminate()
        await self._process.wait()
        self._transport.close()

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What Chromium answers."""
        number = next(self._numbers)
        session = {} if self._session is None else {"sessionId": self._session}
        os.write(self._to, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        async with asyncio.timeout(60):
            while (reply := json.loads((await self._reader.readuntil(b"\0"))[:-1])).get("id") != number:
                pass
        assert "error" not in reply, reply
        found: dict[str, Any] = reply["result"]
        return found

    async def value(self, expression: str) -> Any:
        """Of some JavaScript on the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"]["value"]


async def test_the_page_fits_a_phone_and_can_be_read_there(tmp_path: Path) -> None:
    async with serving(Looks()) as address, Phone(tmp_path / "profile") as phone:
        await phone.call("Page.navigate", url=address)
        async with asyncio.timeout(60):
            while await phone.value("document.readyState + document.title") != "completekdmesh teacher":
                pass
        assert await phone.value("window.innerWidth") == 390
        assert await phone.value("document.documentElement.scrollWidth") <= 390  # nothing to push aside but tables
        sizes = "[...document.querySelectorAll('p, td, th, .what')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        assert min(await phone.value(sizes)) >= 12
        boxes = "[...document.querySelectorAll('.scroll')].every(e => e.getBoundingClientRect().right <= 390)"
        assert await phone.value(boxes)
        picture = base64.b64decode((await phone.call("Page.captureScreenshot"))["data"])
        (tmp_path / "phone.png").write_bytes(picture)
        assert picture.startswith(b"\x89PNG")
