"""All planted bugs, by the part of the product they are in."""

from tests.planted.bug import Bug
from tests.planted.bugs import dispatch, ingest, looking, simulated, store, worker

BUGS: tuple[Bug, ...] = (
    *store.BUGS,
    *ingest.BUGS,
    *dispatch.BUGS,
    *looking.BUGS,
    *worker.BUGS,
    *simulated.BUGS,
)
