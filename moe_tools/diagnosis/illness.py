"""What an illness is: a rule, and what is said when it speaks.

``@illness`` makes a function one of ``ILLNESSES``.

    @illness("dead shared gate", needs="a gated shared expert", remedy="Start it ...", source="...")
    def dead_shared_gate(layer: LayerHistory) -> Symptoms | None:
        gates = [r.shared_gate for r in layer.late if r.shared_gate is not None]
        if not gates:
            return None                                       # the log cannot tell
        return Symptoms({"mean_gate": fmean(gates)}) if fmean(gates) < CLOSED_GATE else WELL

A rule is asked of each layer, or with ``whole_run=True`` of the log. Its threshold is a constant
beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .finding import Finding, Severity
from .log_records import LayerRecord, StepRecord
from .routing_log import RoutingLog


@dataclass(frozen=True)
class Symptoms:
    """What a rule found.

    Attributes:
        evidence: name -> number; empty where all is well. "steps" is added unless it is there:
            first and last of the later half.
        remedy, severity: instead of the illness's own.
    """

    evidence: dict[str, float | list]
    remedy: str | None = None
    severity: Severity | None = None


WELL = Symptoms({})


@dataclass(frozen=True)
class LayerHistory:
    """One MoE layer through a log."""

    log: RoutingLog
    index: int

    def of(self, steps: list[StepRecord]) -> list[LayerRecord]:
        """Its records of these steps."""
        return [step.layers[self.index] for step in steps]

    @property
    def early(self) -> list[LayerRecord]:
        """Of the training steps before the later half."""
        return self.of(early_half(self.log.training))

    @property
    def late(self) -> list[LayerRecord]:
        """Of the later half of the training steps, where a run has settled."""
        return self.of(later_half(self.log.training))


@dataclass(frozen=True)
class Illness:
    """A row of ``ILLNESSES``; the arguments are those of ``illness``."""

    name: str
    rule: Callable[[LayerHistory | RoutingLog], Symptoms | None]
    needs: str
    source: str
    remedy: str | None
    severity: Severity
    whole_run: bool

    def ask(self, log: RoutingLog) -> list[Finding] | None:
        """The findings, none where all is well; None where the log holds nothing to ask."""
        layers = [None] if self.whole_run else range(len(log.training[0].layers))
        answers = {i: self.rule(log if i is None else LayerHistory(log, i)) for i in layers}
        if all(symptoms is None for symptoms in answers.values()):
            return None
        when = {"steps": first_and_last(later_half(log.training))}
        return [
            Finding(
                self.name,
                layer,
                symptoms.evidence if "steps" in symptoms.evidence else symptoms.evidence | when,
                symptoms.severity or self.severity,
                symptoms.remedy or self.remedy,
                self.source,
            )
            for layer, symptoms in answers.items()
            if symptoms is not None and symptoms.evidence
        ]


# In the order in which the files are imported, which is that of equally severe findings.
ILLNESSES: dict[str, Illness] = {}


def illness(
    name: str,
    *,
    needs: str,
    source: str,
    remedy: str | None = None,
    severity: Severity = Severity.WARNING,
    whole_run: bool = False,
):
    """Enter a rule into ``ILLNESSES``.

    Args:
        needs: what a log must hold for it; shown where it is missing.
        source: where the rule comes from; a rule of thumb is called one.
        remedy, severity: unless its ``Symptoms`` bring their own.
        whole_run: the rule takes the ``RoutingLog``, not each layer's ``LayerHistory``.
    """

    def enter(rule):
        ILLNESSES[name] = Illness(name, rule, needs, source, remedy, severity, whole_run)
        return rule

    return enter


def early_half(records: list) -> list:
    """What comes before the later half."""
    return records[: len(records) // 2]


def later_half(records: list) -> list:
    """The later half; the middle one belongs to it."""
    return records[len(records) // 2 :]


def first_and_last(records: list[StepRecord]) -> list[int]:
    """First and last step, for the evidence."""
    return [records[0].step, records[-1].step]
