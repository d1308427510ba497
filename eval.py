"""Stage 4: mean IoU of the segmenter, or of any folder of label images; predictions and panels as pictures.

    python eval.py [CONFIG.yaml] [key=value ...]
    python eval.py labels=FOLDER split=LIST
    python eval.py 'images=photos/*.jpg'
    python eval.py split=test submit=results.tgz

Reads data.root and runs/NAME/seg.pt, or the file `weights`; writes runs/NAME/eval.json, predictions/METHOD/ID.png and
what pictures.py draws; of images, pictures/METHOD/NAME.png and NAME_overlay.png; with submit, the archive that VOC's
evaluation server takes.
"""
import glob
import io
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

import datasets
import engine
import models
import pictures
from crf import dense_crf


@dataclass
class Settings:
    """Section `eval` of the YAML file. The paper's headline: scales [0.5, 0.75, 1, 1.5], flip and crf."""
    weights: str = ""  # a file of the segmenter, of another run or in the authors' names; none: runs/NAME/seg.pt
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
    panels: int = 8  # rows of panels.png; 0: none is drawn
    photos: bool = True  # false: panels.png without the images, where they may not be shown


def method(s: Settings) -> str:
    """What is measured, in words: plain, or what is added to it."""
    parts = [f"scales {' '.join(f'{v:g}' for v in s.scales)}"] * (s.scales != [1]) + ["flip"] * s.flip + ["CRF"] * s.crf
    return " + ".join(parts) or "plain"


def prediction_folder(config: SimpleNamespace) -> Path:
    """runs/NAME/predictions/METHOD, or pictures/METHOD."""
    kind = "pictures" if config.eval.images else "predictions"
    return config.path / kind / method(config.eval).replace(" + ", "_").replace(" ", "_")


class Pictures(torch.utils.data.Dataset):
    """Any image files: samples of id, the file's name without its ending, and image (3, H, W) uint8."""

    def __init__(self, pattern: str):
        found = sorted(glob.glob(pattern))
        self.paths = {Path(path).stem: Path(path) for path in found}
        self.ids = list(self.paths)
        if len(self.ids) != len(found) or not found:
            raise engine.UsageError(f"eval.images: {pattern}: no such files, or two of one name")

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image = datasets.read_image(self.paths[self.ids[index]])
        return {"id": self.ids[index], "image": torch.from_numpy(image.transpose(2, 0, 1).copy())}


@torch.inference_mode()
def predict(network: models.DeepLab, image: torch.Tensor, scales: list[float], flip: bool) -> torch.Tensor:
    """image (3, H, W) uint8 -> cosine maps (L, H, W), the mean over scales and mirror images."""
    size, views = image.shape[1:], []
    for scale in scales:
        scaled = image[None].float() / 255
        if scale != 1:
            scaled = F.interpolate(scaled, [max(1, round(scale * side)) for side in size], mode="bilinear",
                                   align_corners=False)
        if flip:
            scaled = torch.cat((scaled, scaled.flip(3)))
        cosine = network(scaled.contiguous(memory_format=torch.channels_last))
        if flip:
            cosine = torch.stack((cosine[0], cosine[1].flip(2)))
        if scale != 1:
            cosine = F.interpolate(cosine, size, mode="bilinear", align_corners=False)
        views.append(cosine.mean(0))
    return torch.stack(views).mean(0)


def sharpen(image: np.ndarray, log_probabilities: np.ndarray, margin: float, bilateral: Sequence[float],
            gaussian: Sequence[float], iterations: int) -> np.ndarray:
    """Labels (H, W) uint8 by the CRF, from log probabilities (L, H, W), over the labels that can win: those that
    come, somewhere, within `margin` of the most probable one's logarithm.
    """
    able = np.flatnonzero((log_probabilities - log_probabilities.max(0)).max((1, 2)) >= -margin)
    p = np.exp(log_probabilities[able])
    return able[dense_crf(image, p / p.sum(0), bilateral, gaussian, iterations).argmax(0)].astype(np.uint8)


def predict_split(config, network, dataset, folder):
    """Writes folder/ID.png, the predictions of images that have none yet; the CRF runs in worker processes."""
    s = config.eval
    mine = engine.share(len(dataset))
    # Pictures are predicted anew each time: others may have come under the same name.
    left = [i for i in mine if s.images or not (folder / f"{dataset.ids[i]}.png").exists()]
    loader = engine.read(config, Subset(dataset, left))
    bar = engine.bar(loader, f"eval {method(s)}", initial=len(mine) - len(left), total=len(mine))
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


def write_submission(config: SimpleNamespace, ids: list[str], folder: Path) -> None:
    """The predictions where VOC's server looks for them: results/VOC2012/Segmentation/comp6_test_cls/ID.png."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ids:
            archive.add(folder / f"{name}.png", f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png")
    datasets.write(config.eval.submit, buffer.getvalue())
    print(f"{config.eval.submit}: predictions of {len(ids)} images, {method(config.eval)}")


def summary(config: SimpleNamespace, split: str, results: dict[str, dict]) -> None:
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


def score(config: SimpleNamespace, split: str, folder: str) -> None:
    """A folder of label images against the truth: `labels=FOLDER`."""
    if not engine.true_masks(config, split):
        raise engine.UsageError(f"{Path(config.data.root, config.data.truth)}: no true masks to score against")
    engine.show(f"{folder} on {split}", engine.score_folders(config, split, {"labels": Path(folder)}))


def report(config: SimpleNamespace, split: str, result: dict) -> None:
    """The segmenter's scores to eval.json, and on screen."""
    path = config.path / "eval.json"
    results = engine.read_json(path)
    result = dict(split=split, method=method(config.eval), seed=config.run.seed, **result)
    results[f"{split}, {result['method']}"] = result
    engine.write_json(path, results)
    engine.log(config, stage="eval", split=split, method=result["method"], miou=result["miou"])
    engine.show(f"segmenter on {split}, {result['images']} images, {result['method']}", {"IoU": result})
    summary(config, split, results)


def main(config: SimpleNamespace) -> None:
    s = config.eval
    split = s.split or config.data.val
    if not split and not s.images:
        raise engine.UsageError("eval.split: no list to work on; set data.val, eval.split or eval.images")
    if s.labels:
        return score(config, split, s.labels)
    truth = None if s.submit or s.images else engine.true_masks(config, split)
    network = models.DeepLab(1 + len(config.data.classes), config.train_seg.backbone, width=config.train_seg.width)
    network = engine.load_network(config, "seg.pt", network, config.train_seg, s.weights)
    dataset = Pictures(s.images) if s.images else engine.open_data(config, split, boxes=False)
    folder = prediction_folder(config)
    without = {"weights", "split", "labels", "images", "submit", "panels", "photos"}
    without |= {key for key in asdict(s) if key.startswith("crf_") and not s.crf}
    settings = engine.made_with(config, "eval", "train_seg.temperature", without=without)
    engine.claim(config, folder, settings, Path(s.weights or config.path / "seg.pt"))
    predict_split(config, network, dataset, folder)
    engine.wait()
    result = engine.score_folders(config, split, {"IoU": folder})["IoU"] if truth else None
    if engine.rank():
        return
    if s.images:
        return pictures.write_overlays(dataset.paths, folder)
    if s.submit:
        return write_submission(config, dataset.ids, folder)
    if result:
        report(config, split, result)
    else:
        print(f"{folder}: labels of {len(dataset)} images; no true masks to score them with")
    pictures.draw(config, split, dataset.paths, folder)


if __name__ == "__main__":
    engine.run("eval", main)
