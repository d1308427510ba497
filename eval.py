"""Stage 4: mean IoU of the segmenter, or of any folder of label images; predictions and panels as pictures.

    python eval.py [CONFIG.yaml] [key=value ...]
    python eval.py labels=FOLDER split=LIST

Reads data.root and runs/NAME/seg.pt; writes runs/NAME/eval.json, predictions/ID.png and panels.png.
"""
import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

import datasets
import engine
import models
from crf import dense_crf


@dataclass
class Settings:
    """Section `eval` of the YAML file. The paper's headline: scales [0.5, 0.75, 1, 1.5], flip and crf."""
    split: str = ""  # list to score; none: data.val
    labels: str = ""  # score this folder's ID.png instead of the segmenter's predictions
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = False  # each scale also mirrored
    crf: bool = False
    crf_bilateral: list[float] = field(default_factory=lambda: [4.0, 121.0, 5.0])  # weight, pixels, colour
    crf_gaussian: list[float] = field(default_factory=lambda: [3.0, 3.0])  # weight, pixels
    crf_iterations: int = 10
    crf_floor: float = 0.01  # a label that nowhere reaches this probability is left out of the CRF
    panels: int = 8  # rows of panels.png


def method(s):
    """What is measured, in words: plain, or what is added to it."""
    parts = [f"scales {' '.join(f'{v:g}' for v in s.scales)}"] * (s.scales != [1]) + ["flip"] * s.flip + ["CRF"] * s.crf
    return " + ".join(parts) or "plain"


@torch.inference_mode()
def predict(network, image, scales, flip):
    """image (3, H, W) uint8 -> cosine maps (L, H, W), the mean over scales and mirror images."""
    size, views = image.shape[1:], []
    for scale in scales:
        scaled = image[None].float() / 255
        if scale != 1:
            scaled = F.interpolate(scaled, [max(1, round(scale * side)) for side in size], mode="bilinear",
                                   align_corners=False, antialias=True)
        if flip:
            scaled = torch.cat((scaled, scaled.flip(3)))
        cosine = network(scaled.contiguous(memory_format=torch.channels_last))
        if flip:
            cosine = torch.stack((cosine[0], cosine[1].flip(2)))
        views.append(F.interpolate(cosine, size, mode="bilinear", align_corners=False).mean(0))
    return torch.stack(views).mean(0)


def decide(image, probabilities, crf):
    """Labels (H, W) uint8 from probabilities (L, H, W); crf: None or (floor, arguments of dense_crf)."""
    if crf is None:
        return probabilities.argmax(0).astype(np.uint8)
    floor, arguments = crf
    able = np.flatnonzero(probabilities.max((1, 2)) >= min(floor, probabilities.max()))
    return able[dense_crf(image, probabilities[able], *arguments).argmax(0)].astype(np.uint8)


def predictions(config, network, dataset):
    """Yields (id, labels (H, W) uint8, sample) of every image; the CRF runs in worker processes."""
    s = config.eval
    crf = (s.crf_floor, (tuple(s.crf_bilateral), tuple(s.crf_gaussian), s.crf_iterations)) if s.crf else None

    def tasks():
        loader = DataLoader(dataset, batch_size=None, num_workers=config.run.workers)
        for sample in tqdm(loader, f"eval {method(s)}", dynamic_ncols=True):
            image = sample["image"].as_subclass(torch.Tensor)
            with engine.autocast(config):
                cosine = predict(network, image.to(config.device), s.scales, s.flip)
            probabilities = (config.train_seg.temperature * cosine.float()).softmax(0)
            yield sample, (image.permute(1, 2, 0).numpy(), probabilities.cpu().numpy(), crf)

    for sample, labels in engine.overlap(config.run.workers if s.crf else 0, decide, tasks()):
        yield sample["id"], labels, sample


def score_segmenter(config, split, truth):
    network = models.DeepLab(1 + len(config.data.classes), config.train_seg.backbone, width=config.train_seg.width)
    network = engine.load_network(config, "seg.pt", network, config.train_seg)
    dataset = datasets.VOCDataset(config.data.root, split, config.data.classes, masks=[truth] if truth else (),
                                  boxes=False)
    names = ["background", *config.data.classes]
    matrix = np.zeros((len(names), len(names) + 1), np.int64)
    for name, labels, sample in predictions(config, network, dataset):
        datasets.write_mask(config.path / "predictions" / f"{name}.png", labels)
        if truth:
            matrix += engine.confusion(sample["masks"][0].numpy(), labels, len(names))
    return dataset.ids, matrix


