"""How far it goes: seconds and peak memory of 200,000 images in a list, 500 boxes in an image, 254 classes.

    python benchmarks/limits.py

Each part runs in a process of its own, on one thread; MB is the most that the process holds in memory, with what
importing torch takes (the first line).
"""
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import speed  # noqa: E402
import torch  # noqa: E402

import datasets  # noqa: E402
import losses  # noqa: E402
import make_labels  # noqa: E402
import models  # noqa: E402
from crf import dense_crf  # noqa: E402

IDS, BOXES, CLASSES = 200_000, 500, 254
XML = ("<annotation><size><width>{}</width><height>{}</height></size>" + 3 * (
    "<object><name>person</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>")
    + "</annotation>")


def nothing(folder):
    return lambda: None


def ids(folder):
    """Links to one image with three boxes; then the order of 160,000 crops, balanced."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    speed.Image.fromarray(speed.photograph().transpose(1, 2, 0)).save(folder / "JPEGImages/0.jpg")
    (folder / "Annotations/0.xml").write_text(XML.format(*speed.SIZE[::-1]))
    for k in range(1, IDS):
        os.symlink("0.jpg", folder / f"JPEGImages/{k}.jpg")
        os.symlink("0.xml", folder / f"Annotations/{k}.xml")
    (folder / "ImageSets/Main/all.txt").write_text("\n".join(map(str, range(IDS))))

    def run():
        dataset = datasets.VOCDataset(folder, "all", datasets.VOC_CLASSES)
        datasets.Stream(dataset, 160_000, 0, datasets.balance_weights(dataset))[0]
    return run


def boxes_in_bap(folder):
    return speed.bap_case(batch=1, boxes=BOXES)


def boxes_in_labels(folder):
    config, sample = speed.read_settings(), speed.sample(boxes=BOXES, classes=speed.CLASSES)
    network = models.BoxClassifier(speed.CLASSES, width=0.0625).eval()

    def run():
        u = make_labels.unaries(config, network, sample)
        image = sample["image"].permute(1, 2, 0).numpy()
        y_crf = make_labels.label_by_crf(dense_crf(image, u.probabilities.numpy()), u)
        make_labels.label_by_prototypes(y_crf, u, network.classifier.weight)
    return run


def classes_in_nal(folder):
    return speed.nal_case(losses.noise_aware_loss, 1 + CLASSES, 2)


def classes_in_crf(folder):
    image = speed.photograph().transpose(1, 2, 0)
    p = torch.rand(1 + CLASSES, *speed.SIZE).softmax(0).numpy().astype(np.float32)
    return lambda: dense_crf(image, p)


PARTS = {
    "imports alone": nothing,
    f"a list of {IDS:,} images read, and the order of 160,000 balanced crops": ids,
    f"BAP of a crop of 321 with {BOXES} boxes, forward and backward": boxes_in_bap,
    f"Ycrf and Yret of a 375 x 500 image with {BOXES} boxes of 20 classes, narrow VGG-16": boxes_in_labels,
    f"NAL of two crops of 321 with {CLASSES} classes, forward and backward": classes_in_nal,
    f"CRF of a 375 x 500 image that shows {CLASSES} classes": classes_in_crf}


def measure(title):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = PARTS[title](Path(folder))
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"| {title} | {seconds:.3g} | {peak:,.0f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        sys.exit()
    print("| | s | MB |\n|---|---|---|", flush=True)
    for title in PARTS:
        subprocess.run([sys.executable, __file__, title], check=True)
    try:
        datasets.VOCDataset(".", "all", [str(k) for k in range(CLASSES + 1)])
    except datasets.DataError as fault:
        print(f"{CLASSES + 1} classes: {fault}")
