"""Tables of docs/results.md, of the scores in docs/voc2007: differences on unseen images, in mIoU of labels and of
segmenters, and in pixel accuracy of segmenters; IoU of each class of labels, and of segmenters, plain and final.

    python benchmarks/tables.py

A run is called as by voc2007.py, with {} for its seed. A row of differences has each seed of which all its runs were
trained; of two runs the mean counts. Seeds s and s + 3 share their labels: of the 95 % t intervals over the seeds, and
over sets of labels with the mean of the seeds that share one, the wider is printed. They need scipy.
"""
import json
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.compare import by_key, half_interval  # noqa: E402
from tools.paper import FULL  # noqa: E402

LIST = "Segmentation/test"
LABELS = [  # title, kind of labels, runs, minus runs, the paper's difference
    ("BAP - average pooling, Ycrf", "Ycrf", ["bap_{}"], ["gap_{}"], "+3.1"),
    ("BAP - average pooling, Yret", "Yret", ["bap_{}"], ["gap_{}"], ""),
    ("with u0 - without, BAP's Ycrf", "Ycrf", ["bap_{}"], ["bap_{}_nou0"], "+1.4"),
    ("from logits - from u0 and u_c, BAP's Ycrf", "Ycrf", ["bap_{}_improved"], ["bap_{}"], ""),
    ("average pooling from logits - BAP from u0 and u_c, Ycrf", "Ycrf", ["gap_{}_improved"], ["bap_{}"], ""),
    ("BAP - average pooling, Ycrf from logits", "Ycrf", ["bap_{}_improved"], ["gap_{}_improved"], "")]
SEGMENTERS = [  # title, runs, minus runs, the paper's differences
    ("NAL - 422 true masks", ["nal_{}"], ["masks_{}"], ""),
    ("NAL - whole boxes", ["nal_{}"], ["boxes_{}"], ""),
    ("whole boxes - 422 true masks", ["boxes_{}"], ["masks_{}"], ""),
    ("422 true masks and other images' boxes - all boxes, NAL", ["masks_and_boxes_{}"], ["nal_{}"], "- / +2.4"),
    ("NAL - cross-entropy on Ycrf", ["nal_{}"], ["crf_{}"], "- / +0.3"),
    ("NAL - cross-entropy where Ycrf and Yret agree", ["nal_{}"], ["agree_{}"], "+0.6 / +0.6"),
    ("cross-entropy where Ycrf and Yret agree - on Ycrf", ["agree_{}"], ["crf_{}"], "- / -0.3"),
    ("Yret - Ycrf, cross-entropy", ["ret_{}"], ["crf_{}"], "- / -1.7"),
    ("labels from logits - from u0 and u_c, mean of NAL and cross-entropy", ["nal_{}_improved", "crf_{}_improved"],
     ["nal_{}", "crf_{}"], "")]
CLASSES_OF_LABELS = {  # column: run, kind of labels
    "whole boxes": ("bap_{}", "box"),
    "average pooling, Ycrf": ("gap_{}", "Ycrf"),
    "BAP, Ycrf": ("bap_{}", "Ycrf"),
    "average pooling, Ycrf from logits": ("gap_{}_improved", "Ycrf"),
    "BAP, Ycrf from logits": ("bap_{}_improved", "Ycrf"),
    "BAP, Yret": ("bap_{}", "Yret")}
CLASSES_OF_SEGMENTERS = {  # column: run
    "NAL": "nal_{}",
    "NAL, labels from logits": "nal_{}_improved",
    "cross-entropy, Ycrf": "crf_{}",
    "cross-entropy, Ycrf from logits": "crf_{}_improved",
    "cross-entropy, Yret": "ret_{}",
    "cross-entropy, agreement": "agree_{}",
    "whole boxes": "boxes_{}",
    "masks": "masks_{}",
    "masks and boxes": "masks_and_boxes_{}"}


