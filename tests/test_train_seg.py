"""Stage 3 on labels from anywhere: one folder or two, their content remembered."""
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import reference
import torch
from conftest import script
from PIL import Image
from test_losses import random_case
from torchvision.transforms import v2

import datasets
import engine
import eval as evaluation
import make_labels
import models
import runs
import settings
import train_cls
import train_seg
from tools.shapes import make_shapes

SMALL = ["train_seg.iterations=2", "train_seg.batch=2", "train_seg.crop=65", "train_seg.width=0.0625",
         "train_seg.weights=none", "run.workers=0", "run.device=cpu", "eval.panels=0", "eval.scales=[1.0]"]


@pytest.fixture
def folder(tmp_path):
    make_shapes(tmp_path / "data/shapes", train=4, val=1)
    return tmp_path


def train(folder, *arguments):
    return script("train_seg", *SMALL, *arguments, cwd=folder)


def weights(folder, name):
    return torch.load(folder / f"runs/{name}/seg.pt", weights_only=True)["model"]


def last_line(done):
    assert done.returncode == 2, done.stderr
    return done.stderr.splitlines()[-1]


def test_true_masks_train_a_supervised_baseline(folder):
    """Without a classifier or labels of the run's own; any loss is cross-entropy then."""
    for name in ("nal", "crf", "ret"):
        done = train(folder, "labels=[SegmentationClassAug]", f"loss={name}", f"name={name}")
        assert done.returncode == 0, done.stderr
    for key, value in weights(folder, "crf").items():
        torch.testing.assert_close(weights(folder, "nal")[key], value)
        torch.testing.assert_close(weights(folder, "ret")[key], value)


def test_two_folders_are_ycrf_and_yret(folder):
    """Where they differ everywhere, agreement alone has nothing to learn from; cross-entropy on either has."""
    first = folder / "data/shapes/SegmentationClassAug"
    (folder / "other").mkdir()
    for path in first.iterdir():
        labels = np.array(Image.open(path))
        datasets.write_mask(folder / "other" / path.name, (labels + 1) % 7)
    both = f"labels=[{first}, other]"
    for loss in ("crf", "ret", "agree"):
        assert train(folder, both, f"loss={loss}", f"name={loss}").returncode == 0
    lines = map(json.loads, (folder / "runs/agree/metrics.jsonl").read_text().splitlines())
    assert {line["loss"] for line in lines if "loss" in line} == {0}
    assert train(folder, "labels=[other]", "loss=crf", "name=other").returncode == 0
    assert train(folder, f"labels=[{first}]", "loss=crf", "name=first").returncode == 0
    for one, same in (("crf", "first"), ("ret", "other")):
        assert all(torch.equal(value, weights(folder, same)[key]) for key, value in weights(folder, one).items())
    assert not torch.equal(weights(folder, "crf")["classifier.weight"], weights(folder, "ret")["classifier.weight"])


@pytest.mark.parametrize("loss", get_args(get_type_hints(settings.TrainSeg)["loss"]))
def test_the_loss_that_the_settings_name(loss):
    cosine, y_crf, y_ret = both = [part.detach() for part in random_case()]
    s = settings.TrainSeg(loss=loss, gamma=2.0, weight=0.7, temperature=5.0)
    expected = {
        "nal": lambda: reference.noise_aware_loss(*both, gamma=2.0, weight=0.7, temperature=5.0),
        "crf": lambda: reference.cross_entropy(cosine, y_crf, temperature=5.0),
        "ret": lambda: reference.cross_entropy(cosine, y_ret, temperature=5.0),
        "agree": lambda: reference.agreement_loss(*both, temperature=5.0),
        "entropy": lambda: reference.entropy_loss(*both, weight=0.7, temperature=5.0),
        "bootstrap": lambda: reference.bootstrap_loss(*both, weight=0.7, temperature=5.0)}[loss]()
    assert train_seg.segmentation_loss(s, *both).item() == pytest.approx(float(expected))


