"""Stage 3 on labels from anywhere: one folder or two, their content remembered."""

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

import datasets
from tools.shapes import make_shapes

SMALL = ["train_seg.iterations=2", "train_seg.batch=2", "train_seg.crop=65", "train_seg.width=0.0625",
         "train_seg.weights=none", "run.workers=0", "eval.panels=0", "eval.scales=[1.0]"]


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
    assert train(folder, "labels=[other]", "loss=crf", "name=other").returncode == 0
    assert train(folder, f"labels=[{first}]", "loss=crf", "name=first").returncode == 0
    for one, same in (("crf", "first"), ("ret", "other")):
        assert all(torch.equal(value, weights(folder, same)[key]) for key, value in weights(folder, one).items())
    assert not torch.equal(weights(folder, "crf")["classifier.weight"], weights(folder, "ret")["classifier.weight"])


def test_labels_are_remembered_by_content(folder):
    labels = "labels=[SegmentationClassAug]"
    assert train(folder, labels).returncode == 0
    assert "finished before" in train(folder, labels).stdout
    name = datasets.read_list(folder / "data/shapes", "train")[0]
    path = folder / f"data/shapes/SegmentationClassAug/{name}.png"
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
