"""Stage 4: mean IoU of the segmenter, or of any folder of label images; predictions and panels as pictures.

    python eval.py [CONFIG.yaml] [key=value ...]
    python eval.py labels=FOLDER split=LIST
    python eval.py 'images=photos/*.jpg'
    python eval.py split=test submit=results.tgz

Reads data.root and runs/NAME/seg.pt; writes runs/NAME/eval.json, predictions/METHOD/ID.png and panels.png; of images,
pictures/METHOD/NAME.png and NAME_overlay.png; with submit, the archive that VOC's evaluation server takes.
"""
import glob
import io
import tarfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Subset
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
    images: str = ""  # segment these pictures instead of a list's: a path, with * for many
    submit: str = ""  # instead of scores, an archive for VOC's evaluation server: a file.tgz
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = False  # each scale also mirrored
    crf: bool = False
    crf_bilateral: list[float] = field(default_factory=lambda: [4.0, 121.0, 5.0])  # weight, pixels, colour
    crf_gaussian: list[float] = field(default_factory=lambda: [3.0, 3.0])  # weight, pixels
    crf_iterations: int = 10
    crf_margin: float = 3.0  # a label whose log probability nowhere comes this near the highest is left out of the CRF
    panels: int = 8  # rows of panels.png
    photos: bool = True  # false: panels.png without the images, where they may not be shown


def method(s):
    """What is measured, in words: plain, or what is added to it."""
    parts = [f"scales {' '.join(f'{v:g}' for v in s.scales)}"] * (s.scales != [1]) + ["flip"] * s.flip + ["CRF"] * s.crf
    return " + ".join(parts) or "plain"


def prediction_folder(config):
    """runs/NAME/predictions/METHOD, or pictures/METHOD."""
    kind = "pictures" if config.eval.images else "predictions"
    return config.path / kind / method(config.eval).replace(" + ", "_").replace(" ", "_")


class Pictures(torch.utils.data.Dataset):
    """Any image files: samples of id, the file's name without its ending, and image (3, H, W) uint8."""

    def __init__(self, pattern):
        found = sorted(glob.glob(pattern))
        self.paths = {Path(path).stem: path for path in found}
        self.ids = list(self.paths)
        if len(self.ids) != len(found) or not found:
            raise engine.UsageError(f"eval.images: {pattern}: no such files, or two of one name")

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image = datasets.read_image(self.paths[self.ids[index]])
        return {"id": self.ids[index], "image": torch.from_numpy(image.transpose(2, 0, 1).copy())}


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
        if scale != 1:
            cosine = F.interpolate(cosine, size, mode="bilinear", align_corners=False)
        views.append(cosine.mean(0))
    return torch.stack(views).mean(0)


def sharpen(image, log_probabilities, margin, bilateral, gaussian, iterations):
    """Labels (H, W) uint8 by the CRF, from log probabilities (L, H, W), over the labels that can win: those that
    come, somewhere, within `margin` of the most probable one's logarithm.
    """
    able = np.flatnonzero((log_probabilities - log_probabilities.max(0)).max((1, 2)) >= -margin)
    p = np.exp(log_probabilities[able])
    return able[dense_crf(image, p / p.sum(0), bilateral, gaussian, iterations).argmax(0)].astype(np.uint8)


def predict_split(config, network, dataset, folder):
    """Writes folder/ID.png, the predictions for those images that have none yet; the CRF runs in worker processes."""
    s = config.eval
    left = [i for i, name in enumerate(dataset.ids) if not (folder / f"{name}.png").exists()]
    loader = engine.read(config, Subset(dataset, left))
    bar = tqdm(loader, f"eval {method(s)}", initial=len(dataset) - len(left), total=len(dataset), dynamic_ncols=True)
    arguments = s.crf_margin, tuple(s.crf_bilateral), tuple(s.crf_gaussian), s.crf_iterations

    def tasks():
        for sample in bar:
            image = sample["image"].as_subclass(torch.Tensor)
            with engine.autocast(config):
                cosine = predict(network, image.to(config.device), s.scales, s.flip)
            if s.crf:
                logarithms = (config.train_seg.temperature * cosine.float()).log_softmax(0)
                yield sample["id"], (image.permute(1, 2, 0).numpy(), logarithms.cpu().numpy(), *arguments)
            else:
                datasets.write_mask(folder / f"{sample['id']}.png", cosine.max(0).indices.byte().cpu().numpy())

    for name, labels in engine.overlap(config.run.workers, sharpen, tasks()):
        datasets.write_mask(folder / f"{name}.png", labels)


# ---------------------------------------------------------------- pictures


