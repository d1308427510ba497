"""Writes the demo set: textured shapes on textures, in VOC's layout. Objects
fill their boxes badly and have nearly the background's colour."""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import VOID, DataError, PathLike, temporary_folder, write, write_mask

SHAPES = "bar", "ring", "cross", "crescent", "vee", "wave"
# The k-th background suits the k-th shape.
BACKGROUNDS = "stripes", "checks", "blobs", "noise", "gradient", "split"


def _outline(rng, shape):
    """A shape as discs: centres (64, 2), about in [-1, 1], and radii (64,)."""
    t = np.linspace(-1, 1, 64)
    x, y = t, 0 * t  # a bar
    radius = np.full(64, rng.uniform(0.15, 0.21))
    if shape == "ring":
        x, y = 0.85 * np.cos(np.pi * t), 0.85 * np.sin(np.pi * t)
    elif shape == "cross":
        x = np.concatenate([t[::2], t[::2]])
        y = 0.8 * np.concatenate([t[::2], -t[::2]])
    elif shape == "crescent":
        x, y = 0.8 * np.cos(2.1 * t), 0.8 * np.sin(2.1 * t)
        radius = 0.05 + 0.26 * np.cos(np.pi / 2 * t)
    elif shape == "vee":
        y = 1.5 * np.abs(t) - 0.75
    elif shape == "wave":
        y = 0.55 * np.sin(1.5 * np.pi * t)
    return np.stack([x, y], 1), radius


def _coverage(rng, shape, size):
    """(H, W) in [0, 1]: the part of each pixel that a new object covers."""
    points, radii = _outline(rng, shape)
    angle = rng.choice([-1, 1]) * rng.uniform(0.45, 1.1) if shape == "bar" \
        else rng.uniform(0, 2 * np.pi)  # a bar along an axis fills its box
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    points = points * [1, rng.uniform(0.7, 1)] @ turn.T
    extent = np.ptp(points, axis=0).max() + 2 * radii.max()
    scale = rng.uniform(38, 92) / extent  # to pixels
    points = points * scale + np.array(size[::-1]) * rng.uniform(0.2, 0.8, 2)
    x, y = np.arange(size[1]) + 0.5, np.arange(size[0])[:, None] + 0.5
    distance = np.full(size, np.inf)
    for (px, py), radius in zip(points, np.maximum(radii * scale, 2.5)):
        to_disc = np.sqrt((x - px) ** 2 + (y - py) ** 2) - radius
        np.minimum(distance, to_disc, out=distance)
    return np.clip(0.5 - distance / 1.5, 0, 1)  # an edge 1.5 pixels soft


