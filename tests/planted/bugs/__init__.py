"""All planted bugs, by the part of the product they are in."""

from tests.planted.bug import Bug
from tests.planted.bugs import store

BUGS: tuple[Bug, ...] = (*store.BUGS,)
