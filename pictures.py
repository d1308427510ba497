"""Pictures of a run, at any stage: what its files show of single images, its curves and its scores.

    python pictures.py [CONFIG.yaml] [key=value ...]        settings: those of eval.py, such as panels=8

Reads data.root and what stands in runs/NAME; writes panels.png, and with matplotlib curves.png and iou.png. What a
stage has not written yet is left out. eval.py draws the same at its end.
"""
import io
import json
import math
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import datasets
import engine

HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])  # RGB at 0, 1/4, ... 1
PLOTS = [  # of curves.png: title, stage, names of its numbers in metrics.jsonl
    ("stage 1: loss", "train_cls", ["loss"]),
    ("stage 1: share classified right", "train_cls", ["right_boxes", "right_queries"]),
    ("stage 3: loss", "train_seg", ["loss"]),
]


# ---------------------------------------------------------------- images


def outlined(image: np.ndarray, boxes: torch.Tensor, labels: torch.Tensor) -> Image.Image:
    """The image with its boxes in their labels' colours."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=tuple(datasets.palette()[label].tolist()), width=2)
    return picture


def heat_map(image: np.ndarray, heat: np.ndarray) -> Image.Image:
    """The image (H, W, 3) uint8, in grey, half covered by the colours of heat (H, W) uint8: from black (0) over
    violet, red and orange to yellow (255).
    """
    places = np.linspace(0, 255, len(HEAT))
    colours = np.stack([np.interp(heat, places, channel) for channel in HEAT.T], -1)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]  # colours of the image would mix with the heat's
    return Image.fromarray(((grey + colours) / 2).astype(np.uint8))


def write_overlays(paths: dict[str, Path], folder: Path) -> None:
    """NAME_overlay.png beside each NAME.png: the picture, with the labels' colours over the objects."""
    for name, path in paths.items():
        image, labels = datasets.read_image(path), datasets.read_mask(folder / f"{name}.png", datasets.VOID)
        mixed = np.where(labels[..., None] > 0, image // 2 + datasets.palette()[labels] // 2, image)
        datasets.write(folder / f"{name}_overlay.png", datasets.png(Image.fromarray(mixed)))
    print(f"{folder}: labels and overlays of {len(paths)} pictures")


def known_boxes(config: SimpleNamespace, paths: dict[str, Path]) -> dict[str, tuple]:
    """{id: (boxes, labels)} of those images that have a sound annotation: a picture can do without."""
    found = {}
    with suppress(datasets.DataError):
        read, _ = datasets.box_reader(Path(config.data.root, config.data.boxes), config.data.classes)
        for name, path in paths.items():
            with suppress(datasets.DataError):
                found[name] = read(name, path)[:2]
    return found


def panel(config: SimpleNamespace, name: str, path: Path, boxes: tuple | None, predictions: Path) -> dict:
    """One image's row: pictures by title; None where a stage has not written its part."""
    folder, image = config.path / "labels", datasets.read_image(path)
    num_labels = 1 + len(config.data.classes)
    if not config.eval.photos:
        image = np.full_like(image, 224)

    def read(path, num_labels=num_labels):
        if not path.exists():
            return None
        labels = datasets.read_mask(path, num_labels)
        if labels.shape != image.shape[:2]:
            raise datasets.DataError(f"{path}: not of its image's size; remove it and run its stage again")
        return labels

    def coloured(labels):
        return None if labels is None else Image.fromarray(datasets.palette()[labels])

    def heated(kind):
        heat = read(folder / kind / f"{name}.png", datasets.VOID)  # any value
        return None if heat is None else heat_map(image, heat)

    y_crf, y_ret = (read(folder / kind / f"{name}.png") for kind in ("Ycrf", "Yret"))
    differ = None if y_crf is None or y_ret is None else Image.fromarray((y_crf != y_ret) * np.uint8(255))
    truth = Path(config.data.root, config.data.truth, f"{name}.png")
    return {
        "boxes": outlined(image, *boxes) if boxes else Image.fromarray(image),
        "attention u0": heated("u0"), "CAM u_c": heated("cam"),
        "Ycrf": coloured(y_crf), "Yret": coloured(y_ret), "Ycrf != Yret": differ,
        "truth": coloured(read(truth)) if config.data.truth else None,
        "prediction": coloured(read(predictions / f"{name}.png")),
    }


def draw_panels(config: SimpleNamespace, paths: dict[str, Path], predictions: Path, width: int = 180, gap: int = 6,
                header: int = 22) -> None:
    """panels.png: one row an image, evenly spaced over the list; a column that no image has is left out."""
    paths = dict(engine.spread(list(paths.items()), config.eval.panels))
    boxes = known_boxes(config, paths)
    rows = [panel(config, name, path, boxes.get(name), predictions) for name, path in paths.items()]
    titles = [title for title in rows[0] if any(row[title] is not None for row in rows)]
    heights = [max(1, round(row["boxes"].height * width / row["boxes"].width)) for row in rows]
    sheet = Image.new("RGB", (len(titles) * (width + gap) + gap, header + sum(heights) + gap * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        left, top = gap + column * (width + gap), header
        draw.text((left + width // 2, header // 2), title, "black", ImageFont.load_default(14), anchor="mm")
        smooth = title in ("boxes", "attention u0", "CAM u_c")
        for row, height in zip(rows, heights):
            if row[title] is not None:
                resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
                sheet.paste(row[title].convert("RGB").resize((width, height), resample), (left, top))
            top += height + gap
    save(config.path / "panels.png", datasets.png(sheet), f"{', '.join(titles)} of {len(rows)} images")


def save(path: Path, content: bytes, what: str) -> None:
    datasets.write(path, content)
    print(f"{path}: {what}")


# ---------------------------------------------------------------- numbers


def last_pass(path: Path, stage: str) -> list[dict]:
    """A stage's lines of metrics.jsonl whose iterations led to its checkpoint: where a killed or renewed run took up
    an earlier iteration again, its numbers replace those from there on.
    """
    points: list[dict] = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a kill
            continue
        if line["stage"] == stage:
            while points and points[-1]["iteration"] >= line["iteration"]:
                points.pop()
            points.append(line)
    return points


def iou_columns(config: SimpleNamespace, split: str) -> dict[str, dict]:
    """What has been scored on a list: title -> {"miou": per cent, "iou": {label: per cent, None where it has none}}."""
    labels = engine.read_json(config.path / "labels" / "scores.json").get(split, {})
    results = engine.read_json(config.path / "eval.json").values()
    return ({kind: labels[kind] for kind in ("Ycrf", "Yret") if kind in labels}
            | {f"segmenter, {r['method']}": r for r in results if r["split"] == split})


def new_figure(width, height):
    """In inches. matplotlib is asked for only here: nothing else needs it."""
    from matplotlib.figure import Figure
    return Figure((width, height), layout="constrained")


def png_of(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def draw_curves(config: SimpleNamespace) -> None:
    """curves.png: loss of stages 1 and 3, shares of boxes and background queries that stage 1 classifies right."""
    points = {stage: last_pass(config.path / "metrics.jsonl", stage) for stage in ("train_cls", "train_seg")}
    plots = [plot for plot in PLOTS if points[plot[1]]]
    if not plots:
        return
    figure = new_figure(4.5 * len(plots), 3.2)
    for axes, (title, stage, names) in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots):
        for name in names:
            values = [p.get(name, math.nan) for p in points[stage]]
            axes.plot([p["iteration"] for p in points[stage]], values, ".-", label=name)
        axes.set(title=title, xlabel="iteration")
        axes.set_ylim(0, 1.02 if len(names) > 1 else None)  # shares are at most 1
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    save(config.path / "curves.png", png_of(figure), ", ".join(title for title, *_ in plots))


def draw_iou(config: SimpleNamespace, split: str) -> None:
    """iou.png: IoU of each label, of the pseudo labels and of the segmenter, on one list."""
    columns = iou_columns(config, split)
    if not columns:
        return
    names = list(next(iter(columns.values()))["iou"])
    thick = 0.8 / len(columns)
    figure = new_figure(7, 1.2 + len(names) * (0.12 + 0.13 * len(columns)))
    axes = figure.subplots()
    for number, (title, scores) in enumerate(columns.items()):
        lengths = [math.nan if v is None else v for v in map(scores["iou"].get, names)]
        places = np.arange(len(names)) + (number + 0.5) * thick - 0.4
        axes.barh(places, lengths, thick, label=f"{title}, mean {scores['miou']:.1f}")
    axes.set_yticks(range(len(names)), names)
    axes.set(title=f"IoU, %, {split}", xlim=(0, 100), ylim=(len(names) - 0.4, -0.6))  # the first label on top
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center")
    save(config.path / "iou.png", png_of(figure), f"IoU on {split}: {'; '.join(columns)}")


def draw(config: SimpleNamespace, split: str, paths: dict[str, Path], predictions: Path) -> None:
    """Every picture of the run that its files allow: of a list's images (id -> file), with the segmenter's from the
    folder `predictions`.
    """
    if config.eval.panels:
        draw_panels(config, paths, predictions)
    try:
        draw_curves(config)
        draw_iou(config, split)
    except ImportError:
        print("curves.png and iou.png are not drawn: they need matplotlib (pip install matplotlib)")


def main(config: SimpleNamespace) -> None:
    from eval import prediction_folder  # which imports this module
    if not config.path.is_dir():
        raise engine.UsageError(f"{config.path}: no such run; begin it with python train_cls.py, or set run.name")
    split = config.eval.split or config.data.val or config.data.train
    paths = datasets.find_images(config.data.root, split, config.data.images)
    draw(config, split, paths, prediction_folder(config))


if __name__ == "__main__":
    engine.run("eval", main)
