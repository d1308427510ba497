"""benchmarks/maps.py, sigma.py, details.py, unaries.py, prototypes.py: their measures, counted pair by pair; their
tables, of small runs."""
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, script

import datasets
import models
import runs
from tools.shapes import SHAPES, make_shapes

pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "benchmarks"))
import details
import maps
import prototypes
import sigma


def counted(positive, negative):
    """AUC, pair by pair."""
    pairs = [(a > b) + (a == b) / 2 for a in positive for b in negative]
    return sum(pairs) / len(pairs)


def test_auc():
    rng = np.random.default_rng(0)
    values, positive = rng.integers(0, 9, 60) / 8, rng.random(60) < 0.3
    assert maps.auc(values, positive) == pytest.approx(counted(values[positive], values[~positive]))


def test_row_of_histograms():
    counts = np.zeros((2, sigma.BINS), np.int64)
    wrong, right = (100, 400, 700), (400, 900, 900, 950)
    for row, bins in zip(counts, (wrong, right)):
        np.add.at(row, list(bins), 1)
    cells = sigma.row(1500, counts).strip("| ").split(" | ")
    middle = [(bin + 0.5) / sigma.BINS for bin in (*wrong, *right)]
    assert cells == ["1,500", f"{counted(right, wrong):.3f}",
                     f"{np.mean(middle[3:]):.2f}", f"{np.mean(middle[:3]):.2f}",
                     "75.0 %", "66.7 %", f"{100 * sum(middle[3:]) / sum(middle):.1f} %"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_shapes("data/shapes", train=2, val=8)
    return tmp_path


def checkpoint(network, path, **made_with):
    runs.save(path, dict(network=dict(kind=type(network).__name__, backbone="vgg16", width=0.0625),
                         classes=list(SHAPES), settings=made_with, model=network.state_dict()))


def test_table_of_maps(folder, capsys):
    checkpoint(models.BoxClassifier(len(SHAPES), width=0.0625), folder / "cls.pt")
    maps.main(str(ROOT / "configs/shapes.yaml"), "val", "cls.pt", "run.workers=0", "device=cpu")
    lines = capsys.readouterr().out.splitlines()
    pairs, *aucs = lines[2].split(" | ")[1:]
    labels = [set(datasets.read_mask(f"data/shapes/SegmentationClassAug/{name}.png", 7).flat) - {0, 255}
              for name in datasets.read_list("data/shapes", "val")]
    assert int(pairs) == sum(map(len, labels)) and all(0 <= float(x.strip(" |")) <= 1 for x in aucs)
    assert lines[3].endswith("| 0 | - | - | - |") and lines[4].split(" | ")[1:] == lines[2].split(" | ")[1:]


def test_maps_that_are_the_truth(folder, capsys, monkeypatch):
    """u_c and the log-odds are the true mask, u0 is high on the objects: AUC 1, 1 and 0."""
    checkpoint(models.BoxClassifier(len(SHAPES), width=0.0625), folder / "cls.pt")
    unaries = maps.make_labels.unaries

    def known(config, network, sample):
        u, truth, w = unaries(config, network, sample), sample["masks"][0], network.classifier.weight
        masks = torch.stack([truth == label for label in range(len(w))]).float()
        rows = {tuple(row): mask for row, mask in zip(w.tolist(), masks)}
        dot = SimpleNamespace(dot=lambda vectors: torch.stack([rows[tuple(v)] for v in vectors.tolist()]))
        return u._replace(up=dot, cams=masks[u.classes], attention=1 - masks[0])

    monkeypatch.setattr(maps.make_labels, "unaries", known)
    maps.main(str(ROOT / "configs/shapes.yaml"), "val", "cls.pt", "run.workers=0", "device=cpu")
    assert capsys.readouterr().out.splitlines()[2].endswith("| 1.000 | 0.000 | 1.000 |")


def test_table_of_sigma(folder, capsys):
    network = models.DeepLab(1 + len(SHAPES), width=0.0625)
    checkpoint(network, folder / "runs/a/seg.pt", **{"train_seg.iterations": 30})
    torch.nn.init.normal_(network.classifier.weight)
    runs.save(folder / "runs/a/seg_10.pt", dict(model=network.state_dict(), iteration=10))
    truth = folder / "data/shapes/SegmentationClassAug"
    counts = np.zeros(256, int)
    for name in datasets.read_list("data/shapes", "val"):  # Yret misses labels 1 and 2, Ycrf takes 2 for 3
        mask = datasets.read_mask(truth / f"{name}.png", 7)
        counts += np.bincount(mask.ravel(), minlength=256)
        datasets.write_mask(folder / f"crf/{name}.png", np.where(mask == 2, 3, mask))
        datasets.write_mask(folder / f"ret/{name}.png", np.where(mask < 3, 0, mask))
    assert counts[1] and counts[2]
    sigma.main(str(ROOT / "configs/shapes.yaml"), "val", "crf", "ret", "a", "run.workers=0", "device=cpu")
    said, differ = capsys.readouterr().out, counts[1] + counts[2]
    assert f"agree on {100 * (1 - differ / counts[:255].sum()):.1f} %" in said and "right on 100.0 % of" in said
    assert f"Ycrf is right on {100 * counts[1] / differ:.1f} %, Yret on 0.0 %" in said
    rows = [line.strip("| ").split(" | ") for line in said.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["10", "30"] and rows[0][1:] != rows[1][1:]


def test_table_of_details(folder, capsys):
    """Rows of settings are make_labels.py's own scores; what is of Yret alone changes no Ycrf."""
    torch.manual_seed(0)
    network = models.BoxClassifier(len(SHAPES), width=0.0625)
    torch.nn.init.normal_(network.classifier.weight)
    checkpoint(network, folder / "cls.pt")
    quick = "run.workers=0", "run.device=cpu", "crf_iterations=1"
    logits = {"logits": {"unary": "logits", "logit_scale": 0.6, "cosine_scale": 2.0, "sizes": [1, 1.5]}}
    details.main(str(ROOT / "configs/shapes.yaml"), "val", "cls.pt", *quick, before=details.BEFORE | logits)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    found = {detail: (cells[0], cells[2]) for detail, *cells in rows}
    assert set(found) == {*details.BEFORE, *logits, details.ANYWHERE, details.LACKING}
    for number, (detail, changes) in enumerate((details.BEFORE | logits).items()):
        done = script("make_labels", "weights=cls.pt", "splits=[val]", *quick, f"name={number}",
                      *(f"{key}={value}" for key, value in changes.items()), cwd=folder)
        assert done.returncode == 0, done.stderr
        scores = runs.read_json(folder / f"runs/{number}/labels/scores.json")["val"]
        assert found[detail] == tuple(f"{scores[kind]['miou']:.1f}" for kind in ("Ycrf", "Yret"))
    assert len(set(found.values())) > 1 and found[details.LACKING][0] == found[details.SETTINGS][0]


def test_table_of_unaries(folder):
    torch.manual_seed(0)
    network = models.BoxClassifier(len(SHAPES), width=0.0625)
    torch.nn.init.normal_(network.classifier.weight)
    checkpoint(network, folder / "cls.pt")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/unaries.py", ROOT / "configs/shapes.yaml", "val", "cls.pt",
         "run.workers=0", "run.device=cpu", "crf_iterations=1"], capture_output=True, text=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 8 == len({tuple(cells) for _, *cells in rows})
    assert rows[0][0] == details.SETTINGS and rows[3][0] == "k 0.05, d 6, s 1, sizes 1, 1.5, 2"


def test_mistakes_are_counted_pixel_by_pixel():
    rng = np.random.default_rng(0)
    truth, y_ret = rng.choice([0, 1, 2, 255], (2, 9, 11), p=[0.4, 0.3, 0.2, 0.1])
    attention = rng.choice([0.2, 0.5, 0.9, 1.0], (9, 11))
    y_ret[y_ret == 255] = 0
    expected = np.zeros((3, 2), int)
    for t, y, a in zip(truth.flat, y_ret.flat, attention.flat):
        if t in (1, 2) and a < 1:
            expected[int(a >= 0.5)] += 1, y == 0
        elif t == 0 and a < 1:
            expected[2] += 1, y != 0
    found = prototypes.mistakes(*map(torch.from_numpy, (truth, y_ret, attention)))
    assert found.tolist() == expected.tolist() and expected.min() > 0
    (low, missed), (high, missed_too), (background, called) = expected.tolist()
    shares = [(missed + missed_too) / (low + high), high / (low + high), missed / low, missed_too / high,
              called / background]
    assert prototypes.row_of_mistakes(found) == " | ".join(f"{100 * share:.1f}" for share in shares)


def test_table_of_prototypes(folder, capsys):
    """Of Ycrf itself it is make_labels.py's Yret; of the truth another; of labels that have no class in them, Yret of
    the classifier's rows."""
    torch.manual_seed(0)
    network = models.BoxClassifier(len(SHAPES), width=0.0625)
    torch.nn.init.normal_(network.classifier.weight)
    checkpoint(network, folder / "cls.pt")
    quick = "run.workers=0", "run.device=cpu", "crf_iterations=1"
    done = script("make_labels", "weights=cls.pt", "splits=[val]", *quick, "name=a", cwd=folder)
    assert done.returncode == 0, done.stderr
    for name in datasets.read_list("data/shapes", "val"):
        mask = datasets.read_mask(f"data/shapes/SegmentationClassAug/{name}.png", 7)
        datasets.write_mask(folder / f"none/{name}.png", np.zeros_like(mask))
    prototypes.main(str(ROOT / "configs/shapes.yaml"), "val", "cls.pt", "runs/a/labels/Ycrf", "none", *quick)
    row = capsys.readouterr().out.splitlines()[2].strip("| ").split(" | ")
    expected = runs.read_json(folder / "runs/a/labels/scores.json")["val"]["Yret"]["miou"]
    assert row[2] == f"{expected:.1f}" and len(set(row)) == 4
