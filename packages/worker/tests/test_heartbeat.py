"""Claims are held for as long as they are extended."""

from __future__ import annotations

import asyncio
import time
from typing import cast

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker.claim import Claim
from penstock_worker.frames import Assignment
from penstock_worker.heartbeat import CLAIMS_PER_CALL_MAX, keep_alive
from penstock_worker.link import BrokerLink


class Link:
    address = "broker"
    lease_seconds = 90.0

    def __init__(self, claims: int) -> None:
        self.lease_changed = asyncio.Event()
        self.claims = {
            n: Claim(cast("BrokerLink", self), Assignment(n, b"", b"%d" % n, 1, None), 1.0)
            for n in range(claims)
        }
        self.extended: set[bytes] = set()
        self.all_extended = asyncio.Event()

    async def call(self, path: str, request: pb.ExtendClaimsRequest, seconds: float) -> bytes:
        self.extended |= {claim.claim_token for claim in request.claims}
        if len(self.extended) == len(self.claims):
            self.all_extended.set()
        answers = [pb.CLAIM_ANSWER_EXTENDED] * len(request.claims)
        return pb.ExtendClaimsResponse(answers=answers).SerializeToString()


async def test_every_claim_is_extended_while_its_lease_lasts() -> None:
    link = Link(CLAIMS_PER_CALL_MAX + 1)
    beats = asyncio.create_task(keep_alive(cast("BrokerLink", link), "worker", lambda claim, why: None))
    await asyncio.sleep(0)
    begun = time.monotonic()
    BrokerLink.learn_lease(cast("BrokerLink", link), 3.0)
    await link.all_extended.wait()
    assert time.monotonic() - begun < 3
    beats.cancel()
