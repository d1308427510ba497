"""What the CRF of eval.py loses by leaving out labels that cannot win: for several margins, the labels left, the share
of pixels that change against all labels, and the time.

    python benchmarks/margin.py [CONFIG.yaml] [key=value ...]

Reads runs/NAME/seg.pt; takes 40 images of eval.split, evenly spaced, with the views that the settings name.
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine  # noqa: E402
import eval as evaluation  # noqa: E402
import models  # noqa: E402

MARGINS = 2.0, 3.0, 4.0, 5.0, 7.0
IMAGES = 40


def main(config):
    s = config.eval
    network = models.DeepLab(1 + len(config.data.classes), config.train_seg.backbone, width=config.train_seg.width)
    network = engine.load_network(config, "seg.pt", network, config.train_seg)
    data = engine.open_data(config, s.split or config.data.val, boxes=False)
    arguments = tuple(s.crf_bilateral), tuple(s.crf_gaussian), s.crf_iterations
    changed, kept, seconds = dict.fromkeys(MARGINS, 0), dict.fromkeys(MARGINS, 0), dict.fromkeys(MARGINS, 0.0)
    of_all, pixels = 0.0, 0
    for index in engine.spread(range(len(data)), IMAGES):
        image = data[index]["image"].as_subclass(torch.Tensor)
        cosine = evaluation.predict(network, image.to(config.device), s.scales, s.flip)
        logarithms = (config.train_seg.temperature * cosine.float()).log_softmax(0).cpu().numpy()
        picture = image.permute(1, 2, 0).numpy()
        start = time.perf_counter()
        full = evaluation.sharpen(picture, logarithms, np.inf, *arguments)
        of_all += time.perf_counter() - start
        pixels += full.size
        for margin in MARGINS:
            start = time.perf_counter()
            changed[margin] += (evaluation.sharpen(picture, logarithms, margin, *arguments) != full).sum()
            seconds[margin] += time.perf_counter() - start
            kept[margin] += ((logarithms - logarithms.max(0)).max((1, 2)) >= -margin).sum()
    images = min(IMAGES, len(data))
    print(f"{images} images, {evaluation.method(s)}; with all labels {of_all / images:.2f} s an image")
    print("| margin | labels left | changed pixels, % | time, share of that with all |\n|---|---|---|---|")
    for m in MARGINS:
        print(f"| {m:g} | {kept[m] / images:.1f} | {100 * changed[m] / pixels:.4f} | {seconds[m] / of_all:.2f} |")


if __name__ == "__main__":
    engine.run("eval", main)
