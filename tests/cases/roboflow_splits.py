# ruff: noqa
from gen import *
for k, s in enumerate(("train", "valid", "test")):
    f = f"im{k}_jpg.rf.0a1b2c3d"
    save(f"data/voc/{s}/{f}.jpg", picture(seed=k)); save(f"data/voc/{s}/{f}.xml", xml(96, 72, [("thing", *VOC)], filename=f + ".jpg"))
    save(f"data/yolo/{s}/images/{f}.jpg", picture(seed=k)); save(f"data/yolo/{s}/labels/{f}.txt", YOLO)
    save(f"data/coco/{s}/{f}.jpg", picture(seed=k))
    save(f"data/coco/{s}/_annotations.coco.json", coco([(0, f + ".jpg", 96, 72)], [dict(image_id=0, category_id=1, bbox=[20, 15, 40, 35])], [(0, "things"), (1, "thing")]))
save("data/yolo/data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 1\nnames: ['thing']\n")
