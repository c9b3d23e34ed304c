"""What the layer bench found, as text: a table a shape, the ratios that matter, and how time grows with T and with E."""

import math
import statistics

from .layer import DENSE

AUTO = "moe_core auto"
GROUPED = "Hugging Face grouped_mm"


def report(record: dict) -> str:
    """Everything there is to say about what ``layer.bench`` returned."""
    return "\n\n".join(
        [
            machine(record),
            table(record),
            summary(record),
            *(growth(record, name) for name in record["results"]["growth"]),
        ]
    )


def machine(record: dict) -> str:
    """The line above the table."""
    found, results = record["machine"], record["results"]
    where = (
        found["card"]
        or f"{found['threads']} thread{'s' * (found['threads'] > 1)} of a CPU ({found['processor']})"
    )
    return (
        f"{where}, {record['config']['dtype']}, torch {found['torch']}; one large matrix product runs at {_rate(results['matmul_gflops'])}. "
        f"Medians of {record['config']['rounds']} rounds, {len(record['seeds'])} repetitions."
    )


def table(record: dict) -> str:
    """One line per shape and contestant. ± is half the spread of the ratio over the repetitions."""
    head = ["shape", "contestant", "ms", "/ dense", "/ best HF", "peak MB", "rate", "of matmul"]
    lines = []
    for found in record["results"]["shapes"]:
        best = _best(found)
        for name, its in found["contestants"].items():
            gflops = found["flops"] / (statistics.fmean(its["ms"]) * 1e6)
            lines.append(
                [
                    found["name"],
                    name + (f" ({found['backend']})" if name == AUTO else ""),
                    f"{statistics.fmean(its['ms']):.1f}",
                    _band(ratios(found, name, DENSE)),
                    _band(ratios(found, name, best)) if best else "",
                    f"{statistics.fmean(its['peak_mb']):.1f}",
                    _rate(gflops),
                    f"{gflops / record['results']['matmul_gflops']:.0%}",
                ]
            )
    return _markdown(head, lines)


def summary(record: dict) -> str:
    """The ratios of ``auto`` alone, a line a shape, and their geometric mean."""
    head, lines, products = (
        ["shape", "rows an expert", "auto / best HF", "auto / dense", "peak / HF grouped_mm"],
        [],
        [],
    )
    for found in record["results"]["shapes"]:
        best, shape = _best(found), found["shape"]
        if AUTO not in found["contestants"]:
            return ""
        to_best = _mean(ratios(found, AUTO, best)) if best else None
        products += [to_best] if best else []
        memory = (
            f"{_mean(ratios(found, AUTO, GROUPED, 'peak_mb')):.3f}"
            if GROUPED in found["contestants"]
            else ""
        )
        lines.append(
            [
                found["name"],
                f"{shape['T'] * shape['K'] / shape['E']:g}",
                f"{to_best:.2f}" if best else "",
                f"{_mean(ratios(found, AUTO, DENSE)):.2f}",
                memory,
            ]
        )
    if products:
        lines.append(
            [
                "geometric mean",
                "",
                f"{math.exp(statistics.fmean(map(math.log, products))):.2f}",
                "",
                "",
            ]
        )
    return _markdown(head, lines)


def growth(record: dict, name: str) -> str:
    """How the time grows with T, or with E at a fixed T*K (the same rows are then multiplied, whatever E is), as bars."""
    points = record["results"]["growth"][name]
    means = [_mean(point["ms"]) for point in points]
    fixed = {
        key: value for key, value in points[0]["shape"].items() if key not in (name, "forward_only")
    }
    title = f"Time against {name} ({', '.join(f'{key}={value}' for key, value in fixed.items())})"
    lines = [
        f"{name} = {point['shape'][name]:>5}  {'█' * max(1, round(48 * ms / max(means))):<48}  {ms:7.1f} ms"
        for point, ms in zip(points, means)
    ]
    return "\n".join([title, *lines])


def ratios(found: dict, name: str, to: str, key: str = "ms") -> list[float]:
    """Per repetition: what ``name`` needs over what ``to`` needs."""
    return [
        mine / its
        for mine, its in zip(found["contestants"][name][key], found["contestants"][to][key])
    ]


def _best(found: dict) -> str | None:
    theirs = [name for name in found["contestants"] if name.startswith("Hugging Face")]
    return min(theirs, key=lambda name: _mean(found["contestants"][name]["ms"]), default=None)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def _band(values: list[float]) -> str:
    return f"{_mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"


def _rate(gflops: float) -> str:
    return f"{gflops / 1000:.0f} TFLOP/s" if gflops >= 10_000 else f"{gflops:.0f} GFLOP/s"


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    cells = lambda row: (
        "| "
        + " | ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        + " |"
    )
    rule = (
        "|" + "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths)) + "|"
    )
    return "\n".join([cells(head), rule, *map(cells, lines)])
