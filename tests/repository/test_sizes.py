"""What one package hands to another, the other takes."""

from annotated_types import Le

from penstock_broker.config import Settings
from penstock_broker.dispatch.service import TASKS_MAX
from penstock_broker.server import RESPONSE_BYTES_MAX
from penstock_protocol.v1.raw_pb2 import RawClaimedTask, RawGetTasksResponse
from penstock_worker import link


def test_whatever_a_broker_may_store_fits_into_an_answer_that_its_workers_take() -> None:
    """An answer is full once it has its bytes, so the last task may go beyond them by all of itself."""
    bounds = Settings.model_fields["message_bytes_max"].metadata
    (largest,) = (int(str(bound.le)) for bound in bounds if isinstance(bound, Le))
    # With what a retry adds to the message, and the lengths of what is in one.
    most = 2**32 - 1
    around = RawClaimedTask(
        activation=bytes(64), claim_token=bytes(64), deadline_ms=most, attempt=most, expires_in_ms=2**63
    )
    answer = RawGetTasksResponse(tasks=TASKS_MAX * [around], lease_ms=most)
    assert RESPONSE_BYTES_MAX + largest + answer.ByteSize() <= link.RESPONSE_BYTES_MAX
