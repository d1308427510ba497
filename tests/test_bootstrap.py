"""benchmarks/bootstrap.py: on draws that can be counted, and on label images."""
import math
import sys

import numpy as np
import pytest
from conftest import ROOT

import datasets
from tools.shapes import make_shapes

pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "benchmarks"))
import bootstrap


def test_two_images():
    """One image is all right, in the other nothing is: of two draws, 2, 1 or 0 are of the first one, with 1/4, 1/2
    and 1/4. Label 1 is nowhere."""
    right, wrong = np.array([[4, 0, 0], [0, 0, 0]]), np.array([[0, 0, 4], [0, 0, 0]])
    whole, result = bootstrap.bootstrap([np.stack((right, wrong))], [np.stack((wrong, wrong))], ["a", "b"], 4000)
    assert whole == 50
    values, counts = np.unique(result.bootstrap_distribution, return_counts=True)
    assert values.tolist() == [0, 50, 100]
    for count, share in zip(counts, (1 / 4, 1 / 2, 1 / 4)):
        assert abs(count - 4000 * share) < 5 * math.sqrt(4000 * share * (1 - share))


def test_pairs_seeds_and_percentiles():
    right, wrong = np.array([[4, 0, 0], [0, 0, 0]]), np.array([[0, 0, 4], [0, 0, 0]])
    one, two, none = (np.stack(images) for images in (
        (right, wrong, wrong), (right, right, wrong), (wrong, wrong, wrong)))
    # Two seeds in another order: any draw of the same images has the same mean on both sides.
    _, result = bootstrap.bootstrap([one, two], [two, one], ["a", "b"], 500)
    assert not result.bootstrap_distribution.any()
    whole, _ = bootstrap.bootstrap([one, two], [none, none], ["a", "b"], 500)
    assert whole == pytest.approx(50)
    whole, result = bootstrap.bootstrap([one], [none], ["a", "b"], 4000)
    assert whole == pytest.approx(100 / 3)
    assert np.allclose(result.confidence_interval, np.percentile(result.bootstrap_distribution, [2.5, 97.5]))
    assert np.allclose(result.confidence_interval, [0, 100])  # of 27 draws 8 have no right image, one has only those
    _, again = bootstrap.bootstrap([one], [none], ["a", "b"], 4000)
    assert np.array_equal(again.bootstrap_distribution, result.bootstrap_distribution)


def test_it_is_the_mean_over_classes_of_scores(tmp_path, monkeypatch, capsys):
    """The truth itself minus labels of nothing but background: 100 minus the background's share / 7."""
    monkeypatch.chdir(tmp_path)
    make_shapes(tmp_path / "data/shapes", train=1, val=5)
    pixels, background, shown = 0, 0, set()
    for name in datasets.read_list("data/shapes", "val"):
        truth = datasets.read_mask(f"data/shapes/SegmentationClassAug/{name}.png", 7)
        datasets.write_mask(tmp_path / f"empty/{name}.png", np.zeros_like(truth))
        pixels, background = pixels + (truth < 255).sum(), background + (truth == 0).sum()
        shown |= set(truth.flat) - {255}
    truth = "data/shapes/SegmentationClassAug"
    bootstrap.main(str(ROOT / "configs/shapes.yaml"), "val", truth, truth, "minus", "empty", "empty")
    expected = 100 - 100 * background / pixels / len(shown)
    said = capsys.readouterr().out
    assert float(said.split()[1].rstrip(",")) == pytest.approx(expected, abs=0.01) and "draws of 5 images" in said