def test_labels_are_remembered_by_content(folder):
    """Those of the second folder, too."""
    labels, second = "labels=[SegmentationClassAug, second]", folder / "second"
    shutil.copytree(folder / "data/shapes/SegmentationClassAug", second)
    assert train(folder, labels).returncode == 0
    assert "finished before" in train(folder, labels).stdout
    path = second / f"{datasets.read_list(folder / 'data/shapes', 'train')[0]}.png"
    datasets.write_mask(path, np.array(Image.open(path))[::-1])
    line = last_line(train(folder, labels))
    assert "content of labels" in line and "overwrite=true" in line
    before = weights(folder, "shapes")
    assert "2 iterations" in train(folder, labels, "overwrite=true").stdout
    after = weights(folder, "shapes")
    assert any(not torch.equal(value, after[key]) for key, value in before.items())


def test_masks_of_0_and_255_alone_are_refused(folder):
    (folder / "grey").mkdir()
    for path in (folder / "data/shapes/SegmentationClassAug").iterdir():
        labels = np.array(Image.open(path))
        Image.fromarray(np.uint8(255) * (labels > 0)).save(folder / "grey" / path.name)
    line = last_line(train(folder, "labels=[grey]"))
    assert f"{folder / 'grey'}: " in line and "is 255 the object?" in line


@pytest.mark.parametrize("labels, words", [
    ("[a, b, c]", "names 3 folders"), ("[nowhere]", "nowhere is missing: correct train_seg.labels"),
    ("[]", "Ycrf is missing: make it with python make_labels.py"), ("[ImageSets]", "no such mask (4 of 4 missing)")])
def test_refused(folder, labels, words):
    assert words in last_line(train(folder, f"labels={labels}"))


def test_boxes_that_decide_the_order_are_remembered(folder):
    """With balance: images are drawn by their classes."""
    labels = "labels=[SegmentationClassAug]", "iterations=1"
    for name, options in (("a", ["balance=true"]), ("b", [])):
        assert train(folder, *labels, *options, f"name={name}").returncode == 0
    for path in (folder / "data/shapes/Annotations").iterdir():
        path.write_text(path.read_text().replace("<name>ring<", "<name>bar<"))
    assert "content of boxes" in last_line(train(folder, *labels, "balance=true", "name=a"))
    assert train(folder, *labels, "name=b").returncode == 0


# ---------------------------------------------------------------- scores during the training

LONGER = ["train_seg.iterations=8", "train_seg.dropout=0.3", "train_seg.lr=0.1", "run.save_every=3", "run.log_every=5",
          "train_seg.labels=[SegmentationClassAug]"]
SCORED = ["train_seg.val_images=2", "train_seg.val_every=3"]


def start(main, *arguments):
    """In this process; returns the run's folder."""
    config = settings.read(main.__module__.rpartition(".")[2], [*SMALL, *LONGER, *arguments])
    config.device = torch.device("cpu")
    main(config)
    return config.path


@pytest.fixture
def work(tmp_path, monkeypatch):
    make_shapes(tmp_path / "data/shapes", train=4, val=3)
    monkeypatch.chdir(tmp_path)


def test_it_can_start_from_stage_1(work, monkeypatch):
    given = []
    monkeypatch.setattr(engine, "train", lambda *everything: given.extend(everything))
    classifier = models.BoxClassifier(6, "vgg16_bn", width=0.0625)
    Path("runs/shapes").mkdir(parents=True)
    torch.save({"model": classifier.state_dict()}, "runs/shapes/cls.pt")
    start(train_seg.main, "train_seg.weights=stage1")
    for name, value in given[2].backbone.state_dict().items():
        assert torch.equal(value, classifier.backbone.state_dict()[name]), name


def test_another_classifier_makes_another_training_from_stage_1(work, monkeypatch):
    given, found = [], []
    monkeypatch.setattr(engine, "train", lambda *everything: given.append(everything))
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        network = models.BoxClassifier(6, "vgg16_bn", width=0.0625)
        runs.save(Path("runs/shapes/cls.pt"), {"model": network.state_dict()})
        start(train_seg.main, "train_seg.weights=stage1")
        inputs = given[-1][5]
        found.append(inputs())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("main", [train_cls.main, train_seg.main])
