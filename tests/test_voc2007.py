"""benchmarks/voc2007.py: a study is carried out on a small set and continued; its table is what the runs' files say."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

import engine
import eval as evaluation
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


@pytest.fixture
def voc2007(folder, monkeypatch):
    """The module, in the folder."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("voc2007")


def test_labels_study(voc2007, folder, monkeypatch, capsys):
    monkeypatch.setattr(voc2007, "SEEDS", (1,))
    monkeypatch.delitem(voc2007.ROWS, "_nothing")
    voc2007.main("labels", SMALL)
    text = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) \| (Segmentation/\w+) \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == 2 * (2 + 3)  # lists; labels of average pooling and of BAP
    for run, split, images, *cells in rows:
        scores = json.loads((folder / f"runs/voc2007_{run}/labels/scores.json").read_text())[split]
        assert images == str(scores["Ycrf"]["images"])
        assert cells == [f"{scores[kind]['miou']:.1f}" for kind in ("box", "Ycrf", "Yret")]
        made = json.loads((folder / f"runs/voc2007_{run}/labels/made_with.json").read_text())["settings"]
        assert made["make_labels.u0"] == ("_no" not in run)
        assert (made["make_labels.unary"] == "logits") == ("_improved" in run)
    trained = {path.parent.name for path in (folder / "runs").glob("*_1*/cls.pt")}
    assert trained == {"voc2007_bap_1", "voc2007_gap_1"}
    kept = json.loads((folder / "runs/voc2007_labels.json").read_text())
    assert len(kept) == 2 + 3 and all(
        run["labels/scores.json"] == json.loads(
            (folder / "runs" / name / "labels/scores.json").read_text())
        for name, run in kept.items())
    times = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.p[tn]*")}
    voc2007.main("labels", SMALL)
    assert capsys.readouterr().out == text
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.p[tn]*")}


