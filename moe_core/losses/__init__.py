"""Auxiliary losses: pure functions of a Routing that return a float32 scalar without a coefficient.

balance, global_batch, device: value 1 at perfect balance; spread: value 0
size: how large things are, not how even; conventions: other libraries' scales
"""

from .balance import first_choice_balance, load_balance, sequence_balance
from .conventions import CONVENTIONS, balanced_value, convert_coefficient, convert_loss
from .device import communication_balance, device_balance
from .global_batch import global_balance, global_share
from .size import l1, z_loss
from .spread import cv_squared, importance, load
