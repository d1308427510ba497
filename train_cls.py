"""Stage 1 (section 3.1 of the paper): boxes -> a classifier whose features know the background.

    python train_cls.py [CONFIG.yaml] [key=value ...]

Reads data.root, writes runs/NAME/cls.pt.
"""
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

import datasets
import engine
import models
from losses import weighted_mean


@dataclass
class Settings(engine.Training):
    """Section `train_cls` of the YAML file."""
    pooling: Literal["bap", "gap"] = "bap"  # background-aware, or plain average pooling
    grid: int = 4  # N: background queries come from N x N parts of the feature map
    bins: int = 2  # a box gives bins x bins foreground features
    min_background: float = 0.125  # share of background at or under which an image is pooled plainly
    drop_at: int = 5000


def losses(network: models.BoxClassifier, batch: dict) -> dict[str, torch.Tensor]:
    """Cross-entropy over every foreground feature (its box's class) and every background query (class 0); and the
    shares of both that are classified right.
    """
    scores = network(batch["image"], batch["boxes"], batch["background"])
    labels = models.upload(torch.cat(batch["labels"]), batch["image"].device)
    labels = labels[:, None].expand(scores.foreground.shape[:2]).flatten()
    logits = torch.cat((scores.foreground.flatten(0, 1), scores.queries))
    targets = torch.cat((labels, labels.new_zeros(scores.queries.shape[0])))
    ce = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(1) == targets).float()
    boxes = (torch.arange(targets.shape[0], device=ce.device) < labels.shape[0]).float()
    mean, group = weighted_mean, engine.group()
    # An empty batch (no boxes, no background) has a loss of 0, not of 0 / 0.
    return {"loss": mean(ce, torch.ones_like(ce), group), "right_boxes": mean(right, boxes, group),
            "right_queries": mean(right, 1 - boxes, group)}


def main(config: SimpleNamespace) -> None:
    s = config.train_cls
    if s.crop < 9 or s.crop % models.STRIDE != 1:
        raise engine.UsageError(f"train_cls.crop is {s.crop}, not 8 k + 1, such as 321: then the map has no margin")
    torch.manual_seed(config.run.seed)
    pooling = models.BAP(s.grid, s.bins, s.min_background, aware=s.pooling == "bap")
    network = models.BoxClassifier(len(config.data.classes), s.backbone, s.weights, s.width, s.dropout, pooling)
    transform = datasets.training_transform(s.crop, network.fill, s.scale, s.jitter)
    dataset = engine.open_data(config, config.data.train, transform=transform)
    engine.train(config, "train_cls", s, network, dataset, losses, **{"weights file": engine.digest(Path(s.weights))})


if __name__ == "__main__":
    engine.run("train_cls", main)
