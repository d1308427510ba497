"""What should the CRF start from: the paper's {u0, u_c}, or the classifier's logits?

    python benchmarks/unaries.py CONFIG.yaml LIST cls.pt [key=value ...]

The logits are softmax over {k w_0 . f, k (w_c . f + d)}, w . f averaged over the image at some sizes (`unary: logits`).
Labels the images of LIST that have a true mask from each, and prints the mIoU of Ycrf and Yret and the change, with the
interval that holds 95 % of 1,000 draws of the images. Needs scipy.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import details  # noqa: E402, I001
import runs  # noqa: E402

LOGITS = [(0.3, 4, [1]), (0.3, 4, [1, 1.5]), (0.3, 4, [1, 1.5, 2]), (0.3, 3, [1, 1.5, 2]), (0.3, 5, [1, 1.5, 2]),
          (0.15, 4, [1, 1.5, 2]), (0.6, 4, [1, 1.5, 2])]  # k, d, sizes
UNARIES = {details.SETTINGS: {}} | {
    f"k {k}, d {d}, sizes {', '.join(map(str, sizes))}":
        dict(unary="logits", logit_scale=k, logit_bias=d, sizes=sizes) for k, d, sizes in LOGITS}


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python benchmarks/unaries.py CONFIG.yaml LIST cls.pt [key=value ...]")
    try:
        details.main(*sys.argv[1:], before=UNARIES, after=False)
    except runs.FAULTS as fault:
        sys.exit(str(fault))
