# ruff: noqa
from gen import *
for r in ("ext", "main", "flag", "miss", "slash"): base(f"data/{r}")
T = {"ext": "im0.jpg\nim1.jpg\n", "flag": "im0  1\nim1 -1\n", "miss": "im0\nim1\nim77\n", "slash": "data/images/im0.jpg\n"}
for r, t in T.items(): save(f"data/{r}/ImageSets/Segmentation/train.txt", t); save(f"data/{r}/ImageSets/Segmentation/val.txt", "im2\n")
save("data/main/ImageSets/Main/train.txt", "im0\nim1\nim2\n"); save("data/main/ImageSets/Main/val.txt", "im3\n")
