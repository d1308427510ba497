# ruff: noqa
from gen import *
base("data", n=2)
# as a labeller that follows the tag writes them: size and box of the upright picture
for k, (w, h, tag, box) in enumerate(((96, 72, 6, (23, 21, 57, 60)), (80, 80, 6, (31, 21, 65, 60)), (96, 72, 3, (37, 23, 76, 57)))):
    im = picture(w, h, seed=k); e = Image.Exif(); e[274] = tag
    save(f"data/JPEGImages/phone{k}.jpg", im, exif=e.tobytes())
    save(f"data/Annotations/phone{k}.xml", xml(*((h, w) if tag == 6 else (w, h)), [("thing", *box)]))
# as one that ignores it writes: size and box of the stored picture
im = picture(96, 72, seed=3); e = Image.Exif(); e[274] = 6
save("data/JPEGImages/stored.jpg", im, exif=e.tobytes()); save("data/Annotations/stored.xml", xml(96, 72, [("thing", *VOC)]))
