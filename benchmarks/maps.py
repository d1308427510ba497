"""How well does a classifier tell an object from the background inside its boxes?

    python benchmarks/maps.py CONFIG.yaml LIST cls.pt [cls.pt ...] [key=value ...]

For each image of LIST that has a true mask and each class in it: the area under the ROC curve (AUC) of a map over the
pixels inside that class's boxes, those of the class against those of the background. The maps are u_c, 1 - u0, and the
log-odds w_c . f - w_0 . f of the classifier, all before the CRF. Prints their means over all pairs of image and class,
over the classes that stand in rooms, and over the others. Needs scipy.
"""
import sys
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import engine
import make_labels
import models
import runs
import settings

MAPS = "u_c", "1 - u0", "log-odds"
ROOMS = "bottle", "chair", "diningtable", "pottedplant", "sofa", "tvmonitor"


def auc(values, positive):
    """P(value of a positive > that of a negative), ties by half. values (n,), positive (n,) bool."""
    one, other = values[positive], values[~positive]
    return mannwhitneyu(one, other, method="asymptotic").statistic / (len(one) * len(other))


def maps_of(config, network, sample):
    """A sample's [(label, inside its boxes (H, W) bool, {map: (H, W)})]."""
    u = make_labels.unaries(config, network, sample)
    w = network.classifier.weight.detach()
    odds = (u.up.dot(w[u.classes]) - u.up.dot(w[:1])).numpy(force=True)
    background = 1 - u.attention.numpy(force=True)
    return [(label, inside.numpy(), dict(zip(MAPS, (cam, background, logit)))) for label, inside, cam, logit
            in zip(u.classes, u.own, u.cams.numpy(force=True), odds)]


def measure(config, split, path):
    """[(class, {map: AUC})], one for each pair of image and class where both kinds of pixels are found."""
    network = runs.load_network(config, "cls.pt", models.BoxClassifier, config.train_cls, path, config.data.classes)
    truth, found = engine.true_masks(config, split), []
    dataset = datasets.VOCDataset(config.data.root, split, config.data.classes, masks=[truth], scored=truth)
    for sample in runs.bar(runs.in_workers(config, dataset), path):
        mask = sample["masks"][0].numpy()
        for label, inside, maps in maps_of(config, network, sample):
            of_class, known = mask[inside] == label, (mask[inside] == label) | (mask[inside] == 0)
            if 0 < of_class[known].sum() < known.sum():
                found.append((config.data.classes[label - 1],
                              {name: auc(values[inside][known], of_class[known]) for name, values in maps.items()}))
    return found


def main(config_file, split, *arguments):
    changes = [a for a in arguments if "=" in a]
    config = settings.read("make_labels", [config_file, *changes])
    config.device = runs.find_device(config.run.device)
    print(f"| AUC inside boxes, {split} | pairs | {' | '.join(MAPS)} |\n|---|---|{'---|' * len(MAPS)}")
    for path in arguments:
        if path in changes:
            continue
        found = measure(config, split, path)
        for title, chosen in (("all classes", found), ("rooms", [f for f in found if f[0] in ROOMS]),
                              ("others", [f for f in found if f[0] not in ROOMS])):
            cells = [f"{np.mean([aucs[name] for _, aucs in chosen]):.3f}" if chosen else "-" for name in MAPS]
            print(f"| {path}, {title} | {len(chosen)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python benchmarks/maps.py CONFIG.yaml LIST cls.pt [cls.pt ...] [key=value ...]")
    try:
        main(*sys.argv[1:])
    except runs.FAULTS as fault:
        sys.exit(str(fault))
