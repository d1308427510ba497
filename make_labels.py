"""Stage 2 (section 3.2 of the paper): classifier and boxes -> the pseudo
labels Ycrf and Yret, and their scores.

    python make_labels.py [CONFIG.yaml] [key=value ...]

Reads data.root and runs/NAME/cls.pt, or the file make_labels.weights. Writes
to runs/NAME/labels, for the lists of make_labels.splits (by default data.train
and data.val): Ycrf/ID.png, Yret/ID.png and box/ID.png (whole boxes as labels,
the baseline); scores.json, over the images that have a true mask; and for a
few images u0/ID.png, u_0 without its threshold, and cam/ID.png, the highest
u_c of each pixel. Images whose labels exist are skipped; boxes.json tells from
which boxes.
"""
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import datasets
import engine
import models
import runs
from crf import dense_crf
from settings import MakeLabels

KINDS = "box", "Ycrf", "Yret"  # of labels, each a folder
HEAT = "u0", "cam"  # of pictures beside them, likewise


class Unaries(NamedTuple):
    """What the network says of one image."""
    up: models.Upsampled  # its features
    classes: list[int]  # labels in the image, ascending
    own: Tensor  # (classes, H, W) bool: the union of each class's boxes
    attention: Tensor  # (H, W) in [0, 1]: A of the background, 1 outside boxes
    cams: Tensor  # (classes, H, W) in [0, 1]: u_c
    probabilities: Tensor  # (1 + classes, H, W): what the CRF starts from


def unions(boxes: Tensor, labels: Tensor, classes: list[int],
           size: Sequence[int]) -> Tensor:
    """The union of each class's boxes: (len(classes), H, W) bool."""
    inside = torch.zeros(len(classes), *size, dtype=torch.bool)
    for box, label in zip(boxes.tolist(), labels.tolist()):
        where = (classes.index(label), *models.box_slices(box))
        inside[where] = True
    return inside


def background_attention(up: models.Upsampled, w: Tensor, outside: Tensor,
                         s: MakeLabels) -> Tensor:
    """A (H, W) in [0, 1]: ReLU(cos(f(p), q)), q the mean feature outside
    boxes; not yet set to 1 there. w: rows of the classifier.

    Without u0, or where no pixel is outside: the activation map
    ReLU(f . w_0), divided by its maximum.
    """
    if s.u0 and outside.any():
        q = up.mean(outside[None])
        return F.relu(up.cosine(q))[0].clamp(max=1)
    cam = F.relu(up.dot(w[:1]))[0]
    return cam / cam.max().clamp(min=1e-12)


def activation_maps(up: models.Upsampled, w: Tensor, boxes: Tensor,
                    labels: Tensor, classes: list[int],
                    s: MakeLabels) -> Tensor:
    """u_c (len(classes), H, W) in [0, 1]: ReLU(f . w_c) over its maximum in
    the box, 0 outside the class's boxes. Where two boxes of a class overlap,
    the later one's values stand. cam_norm=class: over the maximum in all.
    """
    cams = F.relu(up.dot(w[classes]))
    if s.cam_norm == "class":
        own = unions(boxes, labels, classes, cams.shape[1:])
        cams = cams * own.to(cams.device)
        return cams / cams.amax((1, 2), keepdim=True).clamp(min=1e-12)
    u = torch.zeros_like(cams)
    for box, label in zip(boxes.tolist(), labels.tolist()):
        where = (classes.index(label), *models.box_slices(box))
        u[where] = cams[where] / cams[where].max().clamp(min=1e-12)
    return u


def to_probabilities(attention: Tensor, cams: Tensor, outside: Tensor,
                     s: MakeLabels) -> Tensor:
    """{u_0, u_c} -> probabilities (1 + classes, H, W) for the CRF, certain of
    the background outside the boxes. u_0 is A, but 0 where A is below the
    threshold, a share of its maximum over the whole image.
    """
    u0 = attention.where(attention >= s.threshold * attention.max(), 0)
    u = torch.cat((u0[None], cams))
    u = u.softmax(0) if s.softmax else (u + 1e-6) / (u + 1e-6).sum(0)
    certain = torch.zeros_like(u)
    certain[0] = 1
    return torch.where(outside, certain, u)


def upsampled(config: SimpleNamespace, network: models.BoxClassifier,
              image: Tensor) -> models.Upsampled:
    """The features of an image (3, H, W), as if upsampled to its size."""
    with engine.autocast(config):
        batch = image[None].to(config.device,
                               memory_format=torch.channels_last)
        features = network.features(batch)[0]
    size = image.shape[1:]
    return models.Upsampled(features, size, models.padded_size(size))


