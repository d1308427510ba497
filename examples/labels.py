"""Pseudo labels of a photograph from its boxes, by a trained classifier, as
make_labels.py makes them. In the repository's folder:

    python -m examples.labels cls.pt photo.jpg labels.png dog,48,240,195,371

CLASS,X0,Y0,X1,Y1 is a box in pixels, as many as there are. labels.png is Ycrf:
0 for background and k for the k-th class, in VOC's colours. The settings suit
photographs of some 500 pixels a side; resize larger ones first.
"""
import sys
from types import SimpleNamespace

import torch

import datasets
import make_labels
import models
from crf import dense_crf
from settings import MakeLabels, Run

checkpoint, photo, out, *objects = sys.argv[1:]
network = models.load(checkpoint)
image = datasets.read_image(photo)
names = [text.split(",")[0] for text in objects]
sides = [[float(side) for side in text.split(",")[1:]] for text in objects]
H, W = image.shape[:2]
for text, (x0, y0, x1, y1) in zip(objects, sides):
    if not (0 <= x0 < x1 <= W and 0 <= y0 < y1 <= H):
        sys.exit(f"{text}: no box in an image of {W} x {H} pixels")
boxes = torch.tensor(sides).view(-1, 4)
sample = {
    "image": torch.tensor(image).permute(2, 0, 1), "boxes": boxes,
    "labels": torch.tensor([1 + network.classes.index(n) for n in names])}

s = MakeLabels()  # the paper's settings
config = SimpleNamespace(make_labels=s, run=Run(), device=torch.device("cpu"))
u = make_labels.unaries(config, network, sample)
marginals = dense_crf(image, u.probabilities.numpy(), s.crf_bilateral,
                      s.crf_gaussian, s.crf_iterations)
y_crf = make_labels.label_by_crf(marginals, u)
datasets.write_mask(out, y_crf.numpy())
for k, name in enumerate(["background", *network.classes]):
    print(f"{name}: {(y_crf == k).float().mean():.1%}")
