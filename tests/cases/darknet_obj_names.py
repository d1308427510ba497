# ruff: noqa
from gen import *
for k in range(2):
    save(f"data/obj_train_data/im{k}.jpg", picture(seed=k)); save(f"data/obj_train_data/im{k}.txt", YOLO)
save("data/obj.names", "thing\nother\n"); save("data/obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n")
save("data/train.txt", "data/obj_train_data/im0.jpg\ndata/obj_train_data/im1.jpg\n")