def logits(config: SimpleNamespace, network: models.BoxClassifier,
           image: Tensor, up: models.Upsampled, w: Tensor,
           sizes: Sequence[float]) -> Tensor:
    """w . f of each pixel of an image (3, H, W) uint8, (rows of w, H, W): the
    mean over the image at several sizes. up: its features at its own size.
    """
    maps = []
    for scale in sizes:
        view = engine.resized(image, scale)[0]
        at_size = up if scale == 1 else upsampled(config, network, view)
        dot = at_size.dot(w)
        maps.append(F.interpolate(dot[None], image.shape[1:], mode="bilinear",
                                  align_corners=False)[0])
    return torch.stack(maps).mean(0)


def logit_probabilities(maps: Tensor, own: Tensor, up: models.Upsampled,
                        s: MakeLabels) -> Tensor:
    """Of maps w . f (1 + classes, H, W), the softmax of

        a_c + s cos(f, q_c),  a_0 = k w_0 . f,  a_c = k (w_c . f + d),

    with q_c the mean feature of the image, weighted by softmax(a)_c. A class
    is impossible outside its own boxes (classes, H, W).
    """
    a = s.logit_scale * torch.cat((maps[:1], maps[1:] + s.logit_bias))
    a[1:].masked_fill_(~own, -torch.inf)
    q = up.mean(a.softmax(0))
    return (a + s.cosine_scale * up.cosine(q)).softmax(0)


@torch.inference_mode()
def unaries(config: SimpleNamespace, network: models.BoxClassifier,
            sample: dict) -> Unaries:
    """A sample of VOCDataset through the network."""
    s, device = config.make_labels, config.device
    image, boxes, labels = (sample[key].as_subclass(torch.Tensor)
                            for key in ("image", "boxes", "labels"))
    classes = sorted(set(labels.tolist()))
    own = unions(boxes, labels, classes, image.shape[1:])
    outside = ~own.any(0).to(device)
    up = upsampled(config, network, image)
    w = network.classifier.weight.float()
    attention = background_attention(up, w, outside, s)
    cams = activation_maps(up, w, boxes, labels, classes, s)
    if s.unary == "logits":
        maps = logits(config, network, image, up, w[[0, *classes]], s.sizes)
        probabilities = logit_probabilities(maps, own.to(device), up, s)
    else:
        probabilities = to_probabilities(attention, cams, outside, s)
    return Unaries(up, classes, own, attention.masked_fill(outside, 1), cams,
                   probabilities)


def label_by_crf(marginals: np.ndarray, u: Unaries) -> Tensor:
    """Ycrf (H, W): argmax of the CRF's marginals (1 + classes, H, W), of a
    class inside its own boxes only.
    """
    p = torch.from_numpy(marginals)
    p = torch.cat((p[:1], p[1:] * u.own))
    # max, since argmax is slower
    return torch.tensor([0, *u.classes])[p.max(0).indices]


@torch.inference_mode()
def label_by_prototypes(y_crf: Tensor, u: Unaries, w: Tensor) -> Tensor:
    """Yret (H, W): argmax_c of ReLU(cos(f(p), q_c)), q_c the mean feature of
    what Ycrf labels c, among the background and the classes whose boxes hold
    p. A class that Ycrf lacks has its row of the classifier as q_c.
    """
    labels = torch.tensor([0, *u.classes], device=w.device)
    masks = y_crf.to(w.device) == labels[:, None, None]
    found = masks.any(2).any(1)[:, None]
    prototypes = torch.where(found, u.up.mean(masks), w[labels])
    cosine = F.relu(u.up.cosine(prototypes))
    cosine[1:].masked_fill_(~u.own.to(w.device), -1)
    return labels[cosine.max(0).indices]


def label_by_boxes(boxes: Tensor, labels: Tensor,
                   size: Sequence[int]) -> np.ndarray:
    """The baseline (H, W) uint8: every box filled with its class, smaller
    boxes over larger ones.
    """
    filled = np.zeros(size, np.uint8)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for k in areas.argsort(descending=True).tolist():
        filled[models.box_slices(boxes[k].tolist())] = labels[k]
    return filled


