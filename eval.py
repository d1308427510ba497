"""Stage 4: mean IoU of the segmenter, or of any folder of label images;
predictions and panels as pictures.

    python eval.py [CONFIG.yaml] [key=value ...]
    python eval.py labels=FOLDER split=LIST
    python eval.py images=PHOTOS

Reads data.root and runs/NAME/seg.pt, or the file eval.weights; writes
runs/NAME/eval.json, predictions/METHOD/ID.png and what pictures.py draws; of
photographs, pictures/METHOD/ID.png and ID_overlay.png.
"""
import glob
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import datasets
import engine
import models
import pictures
import runs
from crf import dense_crf
from settings import UsageError


class Photos(Dataset):
    """Any image files: samples of id, size (H, W) and image (3, H, W) uint8,
    no longer than max_side; or of id and fault, where a file is not an image.

    pattern: a file, a folder, of which the files with an image's ending count,
    or a path with * for many. An id is the file's name without its ending;
    equal names get their folder's before them.
    """

    def __init__(self, pattern: str, max_side: int):
        place = Path(pattern)
        found = [place] if place.exists() else map(Path, glob.glob(pattern))
        if place.is_dir():  # of a phone's, it holds films and others, too
            found = [path for path in place.iterdir() if path.name[0] != "."
                     and path.suffix.lower() in datasets.IMAGE_ENDINGS]
        paths = sorted(path for path in found if path.is_file())
        if not paths:
            raise UsageError(f"eval.images: {pattern}: no such image files")
        self.ids = unique_names(paths)
        self.paths = dict(zip(self.ids, paths))
        if len(self.paths) < len(paths):
            raise UsageError(f"eval.images: {pattern}: several files of one "
                             "name in folders of one name; rename one")
        self.max_side = max_side

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        name = self.ids[index]
        try:
            photo = datasets.open_image(self.paths[name], datasets.to_rgb)
        except datasets.DataError as fault:
            return {"id": name, "fault": str(fault)}
        size = photo.size[::-1]
        photo.thumbnail((self.max_side, self.max_side))  # never enlarges
        image = torch.from_numpy(np.asarray(photo).transpose(2, 0, 1).copy())
        return {"id": name, "size": size, "image": image}


def unique_names(paths: list[Path]) -> list[str]:
    """Stems; where two are equal, with their folder's name before them, and
    where that is equal, too, with their ending behind.
    """
    names = [path.stem for path in paths]
    longer = [[f"{path.absolute().parent.name}_{path.stem}" for path in paths],
              [f"{path.absolute().parent.name}_{path.stem}_{path.suffix[1:]}"
               for path in paths]]
    for others in longer:
        counts = Counter(names)
        names = [other if counts[name] > 1 else name
                 for name, other in zip(names, others)]
    return names


def write_labels(path: Path, maps: np.ndarray, size: tuple) -> None:
    """Writes the argmax of maps (L, h, w) as a picture of size (H, W)."""
    labels = Image.fromarray(maps.argmax(0).astype(np.uint8))
    labels = labels.resize(size[::-1], Image.Resampling.NEAREST)
    datasets.write_mask(path, np.asarray(labels))


def predict_images(config: SimpleNamespace, network: models.DeepLab,
                   dataset: Photos | datasets.VOCDataset,
                   folder: Path) -> None:
    """Writes folder/ID.png, the predictions of images that have none yet.
    The CRF runs in worker processes.
    """
    s = config.eval
    temperature = network.trained_with.get("train_seg.temperature",
                                           config.train_seg.temperature)
    # Photographs are predicted each time: the same name may be another one.
    samples = runs.samples_left(
        config, dataset, f"eval {engine.method(config)}",
        lambda name: not s.images and (folder / f"{name}.png").exists())

    def predictions():
        for sample in samples:
            path = folder / f"{sample['id']}.png"
            if "fault" in sample:
                path.unlink(missing_ok=True)
                samples.write(f"skipped: {sample['fault']}", sys.stderr)
                continue
            image = sample["image"].as_subclass(torch.Tensor)
            with engine.autocast(config):
                maps = engine.predict(network, image.to(config.device),
                                      s.scales, s.flip).float()
            if s.crf:
                maps = (temperature * maps).softmax(0)
            yield (path, sample.get("size", image.shape[1:])), (
                image.permute(1, 2, 0).numpy(), maps.cpu().numpy(),
                s.crf_bilateral, s.crf_gaussian, s.crf_iterations)

    workers, label = config.run.workers, dense_crf
    if not s.crf:
        workers, label = 0, lambda image, maps, *_: maps
    for (path, size), maps in runs.overlap(workers, label, predictions()):
        write_labels(path, maps, size)
    runs.barrier()


