"""Does the noise-aware loss trust the right pixels, as its training goes on?

    python benchmarks/sigma.py CONFIG.yaml LIST YCRF YRET RUN [key=value ...]

YCRF and YRET are folders of labels. RUN is a folder of runs/ with seg.pt and, of the same training, checkpoints
seg_ITERATION.pt, which benchmarks/voc2007.py keeps of nal_0. Over the images of LIST that have a true mask, one scale,
no flip: where Ycrf and Yret differ, sigma is the weight of a pixel in L_wce (gamma of the settings). Prints how often
the labels are right where they agree and where they differ, and of each checkpoint: the area under the ROC curve of
sigma as a test of Ycrf being right; the mean of sigma where Ycrf is right and where it is wrong; the share of right
pixels with sigma of 1/2 or more, and of wrong ones below; the share of the total weight that lies on right pixels.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import engine
import losses
import models
import runs
import settings

BINS = 1000  # of sigma's histogram
HEAD = ("| iterations | AUC | sigma, Ycrf right | Ycrf wrong | right: sigma >= 1/2 | wrong: sigma < 1/2 | "
        "weight on right pixels |\n|---|---|---|---|---|---|---|")


@torch.inference_mode()
def histograms(config, network, dataset):
    """Pixels where the labels differ, by Ycrf wrong or right and by sigma: (2, BINS) int64."""
    counts = np.zeros((2, BINS), np.int64)
    for sample in runs.bar(runs.in_workers(config, dataset), "sigma"):
        image, masks = (sample[key].as_subclass(torch.Tensor) for key in ("image", "masks"))
        truth, y_crf, y_ret = masks
        with engine.autocast(config):
            cosine = engine.predict(network, image.to(config.device)).float().cpu()
        known = (masks != datasets.VOID).all(0)
        differ = (y_crf != y_ret) & known
        sigma, = losses.confidence(cosine[None], y_crf[None], differ, config.train_seg.gamma)
        bins = (sigma * BINS).long().clamp(max=BINS - 1)
        for right in (0, 1):
            chosen = bins[differ & ((y_crf == truth) == right)].numpy()
            counts[right] += np.bincount(chosen, minlength=BINS)
    return counts


def row(iterations, counts):
    """A line of the table, of histograms."""
    wrong, right = counts
    middle = (np.arange(BINS) + 0.5) / BINS
    below = wrong.cumsum() - wrong / 2  # wrong pixels of lower sigma, and half of those in the same bin
    cells = [f"{(right * below).sum() / right.sum() / wrong.sum():.3f}",
             f"{np.average(middle, weights=right):.2f}", f"{np.average(middle, weights=wrong):.2f}",
             f"{100 * right[BINS // 2:].sum() / right.sum():.1f} %",
             f"{100 * wrong[:BINS // 2].sum() / wrong.sum():.1f} %",
             f"{100 * (right * middle).sum() / (counts * middle).sum():.1f} %"]
    return f"| {iterations:,} | {' | '.join(cells)} |"


def how_right(dataset):
    """In per cent: pixels where the labels agree, right labels of these; right labels of Ycrf and Yret elsewhere."""
    counts = np.zeros(5)
    for sample in dataset:
        masks = sample["masks"].numpy()
        truth, y_crf, y_ret = masks
        known, same = (masks != datasets.VOID).all(0), y_crf == y_ret
        counts += [known.sum(), (known & same).sum(), (known & same & (y_crf == truth)).sum(),
                   (known & ~same & (y_crf == truth)).sum(), (known & ~same & (y_ret == truth)).sum()]
    pixels, agree, right, crf, ret = counts
    differ = pixels - agree
    return 100 * np.array([agree / pixels, right / agree, crf / differ, ret / differ])


def main(config_file, split, y_crf, y_ret, run, *changes):
    config = settings.read("train_seg", [config_file, *changes])
    config.device = runs.find_device(config.run.device)
    truth = engine.true_masks(config, split)
    dataset = datasets.VOCDataset(config.data.root, split, config.data.classes, boxes=False, scored=truth,
                                  masks=[truth, Path(y_crf).resolve(), Path(y_ret).resolve()])
    agree, right, crf, ret = how_right(dataset)
    print(f"{split}, {len(dataset)} images: Ycrf and Yret agree on {agree:.1f} % of the pixels and are right on "
          f"{right:.1f} % of these; elsewhere Ycrf is right on {crf:.1f} %, Yret on {ret:.1f} %.\n\n{HEAD}")
    folder = Path("runs", run)
    network = models.load(folder / "seg.pt").to(config.device, memory_format=torch.channels_last)
    kept = {int(re.findall(r"\d+", path.stem)[0]): path for path in folder.glob("seg_[0-9]*.pt")}
    kept[network.trained_with["train_seg.iterations"]] = folder / "seg.pt"
    for iteration, path in sorted(kept.items()):
        network.load_state_dict(models.read_file(path)["model"])
        print(row(iteration, histograms(config, network, dataset)))


if __name__ == "__main__":
    if len(sys.argv) < 6:
        sys.exit("usage: python benchmarks/sigma.py CONFIG.yaml LIST YCRF YRET RUN [key=value ...]")
    try:
        main(*sys.argv[1:])
    except runs.FAULTS as fault:
        sys.exit(str(fault))
