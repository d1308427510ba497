"""BAP and NAL in other people's code: examples/ as they stand there, and training in two processes."""
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from PIL import Image
from torch import nn

import datasets
import losses
import models
from tools.shapes import SHAPES, make_shapes

# ---- the programs in examples/ ----

OBJECTS = {"one": ["dog"], "two": ["dog", "tvmonitor", "person"]}  # classes of each image's boxes: 12, 20, 15
OBJECT = ("<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
          "</object>")


def make_voc(folder):
    """Two noisy photographs and their boxes in the devkit's layout."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(OBJECTS) + "\n")
    g = torch.Generator().manual_seed(0)
    for name, classes in OBJECTS.items():
        pixels = torch.randint(256, (60, 80, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((400, 300)).save(folder / f"JPEGImages/{name}.jpg")
        boxes = [OBJECT.format(c, 40 + 30 * i, 60, 150 + 60 * i, 220 + 20 * i) for i, c in enumerate(classes)]
        size = "<size><width>400</width><height>300</height></size>"
        text = f"<annotation>{size}{''.join(boxes)}</annotation>"
        (folder / f"Annotations/{name}.xml").write_text(text)


def example(module):
    """The program in examples/ that imports `module`."""
    return (ROOT / "examples" / {"models": "bap.py", "losses": "nal.py"}[module]).read_text()


# What is checked in the program's own process after its last step, of the second image: boxes of three classes.
CHECKS = {
    "models": """
assert pooled.foreground.shape == (3, 4, 2048) and pooled.attention.shape == (1, 1, 39, 51)
assert len(pooled.queries) > 2 and features.shape == (12 + len(pooled.queries), 2048)
assert labels[:12].tolist() == [12] * 4 + [20] * 4 + [15] * 4 and not labels[12:].any()
assert 0 < loss.item() < 100 and len(labels) == 12 + len(pooled.queries)
""",
    "losses": """
