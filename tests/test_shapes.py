"""tools/shapes.py: the demo set, whole, the same each time, and hard."""
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import datasets
from tools import shapes
from tools.shapes import SHAPES, make_shapes

MASKS = "SegmentationClassAug"


def digest(root):
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)):
            hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "data/shapes"
    make_shapes(folder, train=30, val=10)
    return folder


@pytest.fixture(scope="module")
def samples(root):
    dataset = datasets.VOCDataset(root, "train", SHAPES, masks=[MASKS])
    return [dataset[i] for i in range(len(dataset))]


def test_shapes_are_the_same_bytes_each_time(root, tmp_path):
    make_shapes(tmp_path / "again", train=6, val=2)
    make_shapes(tmp_path / "other", train=6, val=2, seed=1)
    assert {f.name for f in tmp_path.iterdir()} == {"again", "other"}
    first, again = digest(root), digest(tmp_path / "again")
    other = digest(tmp_path / "other")
    assert again.keys() == other.keys() and len(again) == 3 * 8 + 2
    for name in again:
        if "ImageSets" not in name:
            assert again[name] == first[name] != other[name]


def test_the_folder_is_vocs(root, samples):
    train = datasets.read_list(root, "train")
    val = datasets.read_list(root, "val")
    assert train == [f"shapes_{n:05d}" for n in range(30)]
    assert val == [f"shapes_{n:05d}" for n in range(30, 40)]
    assert {k for s in samples for k in s["labels"].tolist()} == {*range(1, 7)}
    assert len({s["image"].shape for s in samples}) > 10
    image = Image.open(root / f"{MASKS}/{train[0]}.png")
    assert image.mode == "P"
    assert image.getpalette()[3:6] == [128, 0, 0]


def sides(mask):
    y, x = torch.nonzero(mask, as_tuple=True)
    ends = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    return torch.stack(ends).float()


def test_boxes_are_tight_and_hold_the_objects(samples):
    ends = torch.tensor([1, 1, -1, -1])
    single = 0
    for sample in samples:
        mask, boxes = sample["masks"][0], sample["boxes"]
        labels = sample["labels"].tolist()
        assert 1 <= len(boxes) <= 3
        assert set(mask.unique().tolist()) <= {0, 255, *labels}
        # Half of the void border lies inside its object.
        objects = (mask > 0) & (mask < 255)
        assert not (objects & (sample["background"][0] == 1)).any()
        if len(boxes) == 1:
            single += 1
            box = boxes[0].as_subclass(torch.Tensor)
            height, width = mask.shape
            cut = box == torch.tensor([0, 0, width, height])
            within = (sides(objects) - box) * ends
            assert (within >= 0).all() and (within <= 2).all()
            outer = sides(mask > 0)
            assert torch.equal(outer[~cut], (box - ends)[~cut])
    assert single > 3


def test_objects_fill_their_boxes_badly_in_nearly_one_colour(samples):
    filled = []
    for sample in samples:
        image, mask = sample["image"].float(), sample["masks"][0]
        objects = (mask > 0) & (mask < 255)
        inside = sample["background"][0] == 0
        filled.append((objects.sum() / inside.sum()).item())
        behind = image[:, mask == 0]
        contrast = image[:, objects].mean(1) - behind.mean(1)
        assert contrast.abs().max() < 75
        assert behind.std(1).max() > 8  # a textured background
    assert np.mean(filled) < 0.45


def test_a_folder_is_never_overwritten(root):
    before = digest(root)
    with pytest.raises(datasets.DataError, match="shapes: exists"):
        make_shapes(root)
    assert digest(root) == before


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_annotation", stop)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "shapes", train=2, val=1)
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(shapes, "make_shapes", made.append)
    monkeypatch.setattr(sys, "argv", ["shapes.py", f"{tmp_path}/x"])
    shapes.main()
    assert made == [f"{tmp_path}/x"]
    assert capsys.readouterr().out == f"data.root: {tmp_path}/x\n"
    for arguments in ([], ["x", "y"], ["--x", "y"]):
        monkeypatch.setattr(sys, "argv", ["shapes.py", *arguments])
        with pytest.raises(SystemExit) as end:
            shapes.main()
        assert end.value.code == 2 and len(made) == 1


def test_as_a_script_it_finds_the_repository(tmp_path):
    """From another folder; and a folder that exists is one line."""
    command = [sys.executable, ROOT / "tools/shapes.py", tmp_path]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{tmp_path}: exists")
    assert len(done.stderr.splitlines()) == 1
