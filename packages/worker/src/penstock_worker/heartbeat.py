"""Keeping claims alive, and hearing which are no longer ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice

import structlog
from grpc.aio import AioRpcError

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker.claim import Claim
from penstock_worker.link import EXTEND_CLAIMS, BrokerLink

CLAIMS_PER_CALL_MAX = 5_000
RETRY_SECONDS = 1.0

_REVOKED = {
    pb.CLAIM_ANSWER_STALE: "stale",
    pb.CLAIM_ANSWER_UNKNOWN: "unknown",
    pb.CLAIM_ANSWER_CANCELLED: "cancelled",
}
log = structlog.get_logger("penstock_worker")


async def keep_alive(link: BrokerLink, worker_id: str, revoke: Callable[[Claim, str], None]) -> None:
    """Extend every claim of this broker three times per lease, for ever.

    `revoke(claim, reason)` is called for what the broker took back: "stale", "unknown", "cancelled".
    """
    while True:
        interval_seconds = link.lease_seconds / 3
        try:
            async with asyncio.timeout(interval_seconds):
                await link.lease_changed.wait()
        except TimeoutError:
            pass
        else:
            link.lease_changed.clear()
            continue
        while not await _extend(link, worker_id, revoke, interval_seconds):  # noqa: ASYNC110
            await asyncio.sleep(min(RETRY_SECONDS, interval_seconds))


async def _extend(
    link: BrokerLink, worker_id: str, revoke: Callable[[Claim, str], None], timeout_seconds: float
) -> bool:
    claims = list(link.claims.values())
    for at in range(0, len(claims), CLAIMS_PER_CALL_MAX):
        part = list(islice(claims, at, at + CLAIMS_PER_CALL_MAX))
        held = [pb.HeldClaim(claim_token=claim.token, started=claim.started_at is not None) for claim in part]
        request = pb.ExtendClaimsRequest(claims=held, worker_id=worker_id)
        try:
            body = await link.call(EXTEND_CLAIMS, request, timeout_seconds)
        except AioRpcError as error:
            log.debug("heartbeat not answered", broker=link.address, claims=len(part), code=error.code().name)
            return False
        answers = pb.ExtendClaimsResponse.FromString(body).answers
        for claim, answer in zip(part, answers, strict=False):
            # What has ended meanwhile learns its fate from the answer to its outcome.
            if answer in _REVOKED and not claim.ended:
                revoke(claim, _REVOKED[answer])
    return True