def test_crops_are_made_as_the_settings_say(work, monkeypatch, main):
    """Scaled, in the middle of ImageNet's mean colour, and jittered."""
    stage, given = main.__module__, []
    monkeypatch.setattr(engine, "train", lambda *everything: given.append(everything))
    start(main, f"{stage}.scale=[0.3, 0.3]", f"{stage}.jitter=0", f"{stage}.crop=97", f"{stage}.weights=none")
    dataset = given[0][3]
    image = dataset[0]["image"]
    h, w = (round(0.3 * side) for side in datasets.read_image(dataset.paths[dataset.ids[0]]).shape[:2])
    top, left = (97 - h) // 2, (97 - w) // 2
    padding = torch.ones(97, 97, dtype=torch.bool)
    padding[top:top + h, left:left + w] = False
    assert (image[:, padding] == torch.tensor([124, 116, 104])[:, None]).all()
    assert image[:, ~padding].float().std() > 5
    start(main, f"{stage}.jitter=0.1", f"{stage}.weights=none")
    brightness = next(t for t in given[1][3].transform.transforms if isinstance(t, v2.ColorJitter)).brightness
    assert brightness == pytest.approx((0.9, 1.1))


COMMON = {"data.root", "data.classes", "run.precision"}
OF_LABELS = "weights splits pictures"
OF_EVAL = "weights split labels images max_side panels photos"


def names_of(section, left_out):
    names = {field.name for field in dataclasses.fields(settings.SECTIONS[section])} - {*left_out.split()}
    return {f"{section}.{name}" for name in names}


@pytest.mark.parametrize("main, arguments, left_out", [
    (make_labels.main, [], f"{OF_LABELS} logit_scale logit_bias cosine_scale sizes"),
    (make_labels.main, ["make_labels.unary=logits"], OF_LABELS),
    (evaluation.main, [], f"{OF_EVAL} crf_bilateral crf_gaussian crf_iterations"),
    (evaluation.main, ["eval.crf=true"], OF_EVAL)])
def test_a_folder_remembers_every_setting_that_decides_it(work, monkeypatch, main, arguments, left_out):
    made = []

    def stop(config, folder, script, made_with, source):
        made.append((script, made_with.keys()))
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "discard_outdated", stop)
    monkeypatch.setattr(runs, "load_network", lambda *everything: SimpleNamespace(trained_with={}))
    with pytest.raises(KeyboardInterrupt):
        start(main, *arguments)
    (script, keys), = made
    others = {"train_seg.temperature"} if script == "eval" else set()  # of weights that do not say theirs
    assert keys == names_of(script, left_out) | COMMON | others


def test_a_segmenter_names_every_setting_that_decides_it(work):
    made = torch.load(start(train_seg.main, "train_seg.iterations=1") / "seg.pt", weights_only=True)["settings"]
    assert made.keys() == names_of("train_seg", "val_images val_every keep_best") | COMMON | {
        "data.train", "run.seed", "data.masks", "content of boxes", "content of labels", "weights file"}


def scores_of(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line["val_miou"] for line in lines if "val_miou" in line}


