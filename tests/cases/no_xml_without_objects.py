# ruff: noqa
from gen import *
base("data"); save("data/JPEGImages/empty1.jpg", picture(seed=8)); save("data/JPEGImages/empty2.jpg", picture(seed=9))
