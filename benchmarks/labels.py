"""The settings of make_labels.py against each other, on one trained classifier: mIoU of Ycrf and Yret.

    python benchmarks/labels.py [CONFIG.yaml] [key=value ...]

Reads runs/NAME/cls.pt; takes up to 100 images, evenly spaced, of data.train's and data.val's lists, or of
make_labels.splits. The network runs once an image; each row differs from the settings in what it names.
"""
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine  # noqa: E402
import make_labels  # noqa: E402
import models  # noqa: E402
from crf import dense_crf  # noqa: E402

IMAGES = 100
ROWS = {
    "as set": {}, "threshold 0": dict(threshold=0.0), "threshold 0.5": dict(threshold=0.5),
    "threshold 0.8": dict(threshold=0.8), "threshold 0.9": dict(threshold=0.9), "threshold 0.95": dict(threshold=0.95),
    "u0 off": dict(u0=False), "u0 off, threshold 0.9": dict(u0=False, threshold=0.9),
    "u0 off, threshold 0": dict(u0=False, threshold=0.0),
    "cam_norm class": dict(cam_norm="class"), "softmax off": dict(softmax=False),
    "the equations: class, softmax off, threshold 0": dict(cam_norm="class", softmax=False, threshold=0.0),
}


def scores(config, split, rows):
    """Of labels of up to IMAGES images of a list, made with each of `rows`: {(row, kind): scores}."""
    network = models.BoxClassifier(len(config.data.classes), config.train_cls.backbone, width=config.train_cls.width)
    network = engine.load_network(config, "cls.pt", network, config.train_cls)
    names, truth = ["background", *config.data.classes], engine.true_masks(config, split)
    data = engine.open_data(config, split, scored=truth, masks=[truth])
    chosen = Subset(data, engine.spread(range(len(data)), IMAGES))
    matrices = {(row, kind): np.zeros((len(names), len(names) + 1), np.int64)
                for row in rows for kind in ("Ycrf", "Yret")}

    def tasks():
        for sample in tqdm(DataLoader(chosen, batch_size=None), split, dynamic_ncols=True):
            with torch.inference_mode(), engine.autocast(config):
                features = network.features(sample["image"].as_subclass(torch.Tensor)[None].to(config.device))
            once = SimpleNamespace(features=lambda _, features=features: features, classifier=network.classifier)
            for row, changes in rows.items():
                s = replace(config.make_labels, **changes)
                variant = SimpleNamespace(**{**vars(config), "make_labels": s})
                prepared, crf = make_labels.prepare(variant, once, sample)
                yield (row, s, prepared, sample["masks"][0].numpy()), crf

    for (row, s, prepared, mask), marginals in engine.overlap(config.run.workers, dense_crf, tasks()):
        for kind, y in zip(("Ycrf", "Yret"), make_labels.finish(s, network, prepared, marginals)):
            matrices[row, kind] += engine.confusion(mask, y, len(names))
    return {key: engine.scores(matrix, names, config) for key, matrix in matrices.items()}


def main(config):
    for split in config.make_labels.splits or filter(None, (config.data.train, config.data.val)):
        results = scores(config, split, ROWS)
        print(f"\n| {split} | Ycrf | Yret |\n|---|---|---|")
        for row in ROWS:
            cells = []
            for kind in ("Ycrf", "Yret"):
                r = results[row, kind]
                cells.append(f"{r['miou']:.1f}" + (f" / {r['miou_over']:.1f}" if "miou_over" in r else ""))
            print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    engine.run("make_labels", main)
