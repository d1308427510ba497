# ruff: noqa
from gen import *
base("data", n=2, ext=".png")
g = np.asarray(picture(seed=3).convert("L")).astype(np.uint16)
save("data/JPEGImages/deep.png", Image.fromarray(g * 16)); save("data/Annotations/deep.xml", xml(96, 72, [("thing", *VOC)]))