def score_folder(config, split, truth):
    dataset = datasets.VOCDataset(config.data.root, split, config.data.classes, boxes=False,
                                  masks=[truth, Path(config.eval.labels).resolve()])
    names = ["background", *config.data.classes]
    matrix = np.zeros((len(names), len(names) + 1), np.int64)
    for sample in tqdm(DataLoader(dataset, batch_size=None, num_workers=config.run.workers), "eval", dynamic_ncols=True):
        matrix += engine.confusion(*sample["masks"].numpy(), len(names))
    return dataset.ids, matrix


# ---------------------------------------------------------------- pictures


def outlined(image, boxes, labels):
    """The image with its boxes in their labels' colours."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=tuple(datasets.palette()[label].tolist()), width=2)
    return picture


def panel(config, name):
    """One image's row: pictures by title; None where a stage has not written its part."""
    root, folder = Path(config.data.root), config.path
    image = datasets.read_image(root / "JPEGImages" / f"{name}.jpg")
    annotation = root / "Annotations" / f"{name}.xml"
    num_labels = 1 + len(config.data.classes)

    def labels(path):
        return datasets.read_mask(path, num_labels) if path.exists() else None

    def coloured(mask):
        return None if mask is None else Image.fromarray(datasets.palette()[mask])

    y_crf, y_ret = (labels(folder / "labels" / kind / f"{name}.png") for kind in ("Ycrf", "Yret"))
    u0 = folder / "labels" / "u0" / f"{name}.png"
    differ = None if y_crf is None or y_ret is None else Image.fromarray((y_crf != y_ret) * np.uint8(255))
    truth = engine.true_masks(config)
    return {
        "boxes": outlined(image, *datasets.read_annotation(annotation, config.data.classes)[:2])
                 if annotation.exists() else Image.fromarray(image),
        "attention u0": Image.open(u0) if u0.exists() else None,
        "Ycrf": coloured(y_crf), "Yret": coloured(y_ret), "Ycrf != Yret": differ,
        "truth": coloured(labels(truth / f"{name}.png")) if truth else None,
        "prediction": coloured(labels(folder / "predictions" / f"{name}.png")),
    }


def draw_panels(config, ids, width=180, gap=6, header=22):
    """runs/NAME/panels.png: one row an image, evenly spaced over the list."""
    rows = [panel(config, name) for name in engine.spread(ids, config.eval.panels)]
    heights = [round(row["boxes"].height * width / row["boxes"].width) for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, header + sum(heights) + gap * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    top = header
    for number, (row, height) in enumerate(zip(rows, heights)):
        for column, (title, picture) in enumerate(row.items()):
            left = gap + column * (width + gap)
            if number == 0:
                draw.text((left + width // 2, header // 2), title, "black", ImageFont.load_default(14), anchor="mm")
            if picture is not None:
                smooth = title in ("boxes", "attention u0")
                resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
                sheet.paste(picture.convert("RGB").resize((width, height), resample), (left, top))
        top += height + gap
    path = config.path / "panels.png"
    engine.write(path, lambda p: sheet.save(p, "PNG"))
    print(f"{path}: boxes, labels and predictions of {len(rows)} images")


def summary(config, split, results):
    """The whole method in one table: the labels' scores of this list, if stage 2 wrote them, and the segmenter's."""
    lines = []
    path = config.path / "labels" / "scores.json"
    labels = json.loads(path.read_text()).get(split) if path.exists() else None
    for key, title in (("box", "whole boxes as labels"), ("Ycrf", "Ycrf"), ("Yret", "Yret")):
        if labels:
            lines.append((title, labels[key]["miou"]))
    lines += [(f"segmenter, {r['method']}", r["miou"]) for r in results.values() if r["split"] == split]
    print(f"\nmIoU, %, {split}")
    for title, value in lines:
        print(f"  {title:<48}{value:6.1f}")


def main(config):
    s = config.eval
    split, truth = s.split or config.data.val, engine.true_masks(config)
    names = ["background", *config.data.classes]
    if s.labels:
        if not truth:
            raise engine.UsageError(f"{Path(config.data.root, config.data.masks)}: no true masks to score against")
        ids, matrix = score_folder(config, split, truth)
        engine.show(f"{s.labels} on {split}, {len(ids)} images", {"labels": engine.scores(matrix, names, config)})
        return
    ids, matrix = score_segmenter(config, split, truth)
    if truth:
        path = config.path / "eval.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        result = dict(split=split, images=len(ids), method=method(s), seed=config.run.seed,
                      **engine.scores(matrix, names, config))
        results[f"{split}, {method(s)}"] = result
        engine.write_json(path, results)
        engine.log(config, stage="eval", split=split, method=method(s), miou=result["miou"])
        engine.show(f"segmenter on {split}, {len(ids)} images, {method(s)}", {"IoU": result})
        summary(config, split, results)
    if s.panels:
        draw_panels(config, ids)


if __name__ == "__main__":
    engine.run("eval", main)
