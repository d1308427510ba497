# ruff: noqa
from gen import *
base("data", n=1)
W, H = 96, 72
for k, b in dict(one_beyond=(40, 30, 97, 73), half_beyond=("40.25", "30.5", "96.4", "72.2"), zero_based=(0, 0, 50, 40), floats=("20.37", "15.2", "59.9", "50.01"), three_beyond=(40, 30, 99, 72), minus3=(-3, 10, 40, 40), sci=("2.1e1", "16", "6e1", "50"), comma=("20,5", "16", "60", "50"), point=(30, 30, 30, 30), line=(21, 30, 60, 29)).items():
    save(f"data/JPEGImages/{k}.jpg", picture()); save(f"data/Annotations/{k}.xml", xml(W, H, [("thing", *b)]))
save("data/JPEGImages/swapped_size.jpg", picture()); save("data/Annotations/swapped_size.xml", xml(H, W, [("thing", 10, 10, 50, 50)]))
save("data/JPEGImages/resized.jpg", picture(48, 36, (10, 8, 30, 25))); save("data/Annotations/resized.xml", xml(W, H, [("thing", *VOC)]))
save("data/JPEGImages/zero_size.jpg", picture()); save("data/Annotations/zero_size.xml", xml(0, 0, [("thing", *VOC)]))
save("data/JPEGImages/rotated.jpg", picture()); save("data/Annotations/rotated.xml", xml(W, H, []).replace("</annotation>", "<object><type>robndbox</type><name>thing</name><robndbox><cx>40</cx><cy>30</cy><w>20</w><h>10</h><angle>0.3</angle></robndbox></object></annotation>"))
save("data/JPEGImages/polygon.jpg", picture()); save("data/Annotations/polygon.xml", xml(W, H, []).replace("</annotation>", "<object><name>thing</name><polygon><x1>20</x1><y1>20</y1></polygon></object></annotation>"))
