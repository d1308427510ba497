"""Stage 2 (section 3.2 of the paper): classifier and boxes -> the pseudo labels Ycrf and Yret, and their scores.

    python make_labels.py [CONFIG.yaml] [key=value ...]

Reads data.root and runs/NAME/cls.pt, or the file `weights`; writes runs/NAME/labels/Ycrf/ID.png, Yret/ID.png and
box/ID.png (whole boxes as labels, the baseline) for the lists data.train and data.val, and scores.json, over the images
that have a true mask; for a few images u0/ID.png and cam/ID.png, the highest u_c of each pixel, before the CRF. Images
that have their labels already are skipped.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

import datasets
import engine
import models
from crf import dense_crf

KINDS = "box", "Ycrf", "Yret"  # of labels, each a folder


@dataclass
class Settings:
    """Section `make_labels` of the YAML file."""
    weights: str = ""  # a file of the classifier, of another run or in the authors' names; none: runs/NAME/cls.pt
    splits: list[str] = field(default_factory=list)  # lists to label; none: data.train and data.val
    u0: bool = True  # background attention as the background's unary; false: its own activation map
    threshold: float = 0.99  # u0, or what stands in for it, becomes 0 below this share of its maximum anywhere
    cam_norm: Literal["box", "class"] = "box"  # an activation map is divided by its maximum in each box, or in all
    softmax: bool = True  # over {u0, u_c} before the CRF; false: divided by their sum
    crf_bilateral: list[float] = field(default_factory=lambda: [4.0, 55.0, 3.0])  # weight, pixels, colour
    crf_gaussian: list[float] = field(default_factory=lambda: [3.0, 3.0])  # weight, pixels
    crf_iterations: int = 10
    pictures: int = 8  # images of each list whose u0 and u_c are kept as pictures


def region(box: list[float]) -> tuple[slice, slice]:
    """Rows and columns of the pixels that a box touches."""
    x0, y0, x1, y1 = box
    return slice(max(math.floor(y0), 0), math.ceil(y1)), slice(max(math.floor(x0), 0), math.ceil(x1))


def regions(boxes: Tensor, labels: Tensor, classes: list[int], size: Sequence[int]) -> Tensor:
    """The union of each class's boxes: (len(classes), H, W) bool."""
    inside = torch.zeros(len(classes), *size, dtype=torch.bool)
    for box, label in zip(boxes.tolist(), labels.tolist()):
        inside[(classes.index(label), *region(box))] = True
    return inside


def background_attention(up: models.Upsampled, weight: Tensor, outside: Tensor, s: Settings) -> Tensor:
    """A (H, W) in [0, 1]: ReLU(cos(f(p), q)), q the mean feature outside boxes; not yet set to 1 there.

    Without u0, or where no pixel is outside: the activation map ReLU(f . w_0), divided by its maximum.
    """
    if s.u0 and outside.any():
        return F.relu(up.cosine(up.mean(outside[None])))[0].clamp(max=1)
    cam = F.relu(up.dot(weight[:1]))[0]
    return cam / cam.max().clamp(min=1e-12)


def activation_maps(up: models.Upsampled, weight: Tensor, boxes: Tensor, labels: Tensor, classes: list[int],
                    s: Settings) -> Tensor:
    """u_c (len(classes), H, W) in [0, 1]: ReLU(f . w_c) over its maximum in the box, 0 outside the class's boxes.

    Where two boxes of a class overlap, the later one's values stand. cam_norm=class: over the maximum in all of them.
    """
    cams = F.relu(up.dot(weight[classes]))
    result = torch.zeros_like(cams)
    if s.cam_norm == "class":
        result = cams * regions(boxes, labels, classes, cams.shape[1:]).to(cams.device)
        return result / result.amax((1, 2), keepdim=True).clamp(min=1e-12)
    for box, label in zip(boxes.tolist(), labels.tolist()):
        where = (classes.index(label), *region(box))
        result[where] = cams[where] / cams[where].max().clamp(min=1e-12)
    return result


def unaries(attention: Tensor, maps: Tensor, outside: Tensor, s: Settings) -> Tensor:
    """{u0, u_c} -> probabilities (1 + classes, H, W) for the CRF; background for sure outside the boxes.

    u0 is A, and 0 where A is below the threshold, a share of its maximum over the whole image.
    """
    u0 = attention.where(attention >= s.threshold * attention.max(), 0)
    u = torch.cat((u0[None], maps))
    u = u.softmax(0) if s.softmax else (u + 1e-6) / (u + 1e-6).sum(0)
    sure = torch.zeros_like(u)
    sure[0] = 1
    return torch.where(outside, sure, u)


def retrieve(up: models.Upsampled, weight: Tensor, y_crf: Tensor, classes: list[int], allowed: Tensor) -> Tensor:
    """Yret (H, W): argmax_c of ReLU(cos(f(p), q_c)), q_c the mean feature of what Ycrf labels c, among the labels
    that are allowed at p: (1 + classes, H, W) bool, background and the classes whose boxes hold p. A class that Ycrf
    lacks has its row of the classifier as q_c.
    """
    labels = torch.tensor([0, *classes], device=y_crf.device)
    masks = y_crf == labels[:, None, None]
    prototypes = torch.where(masks.any(2).any(1)[:, None], up.mean(masks), weight[labels])
    return labels[F.relu(up.cosine(prototypes)).masked_fill(~allowed, -1).max(0).indices]


