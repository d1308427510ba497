"""A trained segmenter on a photograph, beside a copy of models.py.

    python predict.py seg.pt photo.jpg labels.png

labels.png holds 0 for background and k for the k-th class, in VOC's colours,
of the photograph at 1,000 pixels a side at most.
"""
import sys

import numpy as np
import torch
from PIL import Image, ImageOps

import models

checkpoint, photo, out = sys.argv[1:]
network = models.load(checkpoint)
image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
image.thumbnail((1000, 1000))  # it learnt from photographs of some 500
pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
with torch.inference_mode():
    cosine = network(pixels[None])[0]  # (1 + number of classes, H, W)
labels = cosine.argmax(0).byte().numpy()

# A label's bits go to red, green and blue in turn, the highest bits first.
number, palette = np.arange(256), np.zeros((256, 3), int)
for bit in range(8):
    palette[:, bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
picture = Image.fromarray(labels)
picture.putpalette(palette.astype(np.uint8).tobytes())
picture.save(out)
for k, name in enumerate(["background", *network.classes]):
    print(f"{name}: {(labels == k).mean():.1%}")
