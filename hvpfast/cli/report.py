"""`report.html`: the demo's table, pictures and what they show, in one file that needs nothing else."""

from __future__ import annotations

import base64
import html
from pathlib import Path

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #22272e; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.lead { color: #57606a; margin-top: 0; }
.wide { overflow-x: auto; background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { text-align: right; padding: .45rem .8rem; white-space: nowrap; } th { color: #57606a; font-weight: 600; }
tr + tr td, thead + tbody td { border-top: 1px solid #eef0f2; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; font-size: .92rem; margin: 0; }
dt { color: #57606a; } dd { margin: 0; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: .8rem; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { font-size: .9rem; color: #424a53; padding: .5rem .3rem 0; }
li { margin: .3rem 0; }
@media (max-width: 30rem) { .pictures { grid-template-columns: 1fr; } }
"""

_CAPTIONS = {
    "training": "Loss over all training samples and accuracy on the test samples, before training (epoch 0) and after each "
    "epoch.",
    "sharpness": "The two ends of the Hessian's spectrum. The dashed line is the largest eigenvalue that full-batch training "
    "with this optimiser tolerates. The vertical axis is logarithmic away from zero when the line lies far above.",
    "density": "How the Hessian's eigenvalues are distributed after training, by stochastic Lanczos quadrature. Nearly all "
    "lie at zero; the few on the right carry the curvature. Stems are the nodes of the quadrature.",
    "landscape": "The loss on a plane through the trained parameters (star), along two random, orthogonal directions in which "
    "every filter is scaled to the norm of the network's own (Li et al. 2018). Another seed shows "
    "another plane, and the star need not be its lowest point.",
}


def sentences(rows: list[dict], threshold, edge, check: dict) -> dict[str, str]:
    """What the run found, in words, by subject."""
    last, top = rows[-1], max(row["lambda_max"] for row in rows)
    ratio = threshold.value / top
    error = "" if edge.stderr != edge.stderr else f" +- {edge.stderr:.2g}"
    return {
        "accuracy": f"Accuracy on the test samples after {last['epoch']} epochs: {100 * last['test_accuracy']:.1f} %.",
        "threshold": f"Stability: the threshold of {threshold.optimiser} is {threshold.formula}; the largest eigenvalue seen, "
        f"{top:.4g}, is {ratio:.3g} times below it. {threshold.note} A value far below means that the step size does not limit "
        f"the sharpness here.",
        "batch_sharpness": f"Batch sharpness, the curvature of a batch's loss along its own gradient: {edge.value:.4g}{error} "
        f"at the end (lambda_max {last['lambda_max']:.4g}).",
        "check": f"Check of the last lambda_max: {check['ours']:.8g} by hvpfast, {check['lambda_max']:.8g} by ARPACK in float64 "
        f"without hvpfast; relative difference {check['relative_difference']:.1e}.",
    }


def write(results: dict, out: Path) -> Path:
    """Write `report.html` beside the pictures; they are inlined."""
    data, settings = results["data"], results["settings"]
    lead = (
        f"One hidden ReLU layer of {settings['hidden']} ({results['parameters']} parameters), SGD {settings['lr']} with "
        f"momentum {settings['momentum']}, batches of {settings['batch_size']}, cross entropy, on {data['name']}: "
        f"{data['train']} training and {data['test']} test samples."
    )
    if settings["curvature_samples"] < data["train"]:
        lead += f" Curvature is that of the mean loss over the first {settings['curvature_samples']} training samples."
    figures = "".join(
        f'<figure><img alt="{subject}" src="data:image/png;base64,{_encoded(out / name)}">'
        f"<figcaption>{html.escape(_CAPTIONS[subject])}</figcaption></figure>"
        for subject, name in results["pictures"].items()
    )
    body = [
        f"<h1>Curvature of a network trained on {html.escape(data['name'])}</h1>",
        f'<p class="lead">{html.escape(lead)}</p>',
        "<h2>Epoch by epoch</h2>",
        _table(results["epochs"]),
        "<h2>What was found</h2><ul>",
        *(f"<li>{html.escape(text)}</li>" for text in results["sentences"].values()),
        "</ul>",
        f'<h2>Pictures</h2><div class="pictures">{figures}</div>' if figures else "",
        "<h2>How it was made</h2>",
        _facts(results),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>hvpfast demo: {html.escape(data['name'])}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _table(rows: list[dict]) -> str:
    heads = (
        "epoch",
        "training loss",
        "test accuracy",
        "λ<sub>max</sub>",
        "λ<sub>min</sub>",
        "trace",
        "matvecs",
        "time (s)",
    )
    cells = [
        (
            str(row["epoch"]),
            f"{row['loss']:.5f}",
            f"{100 * row['test_accuracy']:.1f} %",
            f"{row['lambda_max']:.4f}",
            f"{row['lambda_min']:.4f}",
            f"{row['trace']:.3f} ± {row['stderr']:.3f}",
            str(row["matvecs"]),
            f"{row['train_s'] + row['curvature_s']:.1f}",
        )
        for row in rows
    ]
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    walls = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in results["wall_s"].items())
    facts = {
        "data": f"{results['data']['source']}, sha256 {results['data']['sha256']}",
        "seed": results["settings"]["seed"],
        "device": results["device"],
        "versions": versions,
        "time": walls,
        "check": results["check"]["method"],
    }
    return (
        "<dl>"
        + "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
        + "</dl>"
    )


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
