"""What a diagnosis says."""

import textwrap
from dataclasses import dataclass
from enum import IntEnum

_WIDTH = 110


class Severity(IntEnum):
    """How much it matters."""

    WARNING = 1  # the run goes on, worse than it could
    CRITICAL = 2  # the run is not what it claims to be: stop and mend it


@dataclass(frozen=True)
class Finding:
    """An illness, and how one can tell.

    Attributes:
        name: of the illness, a key of ``ILLNESSES``.
        layer: index of the MoE layer; None for what concerns the whole run.
        evidence: name -> number, or list of numbers: what was found, and against what.
        severity: a ``Severity``.
        remedy: what to do.
        source: where the rule comes from; a rule of thumb is called one.
    """

    name: str
    layer: int | None
    evidence: dict[str, float | list]
    severity: Severity
    remedy: str
    source: str

    def __str__(self) -> str:
        return _report([self])


class Findings(list):
    """A list of ``Finding`` that prints as a report.

    Attributes:
        examined: what the diagnosis looked at, in words.
        unasked: illness -> what the log would have to hold to ask for it.
    """

    def __init__(self, findings=(), *, examined: str = "", unasked: dict[str, str] | None = None):
        super().__init__(findings)
        self.examined, self.unasked = examined, unasked or {}

    @property
    def names(self) -> list[str]:
        """The illnesses found, the worst first, each once."""
        return list(dict.fromkeys(finding.name for finding in self))

    def __str__(self) -> str:
        count = {0: "Nothing found", 1: "1 finding"}.get(len(self), f"{len(self)} findings")
        alike = {}  # one illness in several layers is told once
        for finding in self:
            alike.setdefault((finding.name, finding.severity, finding.remedy), []).append(finding)
        lines = [f"{count} in {self.examined}.", *map(_report, alike.values())]
        if self.unasked:
            lines += textwrap.wrap(
                f"The log cannot tell: {', '.join(self.unasked)}.", _WIDTH, subsequent_indent="  "
            )
        return "\n".join(lines)

    __repr__ = __str__


def _report(alike: list[Finding]) -> str:
    first = alike[0]
    lines = [f"{first.severity.name}  {first.name}"]
    for finding in alike:
        where = "" if finding.layer is None else f"layer {finding.layer}: "
        lines += _block(
            where
            + "; ".join(
                f"{key.replace('_', ' ')} {_text(key, value)}"
                for key, value in finding.evidence.items()
            )
        )
    return "\n".join([*lines, *_block(f"Do: {first.remedy}"), *_block(f"Source: {first.source}")])


def _block(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")


def _text(key: str, value) -> str:
    if key == "steps":
        return f"{value[0]} to {value[1]}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text("", one) for one in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
