"""benchmarks/voc2007.py: a study is carried out on a small set and continued; its table is what the runs' files say."""
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from tools.shapes import make_shapes

SMALL = ["data.classes=[bar, ring, cross, crescent, vee, wave]", "train_cls.iterations=1", "train_cls.batch=2",
         "train_cls.crop=65", "train_cls.backbone=vgg16", "train_cls.width=0.0625", "train_cls.weights=none",
         "make_labels.crf_iterations=1", "make_labels.pictures=0", "data.root=data"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_shapes(folder / "data", train=3, val=2)
    (folder / "data/SegmentationClassAug").rename(folder / "data/SegmentationClass")
    lists = folder / "data/ImageSets/Segmentation"
    (folder / "data/ImageSets/Main").mkdir()
    for name in ("train", "trainval"):
        shutil.copy(lists / "train.txt", folder / f"data/ImageSets/Main/{name}.txt")
    shutil.copy(lists / "train.txt", lists / "trainval.txt")
    shutil.copy(lists / "val.txt", lists / "test.txt")
    return folder


def test_labels_study(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import voc2007
    monkeypatch.setattr(voc2007, "SEEDS", (1,))
    monkeypatch.delitem(voc2007.ROWS, "_nothing")
    voc2007.main("labels", SMALL)
    text = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) \| (Segmentation/\w+) \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == 2 * (1 + 2)
    for run, split, images, *cells in rows:
        scores = json.loads((folder / f"runs/voc2007_{run}/labels/scores.json").read_text())[split]
        assert images == str(scores["Ycrf"]["images"])
        assert cells == [f"{scores[kind]['miou']:.1f}" for kind in ("box", "Ycrf", "Yret")]
        made = json.loads((folder / f"runs/voc2007_{run}/labels/made_with.json").read_text())["settings"]
        assert made["make_labels.u0"] == ("_no" not in run)
    trained = {path.parent.name for path in (folder / "runs").glob("*_1*/cls.pt")}
    assert trained == {"voc2007_bap_1", "voc2007_gap_1"}
    kept = json.loads((folder / "runs/voc2007_labels.json").read_text())
    assert len(kept) == 1 + 2 and all(
        run["labels/scores.json"] == json.loads(
            (folder / "runs" / name / "labels/scores.json").read_text())
        for name, run in kept.items())
    times = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.p[tn]*")}
    voc2007.main("labels", SMALL)
    assert capsys.readouterr().out == text
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.p[tn]*")}


def test_a_run_that_fails_is_named(folder):
    shutil.copytree(folder / "data", folder / "broken")
    (folder / "broken/ImageSets/Main/train.txt").write_text("nothing\n")
    done = subprocess.run([sys.executable, ROOT / "benchmarks/voc2007.py", "queries", *SMALL, "data.root=broken"],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "log.txt: train_cls.py ended with status 2" in done.stderr
