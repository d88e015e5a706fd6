"""Turns a pytest-benchmark JSON, or that of a GPU run, into markdown tables: `python -m bench.report FILE.json [--all]
[--suite NAME] [--roofline FILE.png]`.

One row a case: the time of ours, how many times faster than the fastest of the others in the same alternating rounds, and
what the machine's roofline would allow. Absolute times drift between processes; ratios are the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import gpu_report

COLUMNS = {
    "ops": ("op and shape", "backend", "time", "ratio", "against", "GFLOP/s", "GB/s", "% of roofline", "memory"),
    "operators": ("product", "by", "time", "ratio", "against", "gradients a column", "memory"),
    "samples": ("quantity", "by", "time", "ratio", "against", "gradients", "memory"),
    "optim": ("training step", "by", "time", "ratio", "against", "SGD steps", "memory"),
    "kfac": ("factors", "by", "time", "ratio", "against", "gradients", "memory"),
    "probes": ("probe", "by", "time", "ratio", "against", "memory"),
    "dispatch": ("op, backend", "overhead", "limit"),
}


def seconds(value: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.3g} MB"


def ratio(info: dict) -> str:
    return f"{info['ratio']:.2f}x" if info.get("ratio") else ""


def cells(entry: dict) -> tuple[str, ...]:
    """One row of the entry's suite."""
    info, median = entry["extra_info"], seconds(entry["stats"]["median"])
    if info["suite"] == "dispatch":
        return info["case"], f"{info['overhead_us']:.2f} µs", f"{info['limit_us']:.0f} µs"
    name = info["contestant"].removeprefix("hvpfast ")
    shared = (info["case"], name, median, ratio(info), info.get("against") or "")
    memory = megabytes(info.get("peak_memory"))
    if info["suite"] == "ops":
        rates = (f"{info['gflops_per_s']:.0f}", f"{info['gbytes_per_s']:.1f}", f"{info['roofline_percent']:.0f}")
        return (*shared, *rates, memory)
    if info["suite"] == "operators":
        return (*shared, f"{info['gradients_per_column']:.2f}", memory)
    if info["suite"] in ("samples", "kfac"):
        return (*shared, f"{info['gradients']:.2f}", memory)
    if info["suite"] == "optim":
        return (*shared, f"{info['sgd_steps']:.2f}", memory)
    return (*shared, memory)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def heading(data: dict) -> str:
    """Date, device, versions: what a figure is worth nothing without."""
    machine = data["machine_info"]
    own = machine.get("hvpfast", {})
    device = (
        own.get("gpu") or machine.get("cpu", {}).get("brand_raw") or machine.get("processor") or machine.get("machine")
    )
    parts = [data["datetime"][:10], str(device), f"{own.get('threads', '?')} threads"]
    parts += [f"{name} {version}" for name, version in own.get("versions", {}).items()]
    text = ", ".join(parts)
    return text + ("\n\n**Sizes of a smoke run: these figures mean nothing.**" if own.get("quick") else "")


def _is_ours(contestant: str, has_kernel: bool) -> bool:
    """An op without a kernel is its reference."""
    return contestant.startswith("hvpfast") if has_kernel else contestant == "reference"


def report(data: dict, everyone: bool, suite: str | None) -> str:
    """The markdown; only ours, kernels before references, unless `everyone`."""
    lines = [heading(data)]
    for name, header in COLUMNS.items():
        entries = [e for e in data["benchmarks"] if e["extra_info"].get("suite") == name]
        if not everyone and name != "dispatch":
            own = {e["group"] for e in entries if e["extra_info"]["contestant"].startswith("hvpfast")}
            entries = [e for e in entries if _is_ours(e["extra_info"]["contestant"], e["group"] in own)]
        if not entries or suite not in (None, name):
            continue
        for device in dict.fromkeys(e["extra_info"].get("device", "cpu") for e in entries):
            chosen = [e for e in entries if e["extra_info"].get("device", "cpu") == device]
            lines += ["", f"### {name} on {device}", "", *table(header, [cells(entry) for entry in chosen])]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Markdown tables of a benchmark run.")
    parser.add_argument("file", type=Path, help="what `pytest bench --benchmark-json FILE` or bench/gpu.sh wrote")
    parser.add_argument("--all", action="store_true", help="a row for every contestant, not only for ours")
    parser.add_argument("--suite", choices=tuple(COLUMNS), help="one suite only")
    parser.add_argument("--roofline", type=Path, metavar="PNG", help="of a GPU run: draw it there")
    args = parser.parse_args(argv)
    try:
        data = json.loads(args.file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"{args.file}: {error}")
    if gpu_report.is_gpu_run(data):
        lines = [
            gpu_report.heading(data),
            "",
            *table(gpu_report.COLUMNS, list(gpu_report.rows(data["times"], args.all))),
        ]
        if args.roofline:
            try:
                gpu_report.roofline(data, args.roofline)
            except (ImportError, ValueError, OSError) as error:
                parser.error(f"--roofline {args.roofline}: {error}")
        sys.stdout.write("\n".join(lines) + "\n")
        return 0
    if args.roofline:
        parser.error(f"--roofline needs what bench/gpu.sh wrote; {args.file} is of pytest bench")
    if not any("suite" in entry.get("extra_info", {}) for entry in data.get("benchmarks", ())):
        parser.error(f"{args.file} holds no entry of these suites; make it with `pytest bench --benchmark-json FILE`")
    sys.stdout.write(report(data, args.all, args.suite))
    return 0


if __name__ == "__main__":
    sys.exit(main())
