"""What the layer bench found, as text."""

import math
from statistics import fmean

from .. import markdown
from ._repetitions import band
from .layer_speed import DENSE

AUTO = "moe_core auto"
GROUPED = "Hugging Face grouped_mm"


def report(record: dict) -> str:
    """Everything there is to say about what ``layer_speed.bench`` returned."""
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
        found["gpu"]
        or f"{found['threads']} thread{'s' * (found['threads'] > 1)} "
        f"of a CPU ({found['processor']})"
    )
    return (
        f"{where}, {record['config']['dtype']}, torch {found['torch']}; one large matrix product "
        f"runs at {_rate(results['matmul_gflops'])}. Medians of {record['config']['rounds']} "
        f"rounds, {len(record['seeds'])} repetitions."
    )


def table(record: dict) -> str:
    """One line per shape and contestant. ± is half the spread of the ratio over the repetitions."""
    head = ["shape", "contestant", "ms", "/ dense", "/ best HF", "peak MB", "rate", "of matmul"]
    lines = []
    for found in record["results"]["shapes"]:
        best = _best(found)
        for name, its in found["contestants"].items():
            gflops = found["flops"] / (fmean(its["ms"]) * 1e6)
            lines.append(
                [
                    found["name"],
                    name + (f" ({found['backend']})" if name == AUTO else ""),
                    f"{fmean(its['ms']):.1f}",
                    band(ratios(found, name, DENSE)),
                    band(ratios(found, name, best)) if best else "",
                    f"{fmean(its['peak_mb']):.1f}",
                    _rate(gflops),
                    f"{gflops / record['results']['matmul_gflops']:.0%}",
                ]
            )
    return markdown.number_table(head, lines, text_columns=2)


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
        to_best = fmean(ratios(found, AUTO, best)) if best else None
        products += [to_best] if best else []
        memory = (
            f"{fmean(ratios(found, AUTO, GROUPED, 'peak_mb')):.3f}"
            if GROUPED in found["contestants"]
            else ""
        )
        lines.append(
            [
                found["name"],
                f"{shape['T'] * shape['K'] / shape['E']:g}",
                f"{to_best:.2f}" if best else "",
                f"{fmean(ratios(found, AUTO, DENSE)):.2f}",
                memory,
            ]
        )
    if products:
        lines.append(
            ["geometric mean", "", f"{math.exp(fmean(map(math.log, products))):.2f}", "", ""]
        )
    return markdown.number_table(head, lines, text_columns=2)


def growth(record: dict, name: str) -> str:
    """Bars: how the time grows with T, or with E at a fixed T*K, which is the same rows."""
    points = record["results"]["growth"][name]
    means = [fmean(point["ms"]) for point in points]
    fixed = {
        key: value for key, value in points[0]["shape"].items() if key not in (name, "forward_only")
    }
    title = f"Time against {name} ({', '.join(f'{key}={value}' for key, value in fixed.items())})"
    lines = [
        f"{name} = {point['shape'][name]:>5}  {'█' * max(1, round(48 * ms / max(means))):<48} "
        f" {ms:7.1f} ms"
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
    return min(theirs, key=lambda name: fmean(found["contestants"][name]["ms"]), default=None)


def _rate(gflops: float) -> str:
    return f"{gflops / 1000:.0f} TFLOP/s" if gflops >= 10_000 else f"{gflops:.0f} GFLOP/s"
