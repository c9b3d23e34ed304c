"""Which part of a log a rule looks at."""

from .log_records import LayerRecord, StepRecord
from .routing_log import RoutingLog


def late(records: list[StepRecord]) -> list[StepRecord]:
    """The later half, where a run has settled; the middle one belongs to it."""
    return records[len(records) // 2 :]


def by_layer(records: list[StepRecord]) -> list[list[LayerRecord]]:
    """The records of each layer."""
    return [list(layer) for layer in zip(*(record.layers for record in records))]


def late_by_layer(log: RoutingLog) -> list[list[LayerRecord]]:
    """The records of each layer in the later half of the training steps."""
    return by_layer(late(log.training))


def steps(records: list[StepRecord]) -> list[int]:
    """First and last step, for the evidence."""
    return [records[0].step, records[-1].step]
