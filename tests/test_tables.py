"""benchmarks/tables.py: docs/results.md has the tables that it prints, and they are what the runs say."""
import json
import subprocess
import sys
from statistics import mean, stdev

import pytest
from conftest import ROOT

pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "benchmarks"))
import tables


def published(file):
    return json.loads((ROOT / f"docs/voc2007/{file}.json").read_text())


def test_results_has_these_tables():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py"], capture_output=True, text=True)
    printed = done.stdout.strip().split("\n\n")
    results = (ROOT / "docs/results.md").read_text()
    assert len(printed) == 6, done.stderr
    assert all(f"\n\n{table}\n\n" in results for table in printed)


def test_published_scores():
    runs = tables.read()
    assert runs["bap_1"] == {f"{split}, {kind}": scores for split, kinds in
                             published("labels")["voc2007_bap_1"]["labels/scores.json"].items()
                             for kind, scores in kinds.items()}
    assert runs["nal_1"] == published("segmenters")["voc2007_nal_1"]["eval.json"]


def test_differences_of_the_seeds_that_have_both():
    scores = dict(a_0=60, a_1=62, a_2=70, a_4=61, b_0=61, b_1=60, b_4=60, c_0=50)
    runs = {name: {"Segmentation/test, plain": {"miou": miou}} for name, miou in scores.items()}
    assert tables.differences(runs, "plain", ["a_{}"], ["b_{}"]) == {0: -1, 1: 2, 4: 1}
    assert tables.differences(runs, "plain", ["a_{}", "c_{}"], ["b_{}", "b_{}"]) == {0: 55 - 61}


@pytest.mark.parametrize("by_seed, t, wider", [
    ({0: 2.0, 1: 3.0, 2: 4.0}, 4.303, [2.0, 3.0, 4.0]), ({0: -1.0, 1: 2.0, 2: 1.0}, 4.303, [-1.0, 2.0, 1.0]),
    # Seeds 1 and 4 have the same labels: over four seeds, then over three sets of labels it is wider.
    ({0: 1.0, 1: 5.0, 2: 2.0, 4: -2.0}, 3.182, [1.0, 5.0, 2.0, -2.0]),
    ({0: 1.0, 1: 5.0, 2: 2.0, 4: 5.5}, 4.303, [1.0, 5.25, 2.0])])
def test_mean_and_interval(by_seed, t, wider):
    values, half = by_seed.values(), t * stdev(wider) / len(wider) ** 0.5
    centre = mean(wider)
    seeds, interval = tables.cells(by_seed).split(" | ")
    assert seeds == ", ".join(f"{value:+.1f}" for value in values)
    assert interval.strip("*") == f"{centre:+.2f} ± {half:.2f}"
    assert interval.startswith("**") == (abs(centre) > half) == interval.endswith("**")


def test_fewer_than_three_sets_of_labels_have_no_interval():
    assert tables.cells({1: 1.5}) == "+1.5 | +1.50"
    assert tables.cells({1: 1.0, 2: 2.0, 4: 5.0}) == "+1.0, +2.0, +5.0 | +2.67"


def test_pixel_accuracy_is_not_miou():
    key = "Segmentation/test, plain"
    runs = {"a_0": {key: dict(miou=1, pixel_accuracy=5)}, "b_0": {key: dict(miou=3, pixel_accuracy=2)}}
    assert tables.differences(runs, "plain", ["a_{}"], ["b_{}"], "pixel_accuracy") == {0: 3}


def test_classes_are_means_over_the_seeds():
    kinds = {run: {"Segmentation/test, plain": dict(iou=dict(cat=cat, dog=dog), miou=miou)} for run, cat, dog, miou in (
        ("a_0", 50, 60, 55), ("a_1", 53, 61, 57), ("a_2", 52, 60, 56), ("a_4", 0, 0, 0),
        ("b_0", 1, 2, 3), ("b_1", 1, 3, 5), ("b_2", 1, 7, 7))}
    table = tables.table_of_classes(kinds, "IoU", {"A": ("a_{}", "plain"), "B": ("b_{}", "plain")})
    assert table.splitlines() == ["| IoU | A | B |", "|---|---|---|", "| cat | 51.7 | 1.0 |", "| dog | 60.3 | 4.0 |",
                                  "| mean | 56.0 | 5.0 |"]
