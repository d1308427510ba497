"""Stage 1 (section 3.1 of the paper): boxes -> a classifier whose features
tell objects from background.

    python train_cls.py [CONFIG.yaml] [key=value ...]

Reads data.root, writes runs/NAME/cls.pt.
"""
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import datasets
import engine
import models
import runs
from losses import weighted_mean
from settings import UsageError


def objective(network: models.BoxClassifier,
              batch: dict) -> dict[str, Tensor]:
    """Cross-entropy over every foreground feature (its box's class) and
    every background query (class 0); and the shares of both that are
    classified right.
    """
    pooled = network(batch["image"], batch["boxes"], batch["background"])
    labels = models.upload(torch.cat(batch["labels"]), batch["image"].device)
    labels = labels[:, None].expand(pooled.foreground.shape[:2]).flatten()
    logits = torch.cat((pooled.foreground.flatten(0, 1), pooled.queries))
    background = labels.new_zeros(pooled.queries.shape[0])
    targets = torch.cat((labels, background))

    ce = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(1) == targets).float()
    of_boxes = torch.cat((torch.ones_like(labels), background)).float()
    group = runs.all_ranks()
    # A weighted mean, since a batch may hold no boxes and no background: its
    # loss is then 0, not 0 / 0.
    return {
        "loss": weighted_mean(ce, torch.ones_like(ce), group),
        "right_boxes": weighted_mean(right, of_boxes, group),
        "right_queries": weighted_mean(right, 1 - of_boxes, group),
    }


def main(config: SimpleNamespace) -> None:
    s, data = config.train_cls, config.data
    if s.crop % models.STRIDE != 1:
        raise UsageError(f"train_cls.crop is {s.crop}, not 8 k + 1, such as "
                         "321")
    torch.manual_seed(config.run.seed)
    pooling = models.BAP(s.grid, s.bins, s.min_background,
                         aware=s.pooling == "bap")
    network = models.BoxClassifier(
        len(data.classes), s.backbone, s.weights, s.width, s.dropout, pooling)
    dataset = datasets.VOCDataset(
        data.root, data.train, data.classes,
        transform=datasets.training_transform(
            s.crop, network.fill, s.scale, s.jitter))

    def inputs():
        files = map(dataset.annotation_path, dataset.ids)
        return {"content of boxes": runs.digest(*files),
                "weights file": runs.digest(Path(s.weights))}

    engine.train(config, "train_cls", network, dataset, objective, inputs)


if __name__ == "__main__":
    runs.launch("train_cls", main)
