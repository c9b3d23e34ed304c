"""Auxiliary losses of a router.

Each is a pure function of a Routing and returns a float32 scalar without any coefficient: the router multiplies, or whoever trains.

    balance       load_balance · first_choice_balance · sequence_balance     value 1 at perfect balance
    global_batch  global_share · global_balance                              the same over micro-batches and ranks
    device        device_balance · communication_balance                     the same over groups of experts
    spread        importance · load · cv_squared                             value 0 at perfect balance
    size          z_loss · l1                                                about how large things are, not how even
    conventions   balanced_value · convert_loss · convert_coefficient        other libraries' scale of the balance loss
"""

from .balance import first_choice_balance, load_balance, sequence_balance
from .conventions import CONVENTIONS, balanced_value, convert_coefficient, convert_loss
from .device import communication_balance, device_balance
from .global_batch import global_balance, global_share
from .size import l1, z_loss
from .spread import cv_squared, importance, load

__all__ = [
    "CONVENTIONS",
    "balanced_value",
    "communication_balance",
    "convert_coefficient",
    "convert_loss",
    "cv_squared",
    "device_balance",
    "first_choice_balance",
    "global_balance",
    "global_share",
    "importance",
    "l1",
    "load",
    "load_balance",
    "sequence_balance",
    "z_loss",
]