def _smooth_noise(rng, size, cell):
    """(H, W) of deviation about 1 that changes over `cell` pixels."""
    coarse = rng.normal(size=(size[0] // cell + 2, size[1] // cell + 2))
    image = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


def _background(rng, family, size):
    """(H, W, 3) float: two near colours mixed by a pattern of the family."""
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    wavelength = rng.uniform(11, 26)
    x, y = np.meshgrid(np.arange(size[1]) - size[1] / 2,
                       np.arange(size[0]) - size[0] / 2)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    wave = np.sin(2 * np.pi * along / wavelength + phase)
    if family == "stripes":
        pattern = np.tanh(3 * wave)
    elif family == "checks":
        pattern = np.tanh(4 * wave * np.sin(2 * np.pi * across / wavelength))
    elif family == "blobs":
        pattern = np.tanh(3 * _smooth_noise(rng, size, rng.integers(9, 15)))
    elif family == "noise":
        pattern = 0.8 * _smooth_noise(rng, size, rng.integers(3, 5))
    elif family == "gradient":
        pattern = 2.5 * along / max(size)
    else:
        pattern = np.sign(along + rng.uniform(-20, 20)) + 0.3 * wave
    colour = rng.uniform(95, 160) + rng.uniform(-12, 12, 3)
    step = 0.6 * rng.normal(size=3) + rng.choice([-1, 1])
    contrast = pattern[..., None] * step * 60.0 / np.linalg.norm(step)
    return colour + contrast / 2


def _surface(rng, label, size):
    """(H, W, 3) float, the object's colour less its background's mean: hue and
    stripes tell the class, also after a flip."""
    hue = 2 * np.pi * label / len(SHAPES) + rng.normal(0, 0.25)
    red_green = np.array([1, -1, 0]) / 2 ** 0.5
    yellow_blue = np.array([1, 1, -2]) / 6 ** 0.5
    colour = np.cos(hue) * red_green + np.sin(hue) * yellow_blue
    colour = 28.0 * colour + rng.uniform(-12, 12)
    step = 2 * np.pi / (4, 7)[label // 3 % 2]
    x, y = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    x, y = (np.sin(step * n + rng.uniform(0, 2 * np.pi)) for n in (x, y))
    stripes = (x, y, 1.4 * x * y)[label % 3]
    return colour + 40.0 * stripes[..., None]


def _scene(rng):
    """An image (H, W, 3) uint8, its objects' labels, and the number of the
    object on each pixel (H, W), 0 for none."""
    size = tuple(rng.integers(129, 162, 2))
    label = rng.integers(1, len(SHAPES) + 1)
    # A shape often has its own texture behind it, as boats have water.
    usual = rng.random() < 0.6
    family = BACKGROUNDS[label - 1] if usual else rng.choice(BACKGROUNDS)
    image = _background(rng, family, size)
    labels, owner = [], np.zeros(size, int)
    wanted = rng.integers(1, 4)
    while len(labels) < wanted:
        cover = _coverage(rng, SHAPES[label - 1], size)
        inside = cover >= 0.5
        areas = np.bincount(owner.ravel(), minlength=len(labels) + 1)
        left = np.bincount(owner[~inside], minlength=len(labels) + 1)
        if (left >= 0.5 * areas)[1:].all():  # all objects stay in sight
            paint = image[inside].mean(0) + _surface(rng, label, size)
            image += cover[..., None] * (paint - image)
            labels.append(label)
            owner[inside] = len(labels)
        label = rng.integers(1, len(SHAPES) + 1)
    image += rng.normal(0, 7.0, image.shape)
    return image.clip(0, 255).round().astype(np.uint8), labels, owner


def _mask(labels, owner):
    """(H, W) uint8 labels, with void along outlines as in VOC."""
    mask = np.array([0, *labels], np.uint8)[owner]
    around = np.pad(owner, 1, mode="edge")
    for other in (around[1:-1, :-2], around[1:-1, 2:],
                  around[:-2, 1:-1], around[2:, 1:-1]):
        mask[other != owner] = VOID
    return mask


def _annotation(labels, owner):
    """VOC's XML, with boxes tight round the visible pixels of objects."""
    height, width = owner.shape
    text = (f"<annotation>\n  <size><width>{width}</width><height>{height}"
            "</height><depth>3</depth></size>\n")
    for number, label in enumerate(labels, 1):
        y, x = np.nonzero(owner == number)
        text += (f"  <object><name>{SHAPES[label - 1]}</name><bndbox>"
                 f"<xmin>{x.min() + 1}</xmin><ymin>{y.min() + 1}</ymin>"
                 f"<xmax>{x.max() + 1}</xmax><ymax>{y.max() + 1}</ymax>"
                 "</bndbox></object>\n")
    return text + "</annotation>\n"


def make_shapes(root: PathLike, train: int = 360, val: int = 120,
                seed: int = 0) -> None:
    """Writes the lists train and val, of so many images, atomically. Image n
    depends on (seed, n) alone. Raises DataError if `root` exists."""
    root = Path(root)
    if root.exists():
        raise DataError(f"{root}: exists; remove it or name another folder")
    ids = [f"shapes_{number:05d}" for number in range(train + val)]
    with temporary_folder(root) as made:
        (made / "JPEGImages").mkdir(parents=True)
        bar = tqdm(ids, "shapes", leave=False, disable=None)
        for number, name in enumerate(bar):
            rng = np.random.default_rng((seed, number))
            image, labels, owner = _scene(rng)
            file = made / f"JPEGImages/{name}.jpg"
            Image.fromarray(image).save(file, quality=92, subsampling=0)
            file = made / f"SegmentationClassAug/{name}.png"
            write_mask(file, _mask(labels, owner))
            file = made / f"Annotations/{name}.xml"
            write(file, _annotation(labels, owner).encode())
        for split, names in (("train", ids[:train]), ("val", ids[train:])):
            file = made / f"ImageSets/Segmentation/{split}.txt"
            write(file, ("\n".join(names) + "\n").encode())
        made.rename(root)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", metavar="DIR", help="a new folder")
    folder = parser.parse_args().dir
    try:
        make_shapes(folder)
    except DataError as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; nothing is written\n")
    print("data.root:", folder)


if __name__ == "__main__":
    main()