def segment_photos(config: SimpleNamespace, network: models.DeepLab,
                   folder: Path) -> None:
    """Labels and overlays of photographs."""
    photos = Photos(config.eval.images, config.eval.max_side)
    if runs.rank() == 0:
        runs.hold(config)
        runs.write_settings(config, "eval")
    runs.barrier()
    predict_images(config, network, photos, folder)
    if runs.rank() == 0:
        pictures.write_overlays(photos.paths, folder, network.classes)


def print_summary(config: SimpleNamespace, split: str,
                  results: dict[str, dict]) -> None:
    """The whole method in one table: the scores of stage 2 on this list, if
    there are any, and the segmenter's.
    """
    path = config.path / "labels/scores.json"
    titles = dict(box="whole boxes as labels", Ycrf="Ycrf", Yret="Yret")
    print(f"\nmIoU, %, {split}")
    with runs.own_file(path):
        labels = runs.read_json(path).get(split, {})
        for kind, title in titles.items():
            if kind in labels:
                print(f"  {title:<48}{labels[kind]['miou']:6.1f}")
    with runs.own_file(config.path / "eval.json"):
        for result in results.values():
            title = f"segmenter, {result['method']}"
            if result["split"] == split:
                print(f"  {title:<48}{result['miou']:6.1f}")


def score_labels(config: SimpleNamespace, split: str) -> None:
    """A folder of label images against the truth."""
    folder = config.eval.labels
    if not engine.true_masks(config, split):
        truth = Path(config.data.root, config.data.truth)
        raise UsageError(f"{truth}: no true masks to score against")
    result = engine.score_folders(config, split, {"labels": Path(folder)})
    engine.print_scores(f"{folder} on {split}", result)


def report(config: SimpleNamespace, split: str, folder: Path,
           network: models.DeepLab, weights: Path) -> None:
    """The segmenter's scores, into eval.json, the log and on screen. Those
    of networks that the run has no more are dropped.
    """
    scores = engine.score_folders(config, split, {"IoU": folder})
    if runs.rank():
        return
    path, name = config.path / "eval.json", engine.method(config)
    name += f", {network.chosen}" if network.chosen else ""
    result = dict(split=split, method=name, network=runs.digest(weights),
                  seed=network.trained_with.get("run.seed"), **scores["IoU"])
    present = {result["network"], *map(runs.digest,
                                       config.path.glob("seg*.pt"))}
    with runs.own_file(path):
        results = {key: earlier
                   for key, earlier in runs.read_json(path).items()
                   if earlier.get("network") in present}
    results[f"{split}, {name}"] = result
    runs.write_json(path, results)
    runs.log(config, "eval", split=split, method=name, miou=result["miou"])
    engine.print_scores(f"segmenter on {split}, {result['images']} images, "
                        f"{name}", {"IoU": result})
    print_summary(config, split, results)


def main(config: SimpleNamespace) -> None:
    s, data = config.eval, config.data
    split = s.split or data.val
    if not split and not s.images:
        raise UsageError("eval.split: no list to work on; set data.val, "
                         "eval.split or eval.images")
    if s.labels:
        return score_labels(config, split)
    network = runs.load_network(
        config, "seg.pt", models.DeepLab, config.train_seg, s.weights,
        () if s.images else data.classes)
    folder = engine.prediction_folder(config)
    if s.images:
        return segment_photos(config, network, folder)
    dataset = datasets.VOCDataset(data.root, split, data.classes, boxes=False)
    weights = Path(s.weights or config.path / "seg.pt")
    without = {"weights", "split", "labels", "images", "max_side", "panels",
               "photos"}
    if not s.crf:
        without |= {"crf_bilateral", "crf_gaussian", "crf_iterations"}
    # A checkpoint says its own temperature.
    others = {"train_seg.temperature"} - network.trained_with.keys()
    made_with = runs.settings_of(config, "eval", *others, without=without)
    runs.discard_outdated(config, folder, "eval", made_with, weights)
    predict_images(config, network, dataset, folder)
    if engine.true_masks(config, split):
        report(config, split, folder, network, weights)
    else:
        print(f"{folder}: labels of {len(dataset)} images; no true masks to "
              "score them with")
    if runs.rank() == 0:
        pictures.draw(config, dataset.paths, folder)


if __name__ == "__main__":
    runs.launch("eval", main)
