"""How sure is a difference of mIoU, given these images? A bootstrap over them.

    python benchmarks/bootstrap.py CONFIG.yaml LIST FOLDER [FOLDER ...] minus FOLDER [FOLDER ...]

A FOLDER holds ID.png for the images of LIST, such as runs/NAME/predictions/plain or runs/NAME/labels/Ycrf; those
before minus and those after are of the same seeds, in the same order. The images are drawn again with replacement,
10,000 times, the same ones for every folder. Prints the mean over seeds of the difference of mIoU on the whole list,
and the interval that holds 95 % of the draws.
"""
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import engine  # noqa: E402
import settings  # noqa: E402

DRAWS = 10_000


def confusions(config, split, folder):
    """A confusion matrix of each image: (images, labels, labels + 1)."""
    truth = engine.true_masks(config, split)
    dataset = datasets.VOCDataset(config.data.root, split, config.data.classes, boxes=False,
                                  masks=[truth, Path(folder).resolve()], scored=truth)
    num_labels = 1 + len(config.data.classes)
    return np.stack([engine.confusion(*sample["masks"].numpy(), num_labels) for sample in tqdm(dataset, folder)])


def miou(matrices):
    """(draws, labels, labels + 1) -> (draws,), in per cent."""
    right = matrices.diagonal(axis1=1, axis2=2)
    union = matrices.sum(2) + matrices[:, :, :-1].sum(1) - right
    iou = np.where(union > 0, right / np.maximum(union, 1), np.nan)
    return 100 * np.nanmean(iou, 1)


def differences(ours, theirs, draws=DRAWS):
    """Lists of confusions, seed by seed -> the difference of mIoU of the whole list, and of each draw (draws,)."""
    images = len(ours[0])
    counts = np.random.default_rng(0).multinomial(images, [1 / images] * images, draws)
    counts = np.concatenate((np.ones((1, images), int), counts))  # first the list itself

    def mean_over_seeds(all_confusions):
        return np.mean([miou(np.tensordot(counts, c, 1)) for c in all_confusions], 0)

    found = mean_over_seeds(ours) - mean_over_seeds(theirs)
    return found[0], found[1:]


def main(path, split, *folders):
    config = settings.read("eval", [path])
    cut = folders.index("minus")
    ours, theirs = ([confusions(config, split, f) for f in some] for some in (folders[:cut], folders[cut + 1:]))
    whole, drawn = differences(ours, theirs)
    low, high = np.percentile(drawn, (2.5, 97.5))
    print(f"mIoU {whole:+.2f}, 95 % of {DRAWS:,} draws of {len(ours[0])} images in {low:+.2f} to {high:+.2f}")


if __name__ == "__main__":
    if len(sys.argv) < 6 or "minus" not in sys.argv:
        sys.exit("usage: python benchmarks/bootstrap.py CONFIG.yaml LIST FOLDER [...] minus FOLDER [...]")
    main(*sys.argv[1:])
