"""The trained networks under weights/: what the files hold, and that they label what they never saw."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHARED
from conftest import script as run_script

import datasets
import models
import runs
from tools.shapes import SHAPES, make_shapes

pytest.importorskip("timm")
FILES = sorted((ROOT / "weights").glob("*.pth"))
CLASSIFIER, SEGMENTER = ROOT / "weights/voc2007_cls.pth", ROOT / "weights/voc2007_seg.pth"
VOC = SHARED / "voc2007"
PHOTOS = ROOT / "examples/photos"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_a_file_holds(file):
    content = torch.load(file, weights_only=True)
    assert file.stat().st_size < 10e6 and {*content} - {"settings"} == {"network", "classes", "model"}
    assert not content.get("settings")  # which would name folders
    assert all(value.dtype == torch.float16 for value in content["model"].values() if value.is_floating_point())
    assert models.load(file).classes == list(datasets.VOC_CLASSES)


@pytest.mark.parametrize("name, kind", [("classifier", "BoxClassifier"), ("segmenter", "DeepLab")])
def test_torch_hub(name, kind):
    network = torch.hub.load(str(ROOT), name, source="local")
    assert type(network).__name__ == kind and network.classes == list(datasets.VOC_CLASSES) and not network.training


def test_labels_of_somebodys_boxes(tmp_path):
    """own_data.py, then make_labels.py, with a few of VOC's classes in another order. (Shapes are no photographs: some
    may be all background to it.)"""
    make_shapes(tmp_path / "theirs", train=5, val=1)
    names = dict(zip(SHAPES, ("dog", "cat", "sofa", "bird", "train", "cow")))
    for path in (tmp_path / "theirs/Annotations").iterdir():
        text = path.read_text()
        for shape, name in names.items():
            text = text.replace(f"<name>{shape}<", f"<name>{name}<")
        path.write_text(text)
    (tmp_path / "theirs/SegmentationClassAug").rename(tmp_path / "masks")
    done = subprocess.run([sys.executable, ROOT / "tools/own_data.py", "theirs", "OUT"], cwd=tmp_path)
    assert done.returncode == 0
    done = run_script("make_labels", "OUT/mine.yaml", f"weights={CLASSIFIER}", "run.workers=0", "crf_iterations=1",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dataset, objects = datasets.VOCDataset(tmp_path / "OUT", "train", sorted(names.values())), 0
    for sample in dataset:
        for kind in "Ycrf", "Yret":
            labels = datasets.read_mask(tmp_path / f"runs/OUT/labels/{kind}/{sample['id']}.png", 7)
            assert {*labels.flat} <= {0, *sample["labels"].tolist()}
            objects += labels.any()
    assert objects


@pytest.fixture
def few(tmp_path):
    """The settings of 8 images of Segmentation/test, the list `few`."""
    if not VOC.is_dir():
        pytest.skip("needs VOC 2007 at ../shared/voc2007")
    ids = datasets.read_list(VOC, "Segmentation/test")[::27][:8]
    for name in ("JPEGImages", "Annotations", "SegmentationClass"):
        (tmp_path / name).symlink_to(VOC / name)
    datasets.write(tmp_path / "ImageSets/Segmentation/few.txt", "\n".join(ids).encode())
    return ROOT / "configs/voc2007.yaml", f"data.root={tmp_path}", "data.val=few", "run.workers=0"


def test_labels_of_images_that_it_never_saw(few, tmp_path):
    """They are far better than whole boxes."""
    done = run_script("make_labels", *few, "splits=[few]", f"weights={CLASSIFIER}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = runs.read_json(tmp_path / "runs/voc2007/labels/scores.json")["few"]
    assert scores["Ycrf"]["miou"] > scores["box"]["miou"] + 5


def test_segments_images_that_it_never_saw(few, tmp_path):
    """All background would have a fifth of it, and a class at random far less."""
    done = run_script("eval", *few, f"weights={SEGMENTER}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert runs.read_json(tmp_path / "runs/voc2007/eval.json")["few, plain"]["miou"] > 40


FACES = {"chelsea": (150, 200, 8), "astronaut": (110, 220, 15), "grace_hopper": (220, 260, 15)}  # y, x, label


def test_labels_of_the_photographs_in_examples(tmp_path):
    """Faces are objects in Ycrf and Yret; nothing is outside the boxes."""
    done = run_script("make_labels", PHOTOS / "photos.yaml", f"data.root={PHOTOS}", f"weights={CLASSIFIER}",
                      "run.workers=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for sample in datasets.VOCDataset(PHOTOS, "photos", datasets.VOC_CLASSES):
        y, x, label = FACES[sample["id"]]
        for kind in "Ycrf", "Yret":
            labels = datasets.read_mask(tmp_path / f"runs/photos/labels/{kind}/{sample['id']}.png", 21)
            assert labels[y, x] == label and {*labels.flat} == {0, label}
            assert not labels[sample["background"][0].numpy() == 1].any()


def test_segments_the_photographs_in_examples(tmp_path):
    """Without a box, and without the demo set, which the settings would have written."""
    done = run_script("eval", f"images={PHOTOS}/JPEGImages", f"weights={SEGMENTER}", "run.workers=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, (y, x, label) in FACES.items():
        assert datasets.read_mask(tmp_path / f"runs/shapes/pictures/plain/{name}.png", 21)[y, x] == label
    assert not (tmp_path / "data").exists()
