"""Pictures of a run at any stage: panels of single images, and curves.

    python pictures.py [CONFIG.yaml] [key=value ...]

The settings are those of eval.py, such as panels=8. Reads data.root and what
exists in runs/NAME; writes panels.png and curves.png, without what a stage
has not written yet. eval.py draws the same at its end.
"""
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import datasets
import engine
import runs
from settings import UsageError

PLOTS = [  # of curves.png: title, stage, names of numbers in metrics.jsonl
    ("stage 1: loss", "train_cls", ["loss"]),
    ("stage 1: share classified right", "train_cls",
     ["right_boxes", "right_queries"]),
    ("stage 3: loss", "train_seg", ["loss"]),
    ("stage 3: mIoU on val, %", "train_seg", ["val_miou"]),
]
WIDTH, GAP, HEADER = 180, 6, 22  # pixels in panels.png


# -------------------------------------------------------------------- images

def outlined(image: np.ndarray, boxes: Sequence,
             labels: Sequence[int]) -> Image.Image:
    """The image with its boxes in their labels' colours."""
    picture = Image.fromarray(image)
    draw, width = ImageDraw.Draw(picture), max(2, max(picture.size) // 100)
    for (x0, y0, x1, y1), label in zip(boxes, labels):
        colour = tuple(datasets.palette()[label].tolist())
        # Drawn boxes include their last pixel; one may be thinner than that.
        last = max(x0, x1 - 1), max(y0, y1 - 1)
        draw.rectangle((x0, y0, *last), outline=colour, width=width)
    return picture


def heat_map(image: np.ndarray, heat: np.ndarray) -> Image.Image:
    """The image (H, W, 3) uint8, in grey so that its colours stay out of it,
    half covered by the colours of heat (H, W) uint8.
    """
    colours = colormaps["inferno"](heat)[..., :3] * 255
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return Image.fromarray(((grey + colours) / 2).astype(np.uint8))


def write_overlays(paths: dict[str, Path], folder: Path,
                   classes: Sequence[str]) -> None:
    """ID_overlay.png beside each ID.png: the photograph, with the labels'
    colours over the objects; none where there is no ID.png. classes: the
    names of labels 1, 2, ...
    """
    written = 0
    for name in paths:
        file = f"{name}_overlay"
        while file in paths:  # another photograph's labels are called so
            file += "_"
        (folder / f"{file}.png").unlink(missing_ok=True)  # of an earlier one
        if not (folder / f"{name}.png").exists():
            continue
        image = datasets.read_image(paths[name])
        labels = datasets.read_mask(folder / f"{name}.png", datasets.VOID)
        mixed = image // 2 + datasets.palette()[labels] // 2
        overlay = np.where(labels[..., None] > 0, mixed, image)
        datasets.write_png(folder / f"{file}.png", Image.fromarray(overlay))
        written += 1
    print(f"{folder}: labels and overlays of {written} photographs, "
          f"{', '.join(f'{k} {name}' for k, name in enumerate(classes, 1))}")


def panel(config: SimpleNamespace, name: str, path: Path,
          predictions: Path) -> dict:
    """One image's row: pictures by title; None where a file is missing."""
    data, labels = config.data, config.path / "labels"
    num_labels = 1 + len(data.classes)
    image = datasets.read_image(path)
    if not config.eval.photos:
        image = np.full_like(image, 224)

    def read(folder, num_labels=num_labels):
        file = Path(folder, f"{name}.png")
        if not file.exists():
            return None
        mask = datasets.read_mask(file, num_labels)
        if mask.shape != image.shape[:2]:
            raise datasets.DataError(f"{file}: not of its image's size; "
                                     "remove it and run its stage again")
        return mask

    def coloured(mask):
        if mask is not None:
            return Image.fromarray(datasets.palette()[mask])

    def heated(kind):
        heat = read(labels / kind, num_labels=datasets.VOID)  # any value
        if heat is not None:
            return heat_map(image, heat)

    objects: tuple = (), ()
    annotation = Path(data.root, "Annotations", f"{name}.xml")
    if annotation.exists():
        objects = datasets.read_annotation(annotation, data.classes)[:2]
    y_crf, y_ret, differ = read(labels / "Ycrf"), read(labels / "Yret"), None
    if y_crf is not None and y_ret is not None:
        differ = Image.fromarray((y_crf != y_ret) * np.uint8(255))
    return {"boxes": outlined(image, *objects),
            "attention u0": heated("u0"), "CAM u_c": heated("cam"),
            "Ycrf": coloured(y_crf), "Yret": coloured(y_ret),
            "Ycrf != Yret": differ,
            "truth": coloured(read(Path(data.root, data.truth))),
            "prediction": coloured(read(predictions))}


def draw_panels(config: SimpleNamespace, paths: dict[str, Path],
                predictions: Path) -> None:
    """panels.png: one row an image, evenly spaced over the list; a column
    that no image has is left out.
    """
    rows = [panel(config, name, path, predictions) for name, path
            in runs.spread(list(paths.items()), config.eval.panels)]
    titles = [title for title in rows[0]
              if any(row[title] is not None for row in rows)]
    heights = [max(1, round(row["boxes"].height * WIDTH / row["boxes"].width))
               for row in rows]
    sheet = Image.new("RGB", (len(titles) * (WIDTH + GAP) + GAP,
                              HEADER + sum(heights) + GAP * len(rows)),
                      "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        left, top = GAP + column * (WIDTH + GAP), HEADER
        draw.text((left + WIDTH // 2, HEADER // 2), title, "black", font,
                  anchor="mm")
        resample = Image.Resampling.NEAREST
        if title in ("boxes", "attention u0", "CAM u_c"):
            resample = Image.Resampling.BICUBIC
        for row, height in zip(rows, heights):
            if row[title] is not None:
                cell = row[title].convert("RGB").resize((WIDTH, height),
                                                        resample)
                sheet.paste(cell, (left, top))
            top += height + GAP
    path = config.path / "panels.png"
    datasets.write_png(path, sheet)
    print(f"{path}: {', '.join(titles)} of {len(rows)} images")


# ------------------------------------------------------------------- numbers

def read_log(path: Path) -> list[dict]:
    """The lines of metrics.jsonl. Those that a kill, a full disk or a hand
    damaged are skipped, and counted.
    """
    lines, damaged = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            iteration = int(line.get("iteration", 0))
            lines.append(line | {"iteration": iteration,
                                 "stage": line["stage"]})
        except (ValueError, LookupError, TypeError, AttributeError,
                OverflowError, RecursionError):
            damaged += 1
    if damaged:
        print(f"{path}: {damaged} damaged lines skipped")
    return lines


def last_pass(lines: list[dict], stage: str) -> list[dict]:
    """A stage's lines that led to its checkpoint: where a killed or repeated
    run went back to an earlier iteration, its later numbers replace those
    before.
    """
    points: list[dict] = []
    for line in lines:
        if line["stage"] == stage:
            while points and points[-1]["iteration"] >= line["iteration"]:
                points.pop()
            points.append(line)
    return points


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def draw_curves(config: SimpleNamespace) -> None:
    """curves.png: the losses of stages 1 and 3, the shares of boxes and of
    background queries that stage 1 classifies right, and scores of stage 3.
    """
    lines = read_log(config.path / "metrics.jsonl")
    points = {stage: last_pass(lines, stage)
              for stage in ("train_cls", "train_seg")}
    plots = [plot for plot in PLOTS
             if any(plot[2][0] in point for point in points[plot[1]])]
    if not plots:
        return
    figure = Figure((4.5 * len(plots), 3.2), layout="constrained")
    all_axes = figure.subplots(1, len(plots), squeeze=False)[0]
    for axes, (title, stage, names) in zip(all_axes, plots):
        for name in names:
            found = [point for point in points[stage]
                     if isinstance(point.get(name), int | float)]
            iterations = [point["iteration"] for point in found]
            values = [point[name] for point in found]
            axes.plot(iterations, values, ".-", label=name)
        axes.set(title=title, xlabel="iteration")
        axes.set_ylim(0, 1.02 if len(names) > 1 else None)  # shares
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    path = config.path / "curves.png"
    datasets.write(path, png_of(figure))
    print(f"{path}: {', '.join(title for title, *_ in plots)}")


def draw(config: SimpleNamespace, paths: dict[str, Path],
         predictions: Path) -> None:
    """Every picture of the run that its files allow. paths: id -> image;
    predictions: the segmenter's folder of ID.png.
    """
    if config.eval.panels:
        draw_panels(config, paths, predictions)
    draw_curves(config)


def main(config: SimpleNamespace) -> None:
    if not config.path.is_dir():
        raise UsageError(f"{config.path}: no such run; begin it with python "
                         "train_cls.py, or set run.name")
    split = config.eval.split or config.data.val or config.data.train
    draw(config, datasets.find_images(config.data.root, split),
         engine.prediction_folder(config))


if __name__ == "__main__":
    runs.launch("eval", main)
