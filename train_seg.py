"""Stage 3 (section 3.3 of the paper): Ycrf and Yret -> a DeepLab segmenter,
by the noise-aware loss.

    python train_seg.py [CONFIG.yaml] [key=value ...]

Reads data.root and runs/NAME/labels, or the folders that train_seg.labels
names; writes runs/NAME/seg.pt. data.masks names a list of images whose true
masks replace both labels: semi-supervised training.
"""
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.data import Subset

import datasets
import engine
import losses
import models
import runs
from settings import TrainSeg, UsageError


def segmentation_loss(s: TrainSeg, cosine: Tensor, y_crf: Tensor,
                      y_ret: Tensor) -> Tensor:
    """The loss that the settings name, of cosine (N, L, H, W) and labels
    (N, H, W).
    """
    tensors = cosine, y_crf, y_ret
    loss = {
        "nal": partial(losses.noise_aware_loss, *tensors, s.gamma, s.weight),
        "crf": partial(losses.cross_entropy, cosine, y_crf),
        "ret": partial(losses.cross_entropy, cosine, y_ret),
        "agree": partial(losses.agreement_loss, *tensors),
        "entropy": partial(losses.entropy_loss, *tensors, s.weight),
        "bootstrap": partial(losses.bootstrap_loss, *tensors, s.weight),
    }[s.loss]
    return loss(temperature=s.temperature, group=runs.all_ranks())


def label_folders(config: SimpleNamespace) -> list[Path]:
    """The folders of Ycrf and Yret, or of the one kind of labels there is."""
    named = config.train_seg.labels
    if len(named) > 2:
        raise UsageError(f"train_seg.labels names {len(named)} folders, not "
                         "one or two")
    folders = [Path(name) if Path(name).is_dir()
               else Path(config.data.root, name) for name in named]
    way_out = "correct train_seg.labels"
    if not named:
        folders = [config.path / "labels" / kind for kind in ("Ycrf", "Yret")]
        way_out = ("make it with python make_labels.py, or name another "
                   "run's labels in train_seg.labels")
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is missing: {way_out}")
    return [folder.resolve() for folder in folders]


def refuse_empty_labels(dataset: datasets.VOCDataset) -> None:
    """Refuses folders whose labels of the listed images hold nothing but
    background and void.
    """
    paths = zip(*map(dataset.mask_paths, dataset.ids))
    for folder, files in zip(dataset.mask_folders, paths):
        masks = (datasets.read_mask(file, datasets.VOID) for file in files)
        if not any(((mask > 0) & (mask < datasets.VOID)).any()
                   for mask in masks):
            raise UsageError(
                f"{folder}: no listed image has a label other than 0 and "
                "255, which are background and void; is 255 the object? "
                "Save class k as the value k")


def scored_images(config: SimpleNamespace) -> Subset | None:
    """The images with a true mask that are scored during the training."""
    s, data = config.train_seg, config.data
    if not s.val_images and not s.keep_best:
        return None
    truth = data.val and engine.true_masks(config, data.val)
    if not truth or not s.val_images:
        raise UsageError("train_seg.val_images and keep_best need a number "
                         "of images, and true masks of data.val")
    dataset = datasets.VOCDataset(data.root, data.val, data.classes,
                                  boxes=False, masks=[truth], scored=truth)
    return Subset(dataset, runs.spread(range(len(dataset)), s.val_images))


def main(config: SimpleNamespace) -> None:
    s, data = config.train_seg, config.data
    folders = label_folders(config)
    torch.manual_seed(config.run.seed)
    weights = config.path / "cls.pt" if s.weights == "stage1" else s.weights
    network = models.DeepLab(1 + len(data.classes), s.backbone, weights,
                             s.width, s.dropout)
    masked = datasets.find_images(data.root, data.masks) if data.masks else ()
    dataset = datasets.VOCDataset(
        data.root, data.train, data.classes, boxes=s.balance,
        masks=folders, truth=data.truth, exact=masked,
        transform=datasets.training_transform(
            s.crop, network.fill, s.scale, s.jitter))
    if unused := sorted({*masked} - {*dataset.ids}):
        raise UsageError(f"data.masks: {unused[0]} is not in data.train "
                         f"({len(unused)} of {len(masked)} are not); add it "
                         "there, so that it is learnt from")
    if s.labels:
        refuse_empty_labels(dataset)

    def objective(network, batch):
        labels = models.upload(batch["masks"], batch["image"].device)
        y_crf, y_ret = labels[:, 0], labels[:, -1]
        cosine = network(batch["image"])
        return {"loss": segmentation_loss(s, cosine, y_crf, y_ret)}

    def inputs():
        files = [path for name in dataset.ids
                 for path in dataset.mask_paths(name)]
        boxes = map(dataset.annotation_path, dataset.ids if s.balance else ())
        return {"data.masks": data.masks,
                "content of boxes": runs.digest(*boxes),
                "content of labels": runs.digest(*files),
                "weights file": runs.digest(Path(weights))}

    engine.train(config, "train_seg", network, dataset, objective, inputs,
                 scored_images(config))


if __name__ == "__main__":
    runs.launch("train_seg", main)
