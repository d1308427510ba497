"""Runs side by side, as a Markdown table: IoU of each class, mean, standard
deviation and 95 % t interval.

    python tools/compare.py KEY RUN [RUN ...] [minus RUN [RUN ...]]

KEY is a key of runs/RUN/eval.json, such as "val, plain"; or a list and a
kind of labels, such as "val, Ycrf", of runs/RUN/labels/scores.json. The runs
differ in their seed alone, if the interval is to be one over seeds (it needs
scipy). After minus come as many runs of the same seeds, in the same order: the
table is of the differences, seed by seed.
"""
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev


def read_scores(run: Path) -> dict[str, dict]:
    """All scores of a run's folder, by KEY: images, miou, iou by class."""
    names = "eval.json", "labels/scores.json"
    return by_key({name: json.loads((run / name).read_text("utf-8"))
                   for name in names if (run / name).exists()})


def by_key(files: dict[str, dict]) -> dict[str, dict]:
    """The same, given what is in its eval.json and labels/scores.json."""
    labels = {f"{split}, {kind}": scores
              for split, kinds in files.get("labels/scores.json", {}).items()
              for kind, scores in kinds.items()}
    return files.get("eval.json", {}) | labels


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % t interval of the mean of two values or more."""
    try:
        from scipy import stats
    except ImportError:
        raise ValueError("the 95 % interval needs scipy: pip install scipy") from None
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def row(name: str, values: Sequence[float | None]) -> str:
    """A line of the table; None: the class is neither true nor given."""
    cells = ["-" if v is None else f"{v:.1f}" for v in values]
    known = [v for v in values if v is not None]
    if 1 < len(known) == len(values):
        cells += [f"{mean(known):.2f}", f"{stdev(known):.2f}",
                  f"± {half_interval(known):.2f}"]
    elif len(values) > 1:
        cells += ["-"] * 3
    return f"| {' | '.join([name, *cells])} |"


def find_scores(key: str, runs: Sequence[str]) -> list[dict]:
    """Scores of each run. ValueError: a run has none, or of other images."""
    found = []
    for run in runs:
        scores = read_scores(Path("runs", run))
        if key not in scores:
            raise ValueError(f"runs/{run}: no scores of {key!r}, only of "
                             f"{', '.join(map(repr, scores)) or 'nothing'}")
        found.append(scores[key])
        if found[-1]["images"] != found[0]["images"]:
            raise ValueError(f"runs/{run}: scores of {found[-1]['images']} "
                             f"images, not of {found[0]['images']}")
    return found


def minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def table(key: str, runs: Sequence[str], others: Sequence[str] = ()) -> str:
    """The table of the runs, or of their differences to the others."""
    found = find_scores(key, [*runs, *others])
    rows = {name: [s["iou"].get(name) for s in found]
            for name in found[0]["iou"]} | {"mean": [s["miou"] for s in found]}
    heads = list(runs)
    if others:
        if len(runs) != len(others):
            raise ValueError(f"{len(runs)} runs minus {len(others)}: give one "
                             "of each seed on both sides")
        heads = [f"{a} - {b}" for a, b in zip(runs, others)]
        rows = {name: list(map(minus, v[:len(runs)], v[len(runs):]))
                for name, v in rows.items()}
    heads += ["mean", "deviation", "95 %"] if len(runs) > 1 else []
    return "\n".join([f"| {' | '.join([f'IoU, %, {key}', *heads])} |",
                      "|---" * (len(heads) + 1) + "|",
                      *(row(name, values) for name, values in rows.items())])


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[-1] == "minus":
        print("usage: python tools/compare.py KEY RUN [RUN ...] "
              "[minus RUN [RUN ...]]", file=sys.stderr)
        sys.exit(2)
    key, *runs = sys.argv[1:]
    cut = runs.index("minus") if "minus" in runs else len(runs)
    try:
        print(table(key, runs[:cut], runs[cut + 1:]))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
