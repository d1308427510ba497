"""benchmarks/differences.py: the first tables of docs/results.md are what it prints, and that is what the runs say."""
import json
import subprocess
import sys
from statistics import mean, stdev

import pytest
from conftest import ROOT

pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "benchmarks"))
import differences


def test_the_first_tables_of_results():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/differences.py"], capture_output=True, text=True)
    assert done.stdout.count("\n\n") == 1, done.stderr
    assert f"\n\n{done.stdout}\n" in (ROOT / "docs/results.md").read_text()


def test_published_scores():
    labels, segmenters = (json.loads((ROOT / f"docs/voc2007/{name}.json").read_text())
                          for name in ("labels", "segmenters"))
    runs = differences.read()
    lists = labels["voc2007_bap_1"]["labels/scores.json"]
    assert runs["bap_1"] == {f"{split}, {kind}": lists[split][kind]["miou"]
                             for split in ("Segmentation/trainval", "Segmentation/test")
                             for kind in ("box", "Ycrf", "Yret")}
    results = segmenters["voc2007_nal_1"]["eval.json"]
    assert runs["nal_1"] == {method: scores["miou"] for method, scores in results.items()}


def test_differences_of_the_seeds_that_have_both():
    scores = dict(a_0=60, a_1=62, a_2=70, a_4=61, b_0=61, b_1=60, b_4=60, c_0=50)
    runs = {name: {"Segmentation/test, plain": miou} for name, miou in scores.items()}
    assert differences.differences(runs, "plain", ["a_{}"], ["b_{}"]) == {0: -1, 1: 2, 4: 1}
    assert differences.differences(runs, "plain", ["a_{}", "c_{}"], ["b_{}", "b_{}"]) == {0: 55 - 61}


@pytest.mark.parametrize("values, t", [([2.0, 3.0, 4.0], 4.303), ([-1.0, 2.0, 1.0], 4.303), ([-5.0, -5.5], 12.706)])
def test_mean_and_interval(values, t):
    by_seed, interval = differences.cells(values).split(" | ")
    half = t * stdev(values) / len(values) ** 0.5
    assert by_seed == ", ".join(f"{value:+.1f}" for value in values)
    assert interval.strip("*") == f"{mean(values):+.2f} ± {half:.2f}"
    assert interval.startswith("**") == (abs(mean(values)) > half) == interval.endswith("**")


def test_one_difference_has_no_interval():
    assert differences.cells([1.5]) == "+1.5 | +1.50"