@pytest.mark.parametrize("norm", ["trained", "frozen"])
def test_scores_leave_the_weights_alone(work, monkeypatch, norm):
    """Bit for bit, with dropout, also in a run that is stopped in its scores, after a checkpoint, and taken up."""
    frozen = []
    if norm == "frozen":
        frozen = [f"train_seg.weights={start(train_seg.main, 'name=first')}/seg.pt", "train_seg.freeze_norm=true"]
    plain = start(train_seg.main, *frozen, "name=plain")
    scored = start(train_seg.main, *frozen, *SCORED, "train_seg.keep_best=true", "name=scored")
    assert list(scores_of(scored)) == [3, 6, 8] and not scores_of(plain)
    assert (plain / "seg.pt").read_bytes() == (scored / "seg.pt").read_bytes()

    validate, calls = engine.validate, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # in iteration 6
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(engine, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        start(train_seg.main, *frozen, *SCORED, "train_seg.keep_best=true", "name=stopped")
    stopped = start(train_seg.main, *frozen, *SCORED, "train_seg.keep_best=true", "name=stopped")
    for name in ("seg.pt", "seg_best.pt"):
        assert (stopped / name).read_bytes() == (scored / name).read_bytes(), name
    assert scores_of(stopped) == scores_of(scored)


def test_the_scores_are_those_of_eval_and_the_best_says_who_chose_it(work, monkeypatch):
    """A training whose best is not its last; every second score is set here."""
    values, validate = iter([9.0, 30.0, 20.0]), engine.validate
    monkeypatch.setattr(engine, "validate", lambda *arguments: next(values, None) or validate(*arguments))
    run = start(train_seg.main, "train_seg.val_images=9", "train_seg.val_every=2", "train_seg.keep_best=true")
    found = scores_of(run)
    assert found == {2: 9.0, 4: 30.0, 6: 20.0, 8: found[8]} and found[8] < 30
    best = torch.load(run / "seg_best.pt", weights_only=True)
    assert best["miou"] == 30.0 and best["chosen"] == "chosen on 3 images of val"
    last = weights(run.parents[1], "shapes")
    assert not torch.equal(best["model"]["classifier.weight"], last["classifier.weight"])

    start(evaluation.main)
    assert json.loads((run / "eval.json").read_text())["val, plain"]["miou"] == pytest.approx(found[8], abs=1e-5)
    start(evaluation.main, f"eval.weights={run / 'seg_best.pt'}")
    results = json.loads((run / "eval.json").read_text())
    assert list(results) == ["val, plain", "val, plain, chosen on 3 images of val"]
    assert results["val, plain, chosen on 3 images of val"]["method"] == "plain, chosen on 3 images of val"
    assert results["val, plain"]["network"] != results["val, plain, chosen on 3 images of val"]["network"]
    start(evaluation.main)
    assert json.loads((run / "eval.json").read_text()) == results
    assert (run / "curves.png").is_file()

    start(train_seg.main, "train_seg.lr=0.01", "run.overwrite=true")  # another training's best would be left behind
    assert not (run / "seg_best.pt").exists()


def test_scores_are_of_networks_that_the_run_has(work, monkeypatch):
    """Those of an earlier seg.pt go; the seed and the temperature are the training's."""
    temperatures, softmax = [], torch.Tensor.softmax
    run = start(train_seg.main, "run.seed=5", "train_seg.temperature=10")
    start(evaluation.main, "eval.flip=true")
    monkeypatch.setattr(torch.Tensor, "softmax", lambda logits, dim: (
        temperatures.append(logits.abs().max().item()) or softmax(logits, dim)))
    start(evaluation.main, "eval.crf=true", "eval.crf_iterations=1")
    results = json.loads((run / "eval.json").read_text())
    assert list(results) == ["val, flip", "val, CRF"] and {result["seed"] for result in results.values()} == {5}
    assert temperatures and max(temperatures) <= 10.001
    start(train_seg.main, "train_seg.loss=crf", "run.overwrite=true")
    start(evaluation.main)
    assert list(json.loads((run / "eval.json").read_text())) == ["val, plain"]


@pytest.mark.parametrize("arguments", [
    ["train_seg.keep_best=true"], ["train_seg.val_images=1", "data.val="], ["train_seg.val_images=1", "data.truth=x"]])
def test_scores_need_images_with_a_true_mask(work, arguments):
    with pytest.raises(settings.UsageError, match="val_images and keep_best need"):
        start(train_seg.main, *arguments)


def test_scored_images_are_evenly_spaced(tmp_path, monkeypatch):
    make_shapes(tmp_path / "data/shapes", train=1, val=6)
    monkeypatch.chdir(tmp_path)
    scored = train_seg.scored_images(settings.read("train_seg", ["val_images=3"]))
    assert [scored.dataset.ids[k] for k in scored.indices] == ["shapes_00001", "shapes_00003", "shapes_00005"]
