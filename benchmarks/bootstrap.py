"""How sure is a difference of mIoU, given these images? A bootstrap over them.

    python benchmarks/bootstrap.py CONFIG.yaml LIST FOLDER [FOLDER ...] minus FOLDER [FOLDER ...]

A FOLDER holds ID.png for the images of LIST, such as runs/NAME/predictions/plain or runs/NAME/labels/Ycrf; those
before minus and those after are of the same seeds. The images are drawn again with replacement, 10,000 times, the same
ones for every folder. Prints the mean over seeds of the difference of mIoU on the whole list, and the interval that
holds 95 % of the draws. Needs scipy.
"""
import sys
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import engine
import settings

DRAWS = 10_000


def confusions(config, split, folder):
    """A confusion matrix of each image: (images, labels, labels + 1)."""
    truth = engine.true_masks(config, split)
    dataset = datasets.VOCDataset(config.data.root, split, config.data.classes, boxes=False,
                                  masks=[truth, Path(folder).resolve()], scored=truth)
    num_labels = 1 + len(config.data.classes)
    return np.stack([engine.confusion(*sample["masks"].numpy(), num_labels) for sample in tqdm(dataset, folder)])


def bootstrap(ours, theirs, names, draws=DRAWS):
    """Confusions of each folder -> the difference of the mean mIoU, and scipy's result of the draws."""
    def miou(confusions, drawn):
        return np.mean([engine.scores(c[drawn].sum(0), names)["miou"] for c in confusions])

    def difference(drawn):
        return miou(ours, drawn) - miou(theirs, drawn)

    images = np.arange(len(ours[0]))
    return difference(images), stats.bootstrap((images,), difference, n_resamples=draws, vectorized=False,
                                               method="percentile", random_state=0)


def main(path, split, *folders):
    config = settings.read("eval", [path])
    cut = folders.index("minus")
    ours, theirs = ([confusions(config, split, f) for f in some] for some in (folders[:cut], folders[cut + 1:]))
    whole, drawn = bootstrap(ours, theirs, ["background", *config.data.classes])
    low, high = drawn.confidence_interval
    print(f"mIoU {whole:+.2f}, 95 % of {DRAWS:,} draws of {len(ours[0])} images in {low:+.2f} to {high:+.2f}")


if __name__ == "__main__":
    if len(sys.argv) < 6 or "minus" not in sys.argv:
        sys.exit("usage: python benchmarks/bootstrap.py CONFIG.yaml LIST FOLDER [...] minus FOLDER [...]")
    try:
        main(*sys.argv[1:])
    except (datasets.DataError, settings.UsageError) as fault:
        sys.exit(str(fault))