def read() -> dict[str, dict[str, dict]]:
    """{run: {KEY of tools/compare.py: its scores}}"""
    files = (ROOT / "docs/voc2007").glob("*.json")
    return {name.removeprefix("voc2007_"): by_key(run)
            for file in files for name, run in json.loads(file.read_text("utf-8")).items()}


def differences(runs: dict, method: str, first: list[str], second: list[str],
                measure: str = "miou") -> dict[int, float]:
    """{seed: difference on the unseen images}"""
    found = {}
    for seed in range(8):
        sides = [[runs.get(name.format(seed)) for name in names] for names in (first, second)]
        if all(sides[0] + sides[1]):
            a, b = (mean(run[f"{LIST}, {method}"][measure] for run in side) for side in sides)
            found[seed] = a - b
    return found


def cells(by_seed: dict[int, float]) -> str:
    """Seed by seed; and the mean, of three sets of labels with its interval, in bold if 0 is not in it: over all seeds,
    or, if that is wider, over the means of seeds that share their labels.
    """
    values = [*by_seed.values()]
    sets = [[v for seed, v in by_seed.items() if seed % 3 == first] for first in range(3)]
    interval = f"{mean(values):+.2f}"
    if all(sets):
        wider = max(values, [*map(mean, sets)], key=half_interval)
        centre, half = mean(wider), half_interval(wider)
        bold = "**" if half < abs(centre) else ""
        interval = f"{bold}{centre:+.2f} ± {half:.2f}{bold}"
    return f"{', '.join(f'{v:+.1f}' for v in values)} | {interval}"


def table_of_labels(runs: dict) -> str:
    lines = ["| labels | seeds | seed by seed | mean | paper |", "|---|---|---|---|---|"]
    for title, kind, *sides, paper in LABELS:
        found = differences(runs, kind, *sides)
        lines.append(f"| {title} | {', '.join(map(str, found))} | {cells(found)} | {paper} |")
    return "\n".join(lines)


def row_of_segmenters(runs: dict, measure: str, title: str, *sides: list[str]) -> str:
    plain, final = (differences(runs, method, *sides, measure) for method in ("plain", FULL))
    return f"| {title} | {', '.join(map(str, plain))} | {cells(plain)} | {cells(final)} |"


def table_of_segmenters(runs: dict) -> str:
    return "\n".join([
        "| segmenters | seeds | plain | mean | final | mean | paper |", "|---|---|---|---|---|---|---|",
        *(f"{row_of_segmenters(runs, 'miou', *row)} {paper} |" for *row, paper in SEGMENTERS)])


def table_of_pixels(runs: dict) -> str:
    return "\n".join([
        "| pixel accuracy | seeds | plain | mean | final | mean |", "|---|---|---|---|---|---|",
        *(row_of_segmenters(runs, "pixel_accuracy", *row) for *row, _ in SEGMENTERS)])


def table_of_classes(runs: dict, head: str, columns: dict[str, tuple[str, str]]) -> str:
    """Of columns {title: (run, method)}: IoU, the mean over seeds 0, 1 and 2."""
    found = [[runs[run.format(seed)][f"{LIST}, {method}"] for seed in range(3)] for run, method in columns.values()]
    rows = [[head, *columns]]
    for name in found[0][0]["iou"]:
        rows.append([name, *(f"{mean(s['iou'][name] for s in scores):.1f}" for scores in found)])
    rows.append(["mean", *(f"{mean(s['miou'] for s in scores):.1f}" for scores in found)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def tables(runs: dict) -> list[str]:
    return [table_of_labels(runs), table_of_segmenters(runs), table_of_pixels(runs),
            table_of_classes(runs, "IoU, %", CLASSES_OF_LABELS)] + [
        table_of_classes(runs, f"IoU, %, {name}", {
            title: (run, method) for title, run in CLASSES_OF_SEGMENTERS.items()})
        for name, method in (("plain", "plain"), ("final", FULL))]


if __name__ == "__main__":
    print("\n\n".join(tables(read())))
