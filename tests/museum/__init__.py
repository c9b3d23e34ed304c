"""The museum: bugs that real libraries shipped, each small enough to read, each beside the property that catches it.

from tests.museum import MUSEUM
bug = MUSEUM[0]
print(bug.title, bug.symptom, bug.code, sep="\\n")
bug.verdict(bug.mutant)   # what the check says
bug.verdict(bug.healthy)  # None
"""

from . import choice, losses, places, state, thresholds, weights
from .bug import Bug

ROOMS = losses, choice, places, state, thresholds, weights
MUSEUM: list[Bug] = sorted((bug for room in ROOMS for bug in room.BUGS), key=lambda bug: bug.number)

__all__ = ["MUSEUM", "Bug"]
