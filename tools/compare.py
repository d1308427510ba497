"""Runs side by side, as a Markdown table: IoU of each class, mean, standard
deviation and 95 % t interval.

    python tools/compare.py METHOD RUN [RUN ...]

METHOD is a key of runs/RUN/eval.json, such as "val, plain"; or a list and a
kind of labels, such as "val, Ycrf", of runs/RUN/labels/scores.json. The runs
differ in their seed alone, if the interval is to be one over seeds.
"""
import json
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

# 97.5 % of Student's t with 1, 2, ..., 30 degrees of freedom lies below these.
T = [float(value) for value in (
    "12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 "
    "2.201 2.179 2.160 2.145 2.131 2.120 2.110 2.101 2.093 2.086 "
    "2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042").split()]


def read_scores(run: Path) -> dict[str, dict]:
    """All scores of a run's folder, by METHOD: images, miou, iou by class."""
    def content(name):
        path = run / name
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    labels = {f"{split}, {kind}": scores
              for split, kinds in content("labels/scores.json").items()
              for kind, scores in kinds.items()}
    return content("eval.json") | labels


def row(name: str, values: Sequence[float | None]) -> str:
    """A line of the table; None: the class is neither true nor given."""
    cells = ["-" if v is None else f"{v:.1f}" for v in values]
    known = [v for v in values if v is not None]
    if 1 < len(known) == len(values):
        half = T[min(len(known) - 1, 30) - 1] * stdev(known) / sqrt(len(known))
        cells += [f"{mean(known):.2f}", f"{stdev(known):.2f}", f"± {half:.2f}"]
    elif len(values) > 1:
        cells += ["-"] * 3
    return f"| {' | '.join([name, *cells])} |"


def table(method: str, runs: Sequence[str]) -> str:
    """The table. ValueError: a run has no such scores, or of other images."""
    found = []
    for run in runs:
        scores = read_scores(Path("runs", run))
        if method not in scores:
            raise ValueError(f"runs/{run}: no scores of {method!r}, only of "
                             f"{', '.join(map(repr, scores)) or 'nothing'}")
        found.append(scores[method])
        if found[-1]["images"] != found[0]["images"]:
            raise ValueError(f"runs/{run}: scores of {found[-1]['images']} "
                             f"images, not of {found[0]['images']}")
    heads = [f"IoU, %, {method}", *runs]
    heads += ["mean", "deviation", "95 %"] if len(runs) > 1 else []
    return "\n".join([
        f"| {' | '.join(heads)} |", "|---" * len(heads) + "|",
        *(row(name, [s["iou"].get(name) for s in found])
          for name in found[0]["iou"]),
        row("mean", [s["miou"] for s in found])])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python tools/compare.py METHOD RUN [RUN ...]")
    try:
        print(table(sys.argv[1], sys.argv[2:]))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
