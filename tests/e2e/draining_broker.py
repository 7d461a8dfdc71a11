"""A broker that drains on SIGUSR1, and writes down what came of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import asdict

from penstock_broker import logs
from penstock_broker.clock import SystemClock
from penstock_broker.config.load import load
from penstock_broker.server import Broker


async def main() -> None:
    settings = load().settings
    logs.configure(settings.log_level, settings.log_format)
    broker, stopping, asked = Broker(settings, SystemClock()), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGUSR1, asked.set)

    async def drain() -> None:
        while True:
            await asked.wait()
            asked.clear()
            report = await broker.ingest.drain(float(os.environ["PENSTOCK_E2E_GRACE"]))
            path = settings.db_path.with_suffix(".report")
            path.with_suffix(".new").write_text(json.dumps(asdict(report)))
            path.with_suffix(".new").replace(path)

    draining = asyncio.create_task(drain())
    try:
        await broker.start()
        await broker.run_until(stopping)
    finally:
        draining.cancel()
        await broker.stop()


asyncio.run(main())
