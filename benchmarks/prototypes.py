"""Is Yret as good as the features, or as the labels that its prototypes are means of?

    python benchmarks/prototypes.py CONFIG.yaml LIST cls.pt [cls.pt ...] YCRF [YCRF ...] [key=value ...]

Over the images of LIST that have a true mask: Yret of each classifier, with prototypes from the true masks (void counts
as background) and from the labels in each folder YCRF. Prints mIoU, %: a row a classifier, a column a source. Then, of
the prototypes from the true masks, the mistakes inside boxes between objects and background; of object pixels also on
either side of A = 1/2, the classifier's own background attention.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import engine
import make_labels
import models
import runs
import settings


def mistakes(truth, y_ret, attention):
    """(pixels, of these wrong) inside boxes, where A < 1: of objects with A < 1/2 and with more, wrong if called
    background; and of the background, wrong if called an object: (3, 2). All arguments are (H, W)."""
    known, objects, found = (truth != datasets.VOID) & (attention < 1), truth > 0, y_ret > 0
    kinds = objects & (attention < 0.5), objects & (attention >= 0.5), ~objects
    return torch.stack([torch.stack(((kind & known).sum(), (kind & known & (found != objects)).sum()))
                        for kind in kinds])


@torch.inference_mode()
def measure(config, network, dataset):
    """mIoU of Yret by the source of its prototypes: the masks of the dataset, of which the first is the truth; and the
    mistakes of the first."""
    names = ["background", *config.data.classes]
    w, matrices, wrong = network.classifier.weight.float(), 0, 0
    for sample in runs.bar(runs.in_workers(config, dataset), "prototypes"):
        u = make_labels.unaries(config, network, sample)
        masks = sample["masks"].as_subclass(torch.Tensor)
        given = [make_labels.label_by_prototypes(mask.where(mask != datasets.VOID, 0), u, w) for mask in masks]
        wrong = wrong + mistakes(masks[0], given[0].cpu(), u.attention.cpu())
        matrices = matrices + np.stack([engine.confusion(masks[0].numpy(), y_ret.byte().numpy(force=True), len(names))
                                        for y_ret in given])
    return [engine.scores(matrix, names)["miou"] for matrix in matrices], wrong


def row_of_mistakes(wrong):
    """Cells of the second table, in %."""
    (low, missed_low), (high, missed_high), (background, found) = wrong.tolist()
    shares = ((missed_low + missed_high, low + high), (high, low + high), (missed_low, low), (missed_high, high),
              (found, background))
    return " | ".join(f"{100 * part / max(whole, 1):.1f}" for part, whole in shares)


def main(config_file, split, *arguments):
    changes = [a for a in arguments if "=" in a]
    config = settings.read("make_labels", [config_file, *changes])
    config.device = runs.find_device(config.run.device)
    paths = [Path(a).resolve() for a in arguments if "=" not in a]
    folders, truth = [path for path in paths if path.is_dir()], engine.true_masks(config, split)
    dataset = datasets.VOCDataset(config.data.root, split, config.data.classes, masks=[truth, *folders], scored=truth)
    sources, rows = ["true masks", *(str(folder) for folder in folders)], []
    print(f"| {split}, {len(dataset)} images: Yret, mIoU, % | {' | '.join(sources)} |\n|---|{'---|' * len(sources)}")
    for path in paths:
        if path not in folders:
            network = runs.load_network(config, "cls.pt", models.BoxClassifier, config.train_cls, path,
                                        config.data.classes)
            mious, wrong = measure(config, network, dataset)
            print(f"| {path} | {' | '.join(f'{miou:.1f}' for miou in mious)} |")
            rows.append(f"| {path} | {row_of_mistakes(wrong)} |")
    print("\n| %, prototypes from the true masks | objects called background | A >= 1/2 | of A < 1/2 | of A >= 1/2 | "
          "background in boxes called an object |\n|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python benchmarks/prototypes.py CONFIG.yaml LIST cls.pt [cls.pt ...] YCRF [YCRF ...]")
    try:
        main(*sys.argv[1:])
    except runs.FAULTS as fault:
        sys.exit(str(fault))
