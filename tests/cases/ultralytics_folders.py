# ruff: noqa
from gen import *
for k, s in enumerate(("train", "val")):
    save(f"data/images/{s}/im{k}.jpg", picture(seed=k)); save(f"data/labels/{s}/im{k}.txt", YOLO)
save("data/data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: thing\n")
