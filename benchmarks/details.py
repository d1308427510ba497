"""What do the details of stage 2 change in which the authors' code departs from the equations (docs/deviations.md)?

    python benchmarks/details.py CONFIG.yaml LIST cls.pt [key=value ...]

Labels the images of LIST that have a true mask with the settings, and again with one detail otherwise: first those
before the CRF, which runs for each of them; then, from the marginals of the settings, those after it. Prints the mIoU
of Ycrf and Yret, and of each detail the change, with the interval that holds 95 % of 1,000 draws of the images. Needs
scipy.
"""
import sys
from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bootstrap  # noqa: I001
import datasets
import engine
import make_labels
import models
import runs
import settings
from crf import dense_crf

SETTINGS = "as in the settings"
BEFORE = {SETTINGS: {}, "attention is not cut (threshold=0)": {"threshold": 0.0},
          "maps over their class's maximum (cam_norm=class)": {"cam_norm": "class"},
          "no softmax before the CRF (softmax=false)": {"softmax": False}}
ANYWHERE = "a class may stand outside its boxes"
LACKING = "no prototype of a class that Ycrf lacks"


def probabilities(u, w, sample, s, logits):
    """What the CRF starts from, as make_labels.unaries makes it, from features that are there already. logits(sizes):
    w . f of the background and of the image's classes."""
    if s.unary == "logits":
        return make_labels.logit_probabilities(logits(tuple(s.sizes)), u.own.to(w.device), u.up, s)
    outside = sample["background"][0].as_subclass(torch.Tensor).to(w.device) == 1
    attention = make_labels.background_attention(u.up, w, outside, s)
    cams = make_labels.activation_maps(u.up, w, sample["boxes"], sample["labels"], u.classes, s)
    return make_labels.to_probabilities(attention, cams, outside, s)


@torch.inference_mode()
def labels(config, network, dataset, before, after):
    """Yields a sample, a detail, and Ycrf and Yret with it, (H, W) each. before: the settings of each detail before the
    CRF. after: whether those after it are asked for, too."""
    w = network.classifier.weight.float()

    def crf_tasks():
        for sample in runs.bar(runs.in_workers(config, dataset), "details"):
            u, image = make_labels.unaries(config, network, sample), sample["image"].permute(1, 2, 0).numpy()
            logits = cache(partial(make_labels.logits, config, network, sample["image"].as_subclass(torch.Tensor), u.up,
                                   w[[0, *u.classes]]))
            for detail, changes in before.items():
                s = replace(config.make_labels, **changes)
                start = probabilities(u, w, sample, s, logits).numpy(force=True)
                yield (sample, u, detail), (image, start, s.crf_bilateral, s.crf_gaussian, s.crf_iterations)

    for (sample, u, detail), marginals in runs.overlap(config.run.workers, dense_crf, crf_tasks()):
        y_crf = make_labels.label_by_crf(marginals, u)
        yield sample, detail, y_crf, make_labels.label_by_prototypes(y_crf, u, w)
        if detail == SETTINGS and after:
            everywhere = u._replace(own=torch.ones_like(u.own))
            yield (sample, ANYWHERE, make_labels.label_by_crf(marginals, everywhere),
                   make_labels.label_by_prototypes(y_crf, everywhere, w))
            # A prototype of zeros is chosen nowhere: the background comes before it.
            yield sample, LACKING, y_crf, make_labels.label_by_prototypes(y_crf, u, torch.zeros_like(w))


def main(config_file, split, path, *changes, before=BEFORE, after=True):
    config = settings.read("make_labels", [config_file, *changes])
    config.device = runs.find_device(config.run.device)
    names = ["background", *config.data.classes]
    network = runs.load_network(config, "cls.pt", models.BoxClassifier, config.train_cls, path, names[1:])
    truth = engine.true_masks(config, split)
    dataset = datasets.VOCDataset(config.data.root, split, names[1:], masks=[truth], scored=truth)
    found = defaultdict(lambda: ([], []))  # detail -> confusions of each image, of Ycrf and of Yret
    for sample, detail, *both in labels(config, network, dataset, before, after):
        for confusions, given in zip(found[detail], both):
            mask = sample["masks"][0].numpy()
            confusions.append(engine.confusion(mask, given.byte().numpy(force=True), len(names)))
    print(f"| {split}, {len(dataset)} images, mIoU, % | Ycrf | change | Yret | change |\n|---|---|---|---|---|")
    for detail, kinds in found.items():
        cells = []
        for confusions, usual in zip(kinds, found[SETTINGS]):
            ours, theirs = np.stack(confusions), np.stack(usual)
            change, drawn = bootstrap.bootstrap([ours], [theirs], names, draws=1000)
            low, high = drawn.confidence_interval
            cells.append(f"{engine.scores(ours.sum(0), names)['miou']:.1f}")
            cells.append("" if detail == SETTINGS else f"{change:+.2f} ({low:+.2f} to {high:+.2f})")
        print(f"| {detail} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python benchmarks/details.py CONFIG.yaml LIST cls.pt [key=value ...]")
    try:
        main(*sys.argv[1:])
    except runs.FAULTS as fault:
        sys.exit(str(fault))