def heat(u: Unaries) -> list[Image.Image]:
    """A and the highest u_c of each pixel, as grey pictures."""
    nothing = torch.zeros_like(u.attention)[None]
    highest = torch.cat((nothing, u.cams)).amax(0)
    grey = (torch.stack((u.attention, highest)) * 255).byte().cpu().numpy()
    return [Image.fromarray(picture) for picture in grey]


def discard_changed(folder: Path,
                    lists: Iterable[datasets.VOCDataset]) -> None:
    """Removes the labels of images whose annotation is no longer the one that
    made them, which boxes.json remembers by its digest.
    """
    path = folder / "boxes.json"
    before = runs.read_json(path)
    now = {name: runs.digest(dataset.annotation_path(name))
           for dataset in lists for name in dataset.ids}
    for name in now:
        if before.get(name, now[name]) != now[name]:
            for kind in (*KINDS, *HEAT):
                (folder / kind / f"{name}.png").unlink(missing_ok=True)
    if before | now != before:
        runs.write_json(path, before | now)


def label_split(config: SimpleNamespace, network: models.BoxClassifier,
                split: str, dataset: datasets.VOCDataset) -> None:
    """Writes the labels of one list's images, where they are missing."""
    s, folder = config.make_labels, config.path / "labels"
    pictured = set(runs.spread(dataset.ids, s.pictures))

    def files(name):
        kinds = (*KINDS, *HEAT) if name in pictured else KINDS
        return [folder / kind / f"{name}.png" for kind in kinds]

    samples = runs.samples_left(
        config, dataset, f"make_labels {split}",
        lambda name: all(path.exists() for path in files(name)))

    def crf_tasks():
        for sample in samples:
            u = unaries(config, network, sample)
            image = sample["image"].permute(1, 2, 0).numpy()
            yield (sample, u), (image, u.probabilities.cpu().numpy(),
                                s.crf_bilateral, s.crf_gaussian,
                                s.crf_iterations)

    w = network.classifier.weight.float()
    for (sample, u), marginals in runs.overlap(
            config.run.workers, dense_crf, crf_tasks()):
        y_crf = label_by_crf(marginals, u)
        y_ret = label_by_prototypes(y_crf, u, w)
        y_box = label_by_boxes(sample["boxes"], sample["labels"], y_crf.shape)
        box, crf, ret, *pictures = files(sample["id"])
        datasets.write_mask(box, y_box)
        datasets.write_mask(crf, y_crf.byte().numpy())
        datasets.write_mask(ret, y_ret.byte().cpu().numpy())
        if pictures:
            for path, picture in zip(pictures, heat(u)):
                datasets.write_png(path, picture)


def score_split(config: SimpleNamespace, split: str,
                dataset: datasets.VOCDataset) -> None:
    """Scores a list's labels, into scores.json, the log and on screen."""
    folder = config.path / "labels"
    if not engine.true_masks(config, split):
        print(f"{folder}: labels of {split}, {len(dataset)} images, of which "
              "none has a true mask")
        return
    result = engine.score_folders(config, split,
                                  {kind: folder / kind for kind in KINDS})
    if runs.rank():
        return
    path = folder / "scores.json"
    runs.write_json(path, runs.read_json(path) | {split: result})
    runs.log(config, "make_labels", split=split,
             **{kind: result[kind]["miou"] for kind in KINDS})
    engine.print_scores(
        f"labels of {split}, {result['Ycrf']['images']} images with a true "
        f"mask of {len(dataset)}", result)


def main(config: SimpleNamespace) -> None:
    s, data = config.make_labels, config.data
    network = runs.load_network(config, "cls.pt", models.BoxClassifier,
                                config.train_cls, s.weights, data.classes)
    splits = s.splits or [split for split in (data.train, data.val) if split]
    # All are opened first, so that a fault ends this before the work.
    lists = {split: datasets.VOCDataset(data.root, split, data.classes)
             for split in splits}
    without = {"weights", "splits", "pictures"}
    if s.unary == "attention":
        without |= {"logit_scale", "logit_bias", "cosine_scale", "sizes"}
    made_with = runs.settings_of(config, "make_labels", without=without)
    runs.discard_outdated(config, config.path / "labels", "make_labels",
                          made_with, Path(s.weights or config.path / "cls.pt"))
    if runs.rank() == 0:
        discard_changed(config.path / "labels", lists.values())
    runs.barrier()
    for split, dataset in lists.items():
        label_split(config, network, split, dataset)
        runs.barrier()
        score_split(config, split, dataset)


if __name__ == "__main__":
    runs.launch("make_labels", main)
