"""What the parallel bench found, as text."""

from statistics import fmean

from .. import markdown
from ._repetitions import band
from .parallel import ALONE, APART, SAME_EACH, SAME_TOKENS


def report(record: dict) -> str:
    """Everything there is to say about what ``parallel.bench`` returned."""
    return "\n\n".join([machine(record), scaling(record), all_to_alls(record), links(record)])


def machine(record: dict) -> str:
    """The line above the tables."""
    found, config = record["machine"], record["config"]
    return (
        f"{config['n_ranks']} processes of one thread on one machine ({found['processor']}), "
        f"{config['backend']}, {config['dtype']}, torch {found['torch']}. Medians of "
        f"{config['rounds']} rounds, {len(record['seeds'])} repetitions."
    )


def scaling(record: dict) -> str:
    """Milliseconds of a step, speed-up over one process, and the share of the all-to-all."""
    R = record["config"]["n_ranks"]
    head = ["shape", "contestant", "ms", "tokens/s, times 1 process", "all-to-all", "of the step"]
    lines = []
    for found in record["results"]:
        for name in (ALONE, APART, SAME_TOKENS, SAME_EACH):
            work = R if name in (APART, SAME_EACH) else 1
            speed = [work * ms[ALONE] / ms[name] for ms in found["ms"]]
            moved = (
                [exchanged[name] for exchanged in found["exchanged"]]
                if name in (SAME_TOKENS, SAME_EACH)
                else []
            )
            lines.append(
                [
                    found["name"],
                    _named(name, record),
                    f"{fmean([ms[name] for ms in found['ms']]):.2f}",
                    band(speed),
                    f"{fmean([m['in_step_ms'] for m in moved]):.2f} ms" if moved else "",
                    f"{fmean([m['share_of_step'] for m in moved]):.0%}" if moved else "",
                ]
            )
    return markdown.number_table(head, lines, text_columns=2)


def all_to_alls(record: dict) -> str:
    """The five all-to-alls of a step: bytes, modelled, by themselves, and in the step.

    In the step ranks wait for each other.
    """
    head = [
        "shape",
        "contestant",
        "MB a rank",
        "modelled ms",
        "by itself",
        "modelled / measured",
        "in the step",
    ]
    lines = []
    for found in record["results"]:
        for name in (SAME_TOKENS, SAME_EACH):
            runs = [exchanged[name] for exchanged in found["exchanged"]]
            modelled, measured = (
                [sum(move[key] for move in run["moves"]) for run in runs]
                for key in ("modelled_ms", "by_itself_ms")
            )
            lines.append(
                [
                    found["name"],
                    _named(name, record),
                    f"{fmean([_megabytes(run['moves']) for run in runs]):.3f}",
                    f"{fmean(modelled):.2f}",
                    f"{fmean(measured):.2f}",
                    band([one / other for one, other in zip(modelled, measured)]),
                    f"{fmean([run['in_step_ms'] for run in runs]):.2f}",
                ]
            )
    return markdown.number_table(head, lines, text_columns=2)


def links(record: dict) -> str:
    """Alpha and beta as fitted, and modelled over measured time, size by size."""
    networks = [network for found in record["results"] for network in found["network"]]
    sizes = {}
    for found in record["results"]:
        for run in found["links"]:
            for link in run:
                sizes.setdefault(link["bytes"], []).append(link)
    text = (
        f"Fitted: alpha {1e6 * fmean([n['latency'] for n in networks]):.0f} us a message, "
        f"1/beta {1e9 * fmean([n['seconds_per_byte'] for n in networks]):.3f} ns a byte."
    )
    lines = [
        [
            f"{size:,}",
            f"{fmean([link['ms'] for link in several]):.3f}",
            f"{fmean([link['modelled_ms'] for link in several]):.3f}",
            band([link["modelled_ms"] / link["ms"] for link in several]),
        ]
        for size, several in sizes.items()
    ]
    return (
        text
        + "\n\n"
        + markdown.number_table(
            ["bytes to each other rank", "measured ms", "modelled", "modelled / measured"],
            lines,
            text_columns=0,
        )
    )


def _megabytes(moves: list[dict]) -> float:
    """What a rank sends to others in all of them, the one that sends most."""
    return (
        sum(
            max(sum(row) - row[rank] for rank, row in enumerate(move["bytes_RR"])) for move in moves
        )
        / 1e6
    )


def _named(name: str, record: dict) -> str:
    return name.replace("R ", f"{record['config']['n_ranks']} ")
