# ruff: noqa
from gen import *
def put(r, images, anns, cats=((1, "thing"),), files=None):
    for f in files or [i[1] for i in images]: save(f"data/{r}/images/{f}", picture())
    save(f"data/{r}/annotations.json", coco(images, anns, cats))
A = lambda i, b, c=1, **k: dict(image_id=i, category_id=c, bbox=b, **k)
put("a", [(i, f"im{i}.jpg", 96, 72) for i in range(8)], [A(0, [20, 15, 40, 35]), A(1, [60, 40, 38, 34]), A(2, [60, 40, -20, -20]), A(3, [20.123, 15.77, 40.5, 35.1]), A(4, [20, 15, 0, 35]), A(5, [-3, 10, 40, 30]), A(6, [95.6, 10, 0.3, 30])])
put("dup", [(1, "a/f0.jpg", 96, 72), (2, "b/f0.jpg", 96, 72)], [A(1, [20, 15, 40, 35]), A(2, [20, 15, 40, 35])], files=["a/f0.jpg", "b/f0.jpg"])
put("crowd", [(1, "im.jpg", 96, 72)], [A(1, [0, 0, 96, 72], iscrowd=1), A(1, [20, 15, 40, 35])])
put("nobox", [(1, "im.jpg", 96, 72)], [dict(image_id=1, category_id=1, segmentation=[[20, 15, 60, 15, 60, 50]])])
put("classes", [(1, "im.jpg", 96, 72)], [A(1, [20, 15, 40, 35], 3), A(1, [2, 3, 10, 10], 7), A(1, [30, 3, 10, 10], 9)], ((3, "no"), (7, "007"), (9, "Größe, mit Komma"), (12, "unused")))
put("paths", [(1, "images\\im.jpg", 96, 72), (2, "https://host/x/im2.jpg?sig=1", 96, 72), (3, "upload/3f/im%203.jpg", 96, 72)], [A(i, [20, 15, 40, 35]) for i in (1, 2, 3)], files=["im.jpg", "im2.jpg", "im 3.jpg"])
put("empty", [(1, "im.jpg", 96, 72), (2, "none.jpg", 96, 72)], [A(1, [20, 15, 40, 35])])
put("size", [(1, "im.jpg", 192, 144)], [A(1, [40, 30, 80, 70])])
put("two", [(1, "im.jpg", 96, 72)], [A(1, [20, 15, 40, 35])]); save("data/two/captions.json", '{"info": {}}')
