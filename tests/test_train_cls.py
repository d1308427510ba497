"""Stage 1: its loss by hand, and that the settings reach what is trained."""
import math
import re

import pytest
import torch
from conftest import script

import engine
import models
import settings
import train_cls
from tools.shapes import make_shapes

SMALL = ["train_cls.iterations=4", "train_cls.batch=4", "train_cls.crop=65", "train_cls.width=0.0625",
         "train_cls.weights=none", "run.workers=0"]


def test_the_loss_by_hand():
    """Boxes of classes 2 and 1, of two parts each, and one query."""
    logits = [(0., 0, 2), (3, 0, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0)]
    targets = [2, 2, 1, 1, 0]
    scores = models.Logits(torch.tensor(logits[:4]).view(2, 2, 3), torch.tensor(logits[4:]))
    batch = dict(image=torch.zeros(1), boxes=[], background=torch.zeros(1),
                 labels=[torch.tensor([2]), torch.tensor([1])])
    given = []
    found = train_cls.objective(lambda *inputs: given.extend(inputs) or scores, batch)
    assert [id(value) for value in given] == [id(batch[key]) for key in ("image", "boxes", "background")]
    ce = [math.log(sum(map(math.exp, row))) - row[target] for row, target in zip(logits, targets)]
    assert found["loss"].item() == pytest.approx(sum(ce) / 5)
    assert (found["right_boxes"].item(), found["right_queries"].item()) == (0.75, 0)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """begin(*arguments): what train_cls.py gives to engine.train."""
    make_shapes(tmp_path / "data/shapes", train=4, val=1)
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(engine, "train", lambda *everything: given.append(everything))

    def begin(*arguments):
        config = settings.read("train_cls", [*SMALL, *arguments])
        config.device = torch.device("cpu")
        train_cls.main(config)
        return given.pop()

    return begin


def test_settings_of_pooling_and_augmentation(begin):
    _, _, network, dataset, *_ = begin(
        "grid=3", "bins=5", "min_background=0.4", "pooling=gap", "scale=[0.3, 0.4]", "jitter=0.1")
    pooling, steps = network.pooling, dataset.transform.transforms
    assert (pooling.grid, pooling.bins, pooling.min_background, pooling.aware) == (3, 5, 0.4, False)
    assert steps[0].keywords["scale"] == (0.3, 0.4) and steps[5].brightness == pytest.approx((0.9, 1.1))
    assert begin("pooling=bap")[2].pooling.aware


def test_another_seed_is_another_start_and_another_order(begin):
    starts, orders = [], []
    for seed in (0, 1, 0):
        config, _, network, dataset, *_ = begin(f"run.seed={seed}")
        starts.append(network.classifier.weight)
        orders.append([batch["id"] for batch in engine.batches(config, config.train_cls, dataset, 0)])
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])
    assert orders[0] == orders[2] != orders[1]


def test_another_file_of_weights_is_another_training(begin):
    found = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        torch.save({"model": models.BoxClassifier(6, "vgg16_bn", width=0.0625).state_dict()}, "start.pt")
        *_, inputs = begin("weights=start.pt")
        found.append(inputs())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("file, pattern", [
    ("Annotations/shapes_00000.xml", "<xmin>[0-9]+"), ("ImageSets/Segmentation/train.txt", "shapes_00003\n")])
def test_a_changed_box_or_list_is_another_training(tmp_path, file, pattern):
    make_shapes(tmp_path / "data/shapes", train=4, val=1)
    path = tmp_path / "data/shapes" / file
    assert "finished before" not in script("train_cls", *SMALL, cwd=tmp_path).stdout
    assert "finished before" in script("train_cls", *SMALL, cwd=tmp_path).stdout
    text, changes = re.subn(pattern, lambda found: "<xmin>1" if "<" in found[0] else "", path.read_text(), count=1)
    assert changes
    path.write_text(text)
    done = script("train_cls", *SMALL, cwd=tmp_path)
    assert done.returncode == 2 and "was made with other settings: content of boxes" in done.stderr