def outlined(image, boxes, labels):
    """The image with its boxes in their labels' colours."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=tuple(datasets.palette()[label].tolist()), width=2)
    return picture


def write_overlays(config, pictures, folder):
    """NAME_overlay.png: the picture, with the labels' colours over the objects."""
    for name, path in pictures.paths.items():
        image, labels = datasets.read_image(path), datasets.read_mask(folder / f"{name}.png", datasets.VOID)
        mixed = np.where(labels[..., None] > 0, image // 2 + datasets.palette()[labels] // 2, image)
        datasets.write(folder / f"{name}_overlay.png", datasets.png(Image.fromarray(mixed)))
    print(f"{folder}: labels and overlays of {len(pictures)} pictures")


def write_submission(config, ids, folder):
    """The predictions where VOC's server looks for them: results/VOC2012/Segmentation/comp6_test_cls/ID.png."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ids:
            archive.add(folder / f"{name}.png", f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png")
    datasets.write(config.eval.submit, buffer.getvalue())
    print(f"{config.eval.submit}: predictions of {len(ids)} images, {method(config.eval)}")


def panel(config, name, path, boxes):
    """One image's row: pictures by title; None where a stage has not written its part."""
    folder, image = config.path, datasets.read_image(path)
    if not config.eval.photos:
        image = np.full_like(image, 224)
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
        "boxes": outlined(image, *boxes) if boxes else Image.fromarray(image),
        "attention u0": Image.open(u0) if u0.exists() else None,
        "Ycrf": coloured(y_crf), "Yret": coloured(y_ret), "Ycrf != Yret": differ,
        "truth": coloured(labels(truth / f"{name}.png")) if truth else None,
        "prediction": coloured(labels(prediction_folder(config) / f"{name}.png")),
    }


def known_boxes(config, paths):
    """{id: (boxes, labels)} of those images that have a sound annotation: a picture can do without."""
    found = {}
    with suppress(datasets.DataError):
        read, _ = datasets.box_reader(Path(config.data.root, config.data.boxes), config.data.classes)
        for name, path in paths.items():
            with suppress(datasets.DataError):
                found[name] = read(name, path)[:2]
    return found


def draw_panels(config, paths, width=180, gap=6, header=22):
    """runs/NAME/panels.png: one row an image, evenly spaced over the list."""
    paths = {name: paths[name] for name in engine.spread(list(paths), config.eval.panels)}
    boxes = known_boxes(config, paths)
    rows = [panel(config, name, path, boxes.get(name)) for name, path in paths.items()]
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
    datasets.write(path, datasets.png(sheet))
    print(f"{path}: boxes, labels and predictions of {len(rows)} images")


def summary(config, split, results):
    """The whole method in one table: the labels' scores of this list, if stage 2 wrote them, and the segmenter's."""
    lines = []
    labels = engine.read_json(config.path / "labels" / "scores.json").get(split)
    for key, title in (("box", "whole boxes as labels"), ("Ycrf", "Ycrf"), ("Yret", "Yret")):
        if labels:
            lines.append((title, labels[key]["miou"]))
    lines += [(f"segmenter, {r['method']}", r["miou"]) for r in results.values() if r["split"] == split]
    print(f"\nmIoU, %, {split}")
    for title, value in lines:
        print(f"  {title:<48}{value:6.1f}")


def main(config):
    s = config.eval
    split, truth = s.split or config.data.val, None if s.submit else engine.true_masks(config)
    if not split and not s.images:
        raise engine.UsageError("eval.split: no list to work on; set data.val, eval.split or eval.images")
    if s.labels:
        if not truth:
            raise engine.UsageError(f"{Path(config.data.root, config.data.truth)}: no true masks to score against")
        columns = engine.score_folders(config, split, {"labels": Path(s.labels)})
        engine.show(f"{s.labels} on {split}", columns)
        return
    network = models.DeepLab(1 + len(config.data.classes), config.train_seg.backbone, width=config.train_seg.width)
    network = engine.load_network(config, "seg.pt", network, config.train_seg)
    dataset = Pictures(s.images) if s.images else engine.open_data(
        config, split, boxes=False, masks=[truth] if truth else ())
    folder = prediction_folder(config)
    without = {"split", "labels", "images", "submit", "panels", "photos"}
    without |= {key for key in asdict(s) if key.startswith("crf_") and not s.crf}
    settings = engine.made_with(config, "eval", "train_seg.temperature", without=without)
    engine.claim(config, folder, settings, config.path / "seg.pt")
    predict_split(config, network, dataset, folder)
    if s.images:
        return write_overlays(config, dataset, folder)
    if s.submit:
        return write_submission(config, dataset.ids, folder)
    if truth:
        path = config.path / "eval.json"
        results = engine.read_json(path)
        result = dict(split=split, images=len(dataset), method=method(s), seed=config.run.seed,
                      **engine.score_folders(config, split, {"IoU": folder})["IoU"])
        results[f"{split}, {method(s)}"] = result
        engine.write_json(path, results)
        engine.log(config, stage="eval", split=split, method=method(s), miou=result["miou"])
        engine.show(f"segmenter on {split}, {len(dataset)} images, {method(s)}", {"IoU": result})
        summary(config, split, results)
    else:
        print(f"{folder}: labels of {len(dataset)} images; no true masks to score them with")
    if s.panels:
        draw_panels(config, dataset.paths)


if __name__ == "__main__":
    engine.run("eval", main)
