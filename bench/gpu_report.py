"""Tables and the roofline of a GPU run, from the JSON that `bench/gpu.sh` leaves in bench/results: see `bench.report`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

COLUMNS = ("op and shape", "by", "ms", "p20 to p80", "of its floor", "against the fastest other on such data")


def is_gpu_run(data: dict) -> bool:
    return {"machine", "ceilings", "validation", "times"} <= data.keys()


def _ours(name: str) -> bool:
    return name.startswith(("triton", "cuda", "cpu", "cusolver", "hvpfast")) and "reference" not in name


def _narrow(name: str) -> bool:
    """Whether a row is of 16-bit data; kernels say first on which, then how they multiply."""
    return name.split()[1] == "bf16" if _ours(name) and not name.startswith("hvpfast") else "bf16" in name


def heading(data: dict) -> str:
    """Device, versions, ceilings measured in the run, and what the validation said."""
    machine, roof = data["machine"], data["ceilings"]
    parts = [str(machine.get("device", "no GPU"))]
    parts += [f"{name} {machine[name]}" for name in ("torch", "triton", "cuda", "python") if machine.get(name)]
    lines = [", ".join(parts)]
    if data["rehearsal"]:
        lines.append("**A rehearsal on the CPU: it has no times.**")
    measured = {name: value for name, value in roof.items() if value}
    if measured:
        rates = [f"{name} {value / 1e12:.3g} Tflop/s" for name, value in measured.items() if name != "copy"]
        lines.append(f"Ceilings, as torch reaches them: copy {measured['copy'] / 1e12:.3g} TB/s, {', '.join(rates)}.")
    rows = data["validation"]
    failures = [f"{row['op']} on {row['backend']}: {failure}" for row in rows for failure in row["failures"]]
    cases = sum(row["cases"] for row in rows)
    lines.append(f"Validation against float64: {cases} cases in {len(rows)} rows, {len(failures)} failures.")
    return "\n\n".join(lines + [f"- {failure}" for failure in failures])


def rows(times: list[dict], everyone: bool) -> Iterator[tuple[str, ...]]:
    """Ours (all with `everyone`): a ratio is the fastest other's time over this one's."""
    for group in dict.fromkeys(row["group"] for row in times):
        mine = [row for row in times if row["group"] == group]
        rest = [row for row in mine if "ms" in row and not _ours(row["name"]) and "gradient" not in row["name"]]
        for row in mine:
            if not (everyone or _ours(row["name"])):
                continue
            if "ms" not in row:
                yield group, row["name"], row.get("failed", "no time"), "", "", ""
                continue
            spread = f"{row['p20']:.3g} to {row['p80']:.3g}"
            others = [other["ms"] for other in rest if _narrow(other["name"]) == _narrow(row["name"])]
            ratio = f"{min(others) / row['ms']:.2f}x" if others and _ours(row["name"]) else ""
            yield group, row["name"], f"{row['ms']:.4g}", spread, f"{100 * row['floor_ms'] / row['ms']:.0f} %", ratio


def roofline(data: dict, path: Path) -> None:
    """Flop/s against flops a byte: roofs as measured, ours in colour, the fastest other of each group in grey.

    Raises:
        ImportError: matplotlib is missing. ValueError: the run has no times.
    """
    from matplotlib.figure import Figure

    from hvpfast.plot import style

    timed = [row for row in data["times"] if "ms" in row and row["flops"] > 0 and row["bytes"] > 0]
    if not timed or not data["ceilings"].get("copy"):
        raise ValueError("the run has no times (a rehearsal?); a roofline needs those of a GPU")
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    _, ax = style.axes(figure.add_subplot())
    points = {
        row["name"] + row["group"]: (row["flops"] / row["bytes"], row["flops"] / row["ms"] * 1e3) for row in timed
    }
    low = min(x for x, _ in points.values()) / 2
    high = max(max(x for x, _ in points.values()) * 2, 2e3)
    copy, roofs = (
        data["ceilings"]["copy"],
        {k: v for k, v in data["ceilings"].items() if v and k not in ("copy", "fp16")},
    )
    for (name, ceiling), colour in zip(sorted(roofs.items(), key=lambda item: -item[1]), style.COLOURS, strict=False):
        edge = ceiling / copy
        ax.plot([low, min(edge, high), high], [low * copy, min(ceiling, high * copy), min(ceiling, high * copy)],
                color=colour, linewidth=1.4, zorder=2)  # fmt: skip
        ax.annotate(
            f"{name} {ceiling / 1e12:.0f} Tflop/s", (high, ceiling), ha="right", va="bottom", fontsize=8.5, color=colour
        )
    others, ours = [], {}
    for group in dict.fromkeys(row["group"] for row in timed):
        rest = [row for row in timed if row["group"] == group and not _ours(row["name"])]
        others += [points[row["name"] + group] for row in sorted(rest, key=lambda row: row["ms"])[:1]]
        best = sorted((row for row in timed if row["group"] == group and _ours(row["name"])), key=lambda row: row["ms"])
        for row in best[:1]:
            ours.setdefault(group.split()[0], []).append(points[row["name"] + group])
    if others:
        ax.scatter(
            *zip(*others, strict=True), s=22, color=style.GREY, alpha=0.6, label="fastest other of each group", zorder=3
        )
    marks = "osD^v<>ph8X*"
    for i, (op, found) in enumerate(ours.items()):
        colour, mark = style.COLOURS[i % 4], marks[i // 4 % len(marks)]
        ax.scatter(
            *zip(*found, strict=True),
            s=34,
            color=colour,
            marker=mark,
            label=op,
            zorder=4,
            edgecolor="white",
            linewidth=0.5,
        )
    ax.set(xscale="log", yscale="log", xlim=(low, high))
    style.labels(
        ax, "flops a byte, at the least", "flop/s, of the least work", f"Roofline, {data['machine'].get('device', '')}"
    )
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
