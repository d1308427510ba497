"""Stage 3 (section 3.3 of the paper): Ycrf and Yret -> a DeepLab segmenter, by the noise-aware loss.

    python train_seg.py [CONFIG.yaml] [key=value ...]

Reads data.root and runs/NAME/labels, writes runs/NAME/seg.pt. data.masks names a list of images whose true masks
stand in for both labels: semi-supervised training.
"""
from dataclasses import dataclass
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
    weights: str = "imagenet"  # imagenet, imagenet_features, none, a file, or stage1: the backbone of cls.pt
    loss: Literal["nal", "crf", "ret", "agree", "entropy", "bootstrap"] = "nal"  # crf, ret: cross-entropy on one
    gamma: float = 7.0  # of nal: how fast trust falls with the classifier's own doubt
    weight: float = 0.1  # lambda: of the loss where Ycrf and Yret differ
    temperature: float = 20.0  # logits are temperature x cosine
    iterations: int = 23805


def segmentation_loss(s: Settings, cosine: torch.Tensor, y_crf: torch.Tensor, y_ret: torch.Tensor) -> torch.Tensor:
    """The loss that the settings name, of cosine (N, L, H, W) and labels (N, H, W) int64."""
    common: dict = dict(temperature=s.temperature, group=engine.group())
    if s.loss == "crf":
        return losses.cross_entropy(cosine, y_crf, **common)
    if s.loss == "ret":
        return losses.cross_entropy(cosine, y_ret, **common)
    if s.loss == "agree":
        return losses.agreement_loss(cosine, y_crf, y_ret, **common)
    if s.loss == "entropy":
        return losses.entropy_loss(cosine, y_crf, y_ret, s.weight, **common)
    if s.loss == "bootstrap":
        return losses.bootstrap_loss(cosine, y_crf, y_ret, s.weight, **common)
    return losses.noise_aware_loss(cosine, y_crf, y_ret, s.gamma, s.weight, **common)


def main(config: SimpleNamespace) -> None:
    s = config.train_seg
    folders = [config.path / "labels" / kind for kind in ("Ycrf", "Yret")]
    for folder in folders:
        if not folder.is_dir():
            raise engine.UsageError(f"{folder} is missing: make it with python make_labels.py")
    torch.manual_seed(config.run.seed)
    weights = config.path / "cls.pt" if s.weights == "stage1" else s.weights
    network = models.DeepLab(1 + len(config.data.classes), s.backbone, weights, s.width, s.dropout)
    masked = datasets.find_images(config.data.root, config.data.masks, config.data.images) if config.data.masks else ()
    transform = datasets.training_transform(s.crop, network.fill, s.scale, s.jitter)
    dataset = engine.open_data(config, config.data.train, s.balance, transform=transform, truth=config.data.truth,
                               masks=[folder.resolve() for folder in folders], exact=masked)

    def losses_of(network, batch):
        y_crf, y_ret = batch["masks"].to(batch["image"].device, non_blocking=True).long().unbind(1)
        return {"loss": segmentation_loss(s, network(batch["image"]), y_crf, y_ret)}

    inputs = {"data.masks": config.data.masks, "data.truth": config.data.truth if masked else None,
              "labels": engine.digest(config.path / "labels" / "made_with.json"),
              "weights file": engine.digest(Path(weights))}
    engine.train(config, "train_seg", s, network, dataset, losses_of, **inputs)


if __name__ == "__main__":
    engine.run("train_seg", main)