def test_a_study_of_segmenters(voc2007, folder, monkeypatch, capsys):
    """Improved labels are made of the classifier that is there; both losses learn from them, and the table is what the
    runs' files say."""
    monkeypatch.setattr(voc2007, "SEEDS", (0,))
    small = [*SMALL, *(text.replace("cls.", "seg.") for text in SMALL), "eval.crf_iterations=1"]
    voc2007.stage("train_cls", "bap_0", small)
    voc2007.main("improved", small)
    rows = re.findall(r"^\| (\w+) \| Segmentation/test \| 2 \| (.+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M)
    assert [run for run, _, _ in rows] == ["nal_0_improved"] * 2 + ["crf_0_improved"] * 2
    for run, method, miou in rows:
        results = json.loads((folder / f"runs/voc2007_{run}/eval.json").read_text())
        assert miou == f"{results[f'Segmentation/test, {method}']['miou']:.1f}"
    labels = folder / "runs/voc2007_bap_0_improved/labels"
    assert json.loads((labels / "made_with.json").read_text())["settings"]["make_labels.unary"] == "logits"
    kept = json.loads((folder / "runs/voc2007_improved.json").read_text())
    assert list(kept) == ["voc2007_nal_0_improved", "voc2007_crf_0_improved"]
    learnt = [yaml.safe_load(run["settings.yaml"])["train_seg"]["loss"] for run in kept.values()]
    assert learnt == ["nal", "crf"]
    for loss in "nal", "crf":
        made = yaml.safe_load((folder / f"runs/voc2007_{loss}_0_improved/settings.yaml").read_text())["train_seg"]
        kinds = [str(labels.relative_to(folder) / kind) for kind in ("Ycrf", "Yret")]
        assert made["loss"] == loss and made["labels"] == kinds


def test_choices_are_made_apart_from_what_is_reported(voc2007):
    """Networks of other lists, scored on others; a run's name stands for the same settings in every study."""
    trained: dict = {}
    for name in ("queries", "length", "labels"):
        for run, settings, _, _ in voc2007.study(name):
            assert (voc2007.REPORT[0] if name == "labels" else "data.train=Main/train") in settings
            assert trained.setdefault(run, settings) == settings
    assert not any("test" in text for text in voc2007.CHOOSE)


def test_seeds_of_the_environment(monkeypatch):
    """One seed may be made without the others."""
    monkeypatch.setenv("SEEDS", "0 2")
    spec = importlib.util.spec_from_file_location("anew", ROOT / "benchmarks/voc2007.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    assert [run for run, *_ in study.study("labels")] == ["gap_0", "bap_0", "gap_2", "bap_2"]
    assert [labels for labels, *_ in study.segmenters("improved")] == ["bap_0_improved", "bap_2_improved"]
    assert [list(rows) for *_, rows in study.segmenters("nal")] == [
        ["nal_0", "crf_0", "agree_0"], ["nal_2", "crf_2", "agree_2"]]


def test_more_seeds_of_segmenters_learn_from_three_of_labels(voc2007):
    labels, _, rows = zip(*voc2007.segmenters("nal"))
    assert labels == ("bap_0", "bap_1", "bap_2", "bap_0", "bap_1")
    settings = rows[4]["agree_7"]
    assert settings[0] == "run.seed=7" and "runs/voc2007_bap_1/labels/Ycrf" in settings[1]


def test_evaluation_study(voc2007, folder, capsys):
    """Both details change predictions, and the table is what the runs' files say."""
    small = [*(text.replace("cls.", "seg.") for text in SMALL), "eval.crf_iterations=1"]
    voc2007.stage("train_seg", "nal_0", [*small, "train_seg.labels=[SegmentationClass]"])
    voc2007.stage("eval", "nal_0", [*small, *voc2007.FULL])
    voc2007.main("evaluation", [*small, "run.workers=1"])
    table = capsys.readouterr().out
    rows = re.findall(r"^\| (nal_0\w*) \| Segmentation/test \| 2 \| (.+) \| ([\d.]+) \|$", table, re.M)
    assert [row[0] for row in rows] == ["nal_0", "nal_0_bytes", "nal_0_antialias"]
    made = {}
    for run, method, miou in rows:
        results = json.loads((folder / f"runs/voc2007_{run}/eval.json").read_text())
        assert miou == f"{results[f'Segmentation/test, {method}']['miou']:.1f}"
        made[run] = [path.read_bytes() for path in sorted((folder / f"runs/voc2007_{run}/predictions").rglob("*.png"))]
    kept = json.loads((folder / "runs/voc2007_evaluation.json").read_text())
    assert list(kept) == [f"voc2007_{run}" for run in made]
    assert made["nal_0"] != made["nal_0_bytes"] and made["nal_0"] != made["nal_0_antialias"]


def test_details_of_the_evaluation(voc2007, monkeypatch):
    """The literal pixels and sizes that the study puts in place of the usual ones."""
    monkeypatch.setattr(evaluation, "dense_crf", lambda image, *others: (image, others))
    exec(voc2007.CRF_IMAGE, {"s": evaluation})
    seen, others = evaluation.dense_crf(np.array([[[0, 0, 255], [255, 255, 0]]], np.uint8), 1, 2)
    assert seen.tolist() == [[[150, 140, 134], [152, 138, 132]]] and others == (1, 2)
    monkeypatch.setattr(engine, "resized", None)
    exec(voc2007.ANTIALIAS, {})
    stripes = (torch.arange(16) % 2 * 255).byte().expand(3, 8, 16)
    assert engine.resized(stripes, 1.5).shape == (1, 3, 12, 24)
    assert (engine.resized(stripes, 0.5)[..., 1:-1] - 0.5).abs().max() < 0.1  # a mean of both


def test_a_run_that_fails_is_named(folder):
    shutil.copytree(folder / "data", folder / "broken")
    (folder / "broken/ImageSets/Main/train.txt").write_text("nothing\n")
    done = subprocess.run([sys.executable, ROOT / "benchmarks/voc2007.py", "queries", *SMALL, "data.root=broken"],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "log.txt: train_cls.py ended with status 2" in done.stderr