def box_labels(boxes: Tensor, labels: Tensor, size: Sequence[int]) -> np.ndarray:
    """The baseline: every box filled with its class, smaller boxes over larger ones -> (H, W) uint8."""
    filled = np.zeros(size, np.uint8)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for k in areas.argsort(descending=True).tolist():
        filled[region(boxes[k].tolist())] = labels[k]
    return filled


@torch.inference_mode()
def prepare(config: SimpleNamespace, network: models.BoxClassifier, sample: dict) -> tuple[tuple, tuple]:
    """One image through the network -> what `finish` needs, and the arguments of dense_crf."""
    s, device = config.make_labels, config.device
    boxes, labels = sample["boxes"].as_subclass(torch.Tensor), sample["labels"]
    classes = sorted(set(labels.tolist()))
    image = sample["image"].as_subclass(torch.Tensor)
    size = tuple(image.shape[1:])
    with engine.autocast(config):
        features = network.features(image[None].to(device, memory_format=torch.channels_last))[0].float()
    up = models.Upsampled(features, size, models.padded_size(size))
    outside = sample["background"].as_subclass(torch.Tensor)[0].to(device) == 1
    weight = network.classifier.weight.float()
    attention = background_attention(up, weight, outside, s)
    maps = activation_maps(up, weight, boxes, labels, classes, s)
    probabilities = unaries(attention, maps, outside, s)
    crf = (image.permute(1, 2, 0).numpy(), probabilities.cpu().numpy(),
           tuple(s.crf_bilateral), tuple(s.crf_gaussian), s.crf_iterations)
    return (sample["id"], up, outside, boxes, labels, classes, (attention.masked_fill(outside, 1), maps)), crf


@torch.inference_mode()
def finish(s: Settings, network: models.BoxClassifier, prepared: tuple,
           marginals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> Ycrf and Yret (H, W), uint8: a class inside its own boxes only, so background outside all of them."""
    _, up, outside, boxes, labels, classes, _ = prepared
    own = regions(boxes, labels, classes, outside.shape)
    best = torch.from_numpy(marginals)
    best[1:] *= own
    y_crf = torch.tensor([0, *classes])[best.max(0).indices].to(outside.device)  # argmax is the slower one
    allowed = torch.cat((torch.ones_like(outside)[None], own.to(outside.device)))
    y_ret = retrieve(up, network.classifier.weight.float(), y_crf, classes, allowed)
    return y_crf.byte().cpu().numpy(), y_ret.byte().cpu().numpy()


def heat(attention: Tensor, maps: Tensor) -> np.ndarray:
    """u0 and the highest u_c of each pixel as grey pictures: (2, H, W) uint8. Of no classes it is 0."""
    highest = torch.cat((torch.zeros_like(attention)[None], maps)).amax(0)
    return (torch.stack((attention, highest)) * 255).byte().cpu().numpy()


def label_split(config, network, split, dataset):
    """Writes the labels of one list's images, of those that have none yet."""
    s, folder = config.make_labels, config.path / "labels"
    pictures = set(engine.spread(dataset.ids, s.pictures))

    def files(name):
        kinds = (*KINDS, "u0", "cam") if name in pictures else KINDS
        return [folder / kind / f"{name}.png" for kind in kinds]

    mine = engine.share(len(dataset))
    left = [i for i in mine if not all(path.exists() for path in files(dataset.ids[i]))]
    loader = engine.read(config, Subset(dataset, left))
    bar = engine.bar(loader, f"make_labels {split}", initial=len(mine) - len(left), total=len(mine))
    tasks = (prepare(config, network, sample) for sample in bar)
    for prepared, marginals in engine.overlap(config.run.workers, dense_crf, tasks):
        name, _, outside, boxes, labels, _, maps = prepared
        y_crf, y_ret = finish(s, network, prepared, marginals)
        paths = files(name)
        for path, y in zip(paths, (box_labels(boxes, labels, outside.shape), y_crf, y_ret)):
            datasets.write_mask(path, y)
        if name in pictures:
            for path, grey in zip(paths[len(KINDS):], heat(*maps)):
                datasets.write(path, datasets.png(Image.fromarray(grey)))


def main(config: SimpleNamespace) -> None:
    s, folder = config.make_labels, config.path / "labels"
    network = models.BoxClassifier(len(config.data.classes), config.train_cls.backbone, width=config.train_cls.width)
    network = engine.load_network(config, "cls.pt", network, config.train_cls, s.weights)
    path = folder / "scores.json"
    splits = s.splits or filter(None, (config.data.train, config.data.val))
    data = {split: engine.open_data(config, split) for split in splits}  # all: a fault ends it before the work
    settings = engine.made_with(config, "make_labels", without=("weights", "splits", "pictures"))
    engine.claim(config, folder, settings, Path(s.weights or config.path / "cls.pt"))
    for split, dataset in data.items():
        label_split(config, network, split, dataset)
        engine.wait()
        if not engine.true_masks(config, split):
            print(f"{folder}: labels of {split}, {len(dataset)} images, of which none has a true mask")
            continue
        result = engine.score_folders(config, split, {kind: folder / kind for kind in KINDS})
        if engine.rank():
            continue
        count = result["Ycrf"]["images"]
        engine.write_json(path, engine.read_json(path) | {split: result})
        engine.show(f"labels of {split}, {count} images with a true mask of {len(dataset)}", result)
        engine.log(config, stage="make_labels", split=split, **{kind: result[kind]["miou"] for kind in KINDS})


if __name__ == "__main__":
    engine.run("make_labels", main)
