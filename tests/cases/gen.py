# ruff: noqa
"""Fresh small inputs for the cases: images with a bright box on noise, and annotations in many formats."""
import json, os, sys
from pathlib import Path
import numpy as np
from PIL import Image, ImageDraw

def picture(w=96, h=72, box=(20, 15, 60, 50), seed=0, colour=(220, 60, 40)):
    rng = np.random.default_rng(seed)
    im = Image.fromarray(rng.integers(60, 120, (h, w, 3), dtype=np.uint8))
    ImageDraw.Draw(im).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill=colour)
    return im

def xml(w, h, objects, extra="", filename="x.jpg"):
    """objects: (name, xmin, ymin, xmax, ymax) as they shall stand in the file."""
    t = f"<annotation><filename>{filename}</filename><size><width>{w}</width><height>{h}</height><depth>3</depth></size>{extra}"
    for n, *b in objects:
        t += f"<object><name>{n}</name><difficult>0</difficult><bndbox>" + "".join(
            f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), b)) + "</bndbox></object>"
    return t + "</annotation>"

def save(path, content, **kw):
    p = Path(path); p.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image): content.save(p, **kw)
    elif isinstance(content, bytes): p.write_bytes(content)
    else: p.write_text(content)

def coco(images, annotations, categories):
    return json.dumps(dict(
        images=[dict(id=i, file_name=f, width=w, height=h) for i, f, w, h in images],
        annotations=[dict(dict(id=k, iscrowd=0, area=1.0), **a) for k, a in enumerate(annotations, 1)],
        categories=[dict(id=i, name=n, supercategory="none") for i, n in categories]))

BOX = (20, 15, 60, 50)
VOC = (21, 16, 60, 50)
YOLO = "0 0.416667 0.451389 0.416667 0.486111\n"
def base(root, n=4, images="JPEGImages", ext=".jpg", boxes="Annotations", kind="voc"):
    for k in range(n):
        save(f"{root}/{images}/im{k}{ext}", picture(seed=k))
        if kind == "voc": save(f"{root}/{boxes}/im{k}.xml", xml(96, 72, [("thing", *VOC)]))
        if kind == "yolo": save(f"{root}/{boxes}/im{k}.txt", YOLO)
