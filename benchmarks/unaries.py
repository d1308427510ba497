"""What should the CRF start from: the paper's {u0, u_c}, or the classifier's logits?

    python benchmarks/unaries.py CONFIG.yaml LIST cls.pt [key=value ...]

The logits are those of `unary: logits` in settings.py, with k, d, s and sizes of the image. Labels the images of LIST
that have a true mask from each, and prints the mIoU of Ycrf and Yret and the change, with the interval that holds 95 %
of 1,000 draws of the images. Needs scipy.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import details  # noqa: I001
import runs

ALL = [1, 1.5, 2]
LOGITS = [(0.3, 4, 0, ALL), (0.05, 6, 0, ALL), (0.05, 6, 1, ALL), (0.05, 6, 1, [1]), (0.05, 6, 2, ALL),
          (0.05, 8, 1, ALL), (0.1, 6, 1, ALL)]  # k, d, s, sizes
UNARIES = {details.SETTINGS: {}} | {
    f"k {k}, d {d}, s {s}, sizes {', '.join(map(str, sizes))}":
        dict(unary="logits", logit_scale=k, logit_bias=d, cosine_scale=s, sizes=sizes) for k, d, s, sizes in LOGITS}


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python benchmarks/unaries.py CONFIG.yaml LIST cls.pt [key=value ...]")
    try:
        details.main(*sys.argv[1:], before=UNARIES, after=False)
    except runs.FAULTS as fault:
        sys.exit(str(fault))