assert cosine.shape == (1, 21, 300, 400) and cosine.abs().max() <= 1 + 1e-5
assert set(y_crf.unique().tolist()) == {0, 12, 15, 20} and set(y_ret.unique().tolist()) == {0, 12, 15, 20}
assert 0.02 < (y_crf != y_ret).float().mean() < 0.5 and 0 < loss.item() < 100
"""}
MOVED = """
import torchvision
start = torchvision.models.resnet50(weights="IMAGENET1K_V1").state_dict()
assert all(not torch.equal(value, start[name]) for name, value in resnet.named_parameters() if "conv" in name)
assert all(value.isfinite().all() for value in resnet.parameters())
"""


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """torch.hub's folder with a random ResNet-50 under the name of torchvision's file of ImageNet weights."""
    home = tmp_path_factory.mktemp("home")
    entry = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    state = torchvision.models.resnet50(zero_init_residual=True).state_dict()
    state = {name: value / 100 + 0.01 if name.endswith("bn3.weight") else value for name, value in state.items()}
    torch.save(state, home / "hub/checkpoints" / entry.url.rpartition("/")[2])
    return home


@pytest.mark.parametrize("module", ["models", "losses"])
def test_example_of_the_readme(tmp_path, torch_home, module):
    """A step of each of two images, in a folder with nothing but the one file and the data."""
    shutil.copy(ROOT / f"{module}.py", tmp_path)
    make_voc(tmp_path / "data/VOCdevkit/VOC2012")
    (tmp_path / "example.py").write_text(example(module) + CHECKS[module] + MOVED)
    environment = {**os.environ, "PYTHONPATH": "", "TORCH_HOME": str(torch_home)}
    run = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == (2 if module == "models" else 0)


def test_example_of_labels(tmp_path):
    """Ycrf as make_labels.py writes it, with the same settings."""
    config = ["train_cls.width=0.0625", "run.workers=0", "run.device=cpu", "make_labels.pictures=0",
              "make_labels.splits=[val]", "make_labels.crf_bilateral=[4, 55, 3]", "make_labels.crf_gaussian=[3, 3]"]
    make_shapes(tmp_path / "data/shapes", train=1, val=1)
    torch.manual_seed(0)
    network = models.BoxClassifier(len(SHAPES), "vgg16_bn", width=0.0625)
    network.classifier.weight.data.abs_()  # so that there are objects
    (tmp_path / "runs/shapes").mkdir(parents=True)
    torch.save(dict(model=network.state_dict(), classes=list(SHAPES), network=dict(
        kind="BoxClassifier", backbone="vgg16_bn", width=0.0625)), tmp_path / "runs/shapes/cls.pt")
    done = subprocess.run([sys.executable, ROOT / "make_labels.py", *config], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    (name,) = datasets.read_list(tmp_path / "data/shapes", "val")
    boxes, labels, _ = datasets.read_annotation(tmp_path / f"data/shapes/Annotations/{name}.xml", SHAPES)
    objects = [",".join(map(str, [SHAPES[k - 1], *box])) for k, box in zip(labels.tolist(), boxes.tolist())]

    def label(*objects):
        return subprocess.run([
            sys.executable, "-m", "examples.labels", tmp_path / "runs/shapes/cls.pt",
            tmp_path / f"data/shapes/JPEGImages/{name}.jpg", tmp_path / "out.png", *objects], cwd=ROOT,
            capture_output=True, text=True)

    for sides in "9,9,900,20", "20,9,9,20", "-1,9,9,20":  # beyond the image, or its left side right
        done = label(objects[0], f"{SHAPES[0]},{sides}")
        assert done.returncode == 1 and done.stderr.startswith(f"{SHAPES[0]},{sides}: no box in an image of")
    done = label(*objects)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7
    made = tmp_path / f"runs/shapes/labels/Ycrf/{name}.png"
    assert (tmp_path / "out.png").read_bytes() == made.read_bytes() and Image.open(made).getextrema()[1]


# ---- datasets.py alone ----

READ = """
import datasets
data = datasets.VOCDataset("voc", "train", datasets.VOC_CLASSES)
sample = data[1]
assert sample["image"].shape == (3, 300, 400)
assert sample["boxes"][0].tolist() == [39, 59, 150, 220]
assert sample["labels"].tolist() == [12, 20, 15]
"""


def test_datasets_is_one_file_to_copy(tmp_path):
    shutil.copy(ROOT / "datasets.py", tmp_path)
    make_voc(tmp_path / "voc")
    environment = {**os.environ, "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-c", READ], cwd=tmp_path,
                         env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- DistributedDataParallel ----

class Boxes(nn.Module):
    """A network of one convolution and a classifier; its loss, of a case's boxes and background."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.Linear(8, 5)
        self.pooling = models.BAP()

    def forward(self, images, boxes, background):
        pooled = self.pooling(self.body(images), boxes, images.shape[2:], background)
        return sum(self.classifier(out).square().sum() for out in (pooled.foreground, pooled.queries))


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.classes = nn.Parameter(torch.randn(5, 8, 1, 1))

    def forward(self, images, y_crf, y_ret):
        cosine = F.conv2d(F.normalize(self.body(images), dim=1), F.normalize(self.classes, dim=1))
        return losses.noise_aware_loss(cosine, y_crf, y_ret)


def case(network, rank):
    """A batch of each process. The second has no boxes and no background, or no label."""
    g = torch.Generator().manual_seed(rank)
    images = torch.randn(2, 3, 33, 41, generator=g)
    if network is Boxes:
        boxes = [torch.tensor([[4.0, 4, 30, 28], [10, 2, 25, 20]]), torch.tensor([[1.0, 8, 20, 30]])]
        background = torch.ones(2, 1, 33, 41)
        background[..., 2:30, 1:30] = 0
        return (images, [b[:0] for b in boxes], 0 * background) if rank else (images, boxes, background)
    labels = torch.randint(5, (2, 2, 33, 41), generator=g)
    return images, *(torch.full_like(labels, 255) if rank else labels)


def gradients(network, rank, wrap=lambda module: module):
    torch.manual_seed(0)
    module = network()
    wrapped = wrap(module)  # DDP acts as long as it is held
    wrapped(*case(network, rank)).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = [gradients(network, rank, nn.parallel.DistributedDataParallel) for network in (Boxes, Pixels)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    """Each process has the mean of both processes' gradients, also where one of them has nothing to learn from."""
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for number, network in enumerate((Boxes, Pixels)):
        alone = [gradients(network, rank) for rank in (0, 1)]
        for name, gradient in alone[0].items():
            assert gradient.any() and not alone[1][name].any()
            for of_rank in found:
                torch.testing.assert_close(of_rank[number][name], gradient / 2)
