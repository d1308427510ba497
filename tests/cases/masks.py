# ruff: noqa
from gen import *
# one-class set; truth says the object's ellipse; several ways that people store it
def setup(r, write):
    base(f"data/{r}", n=3)
    for k in range(3):
        m = Image.new("L", (96, 72), 0); ImageDraw.Draw(m).ellipse((22, 17, 58, 48), fill=1)
        write(f"data/{r}/SegmentationClassAug/im{k}.png", np.asarray(m))
def rgb(p, m): save(p, Image.fromarray(np.where(m[..., None] > 0, np.uint8([128, 0, 0]), 0).astype(np.uint8)))
def binary(p, m): save(p, Image.fromarray((m * 255).astype(np.uint8)))
def one(p, m): save(p, Image.fromarray((m * 255).astype(np.uint8)).convert("1"))
def sixteen(p, m): save(p, Image.fromarray(m.astype(np.uint16)))
def rgba(p, m): save(p, Image.fromarray(np.dstack([np.where(m[..., None] > 0, np.uint8([128, 0, 0]), 0), np.full(m.shape, 255)]).astype(np.uint8)))
def greyrgb(p, m): save(p, Image.fromarray(np.dstack([m] * 3).astype(np.uint8)))
def ownpal(p, m):  # palette file whose colours are VOC's, but in an order of its own (as an optimiser or an editor leaves it)
    i = Image.fromarray((1 - m).astype(np.uint8)); i.putpalette([128, 0, 0, 0, 0, 0] + [0] * 762); save(p, i)
def luma(p, m): save(p, Image.fromarray((m * 38).astype(np.uint8)))  # VOC colours turned into grey
for f in (rgb, binary, one, sixteen, rgba, greyrgb, ownpal, luma): setup(f.__name__, f)
def size(p, m): save(p, Image.fromarray(m).resize((48, 36), 0))
setup("size", size)
def partial(p, m):
    if "im2" not in p: save(p, Image.fromarray(m))
setup("partial", partial)
def teal(p, m): save(p, Image.fromarray(np.where(m[..., None] > 0, np.uint8([51, 221, 255]), 0).astype(np.uint8)))
setup("labelmap", teal)
save("data/labelmap/labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\nthing:51,221,255::\n")
