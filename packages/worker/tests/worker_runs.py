"""Starting workers, and waiting for what their tasks do."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from memory_broker import MemoryBroker

TESTS = Path(__file__).parent


async def start(
    *arguments: str, stderr: int = asyncio.subprocess.PIPE, **environment: str
) -> asyncio.subprocess.Process:
    """The command, in the directory of the tests' application."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "penstock_worker",
        *arguments,
        cwd=TESTS,
        env=os.environ | environment,
        stderr=stderr,
    )


@asynccontextmanager
async def worker(
    *brokers: MemoryBroker, slots: int = 1, options: tuple[str, ...] = (), **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker that serves these brokers; stopped at the end, which must be a clean one."""
    hosts = ",".join(broker.address for broker in brokers)
    fixed = ("--rpc-host-list", hosts, "--concurrency", str(slots), "--grace-seconds", "60")
    arguments = ("run", "worker_tasks:app", *fixed, *options)
    process = await start(*arguments, stderr=asyncio.subprocess.PIPE, **environment)
    assert process.stderr is not None
    log = asyncio.create_task(process.stderr.read())
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        code = await process.wait()
        text = (await log).decode()
        # For the report of a test that fails.
        sys.stderr.write(text)
    assert code == 0, text
    assert "internal error" not in text


def _read_once_written(path: Path) -> str:
    while not (path.exists() and path.read_text()):
        time.sleep(0.005)
    return path.read_text()


async def appears(path: Path) -> str:
    """The file's text, once another process has written it; the test's timeout ends the wait."""
    return await asyncio.to_thread(_read_once_written, path)
