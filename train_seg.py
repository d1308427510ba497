"""Stage 3 (section 3.3 of the paper): Ycrf and Yret -> a DeepLab segmenter, by the noise-aware loss.

    python train_seg.py [CONFIG.yaml] [key=value ...]

Reads data.root and runs/NAME/labels, or the folders that train_seg.labels names; writes runs/NAME/seg.pt. data.masks
names a list of images whose true masks stand in for both labels: semi-supervised training.
"""
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch

import datasets
import engine
import losses
import models


@dataclass
class Settings(engine.Training):
    """Section `train_seg` of the YAML file."""
    weights: str = "imagenet"  # imagenet, caffe, none, a file, or stage1: the backbone of cls.pt
    labels: list[str] = field(default_factory=list)  # folders of ID.png to learn from, as they lie or under data.root:
    # two stand for Ycrf and Yret, of one any loss is cross-entropy; none: the run's own
    loss: Literal["nal", "crf", "ret", "agree", "entropy", "bootstrap"] = "nal"  # crf, ret: cross-entropy on one
    gamma: float = 7.0  # of nal: how fast trust falls with the classifier's own doubt
    weight: float = 0.1  # lambda: of the loss where Ycrf and Yret differ
    temperature: float = 20.0  # logits are temperature x cosine
    iterations: int = 23805


def segmentation_loss(s: Settings, cosine: torch.Tensor, y_crf: torch.Tensor, y_ret: torch.Tensor) -> torch.Tensor:
    """The loss that the settings name, of cosine (N, L, H, W) and labels (N, H, W)."""
    maps = cosine, y_crf, y_ret
    loss = {
        "nal": partial(losses.noise_aware_loss, *maps, s.gamma, s.weight),
        "crf": partial(losses.cross_entropy, cosine, y_crf),
        "ret": partial(losses.cross_entropy, cosine, y_ret),
        "agree": partial(losses.agreement_loss, *maps),
        "entropy": partial(losses.entropy_loss, *maps, s.weight),
        "bootstrap": partial(losses.bootstrap_loss, *maps, s.weight),
    }[s.loss]
    return loss(temperature=s.temperature, group=engine.group())


def label_folders(config: SimpleNamespace) -> list[Path]:
    """The folders of Ycrf and Yret, or of the one kind of labels there is."""
    named = config.train_seg.labels
    if len(named) > 2:
        raise engine.UsageError(f"train_seg.labels names {len(named)} folders, not one or two")
    own = [config.path / "labels" / kind for kind in ("Ycrf", "Yret")]
    folders = [Path(name) if Path(name).is_dir() else Path(config.data.root, name) for name in named] or own
    for folder in folders:
        if not folder.is_dir():
            way_out = "correct train_seg.labels" if named else "make it with python make_labels.py"
            raise engine.UsageError(f"{folder} is missing: {way_out}")
    return [folder.resolve() for folder in folders]


def check_labels(dataset: datasets.VOCDataset) -> None:
    """Refuses folders whose labels of the listed images say nothing but background and void."""
    paths = zip(*map(dataset.mask_paths, dataset.ids))
    for folder, files in zip(dataset.mask_folders, paths):
        masks = (datasets.read_mask(file, datasets.VOID) for file in files)
        if not any(((mask > 0) & (mask < datasets.VOID)).any() for mask in masks):
            raise engine.UsageError(f"{folder}: no listed image has a label other than 0 and 255, which are background "
                                    "and void; is 255 the object? Save class k as the value k")


def main(config: SimpleNamespace) -> None:
    s, folders = config.train_seg, label_folders(config)
    torch.manual_seed(config.run.seed)
    weights = config.path / "cls.pt" if s.weights == "stage1" else s.weights
    network = models.DeepLab(1 + len(config.data.classes), s.backbone, weights, s.width, s.dropout)
    masked = datasets.find_images(config.data.root, config.data.masks, config.data.images) if config.data.masks else ()
    transform = datasets.training_transform(s.crop, network.fill, s.scale, s.jitter)
    dataset = engine.open_data(config, config.data.train, s.balance, transform=transform, truth=config.data.truth,
                               masks=folders, exact=masked)
    if s.labels:
        check_labels(dataset)

    def losses_of(network, batch):
        labels = batch["masks"].to(batch["image"].device, non_blocking=True)
        y_crf, y_ret = labels[:, 0], labels[:, -1]
        return {"loss": segmentation_loss(s, network(batch["image"]), y_crf, y_ret)}

    inputs = {"data.masks": config.data.masks,
              "content of labels": engine.digest(*(path for name in dataset.ids for path in dataset.mask_paths(name))),
              "weights file": engine.digest(Path(weights))}
    engine.train(config, "train_seg", s, network, dataset, losses_of, **inputs)


if __name__ == "__main__":
    engine.run("train_seg", main)
