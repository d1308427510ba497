"""The fully connected CRF (Kraehenbuehl and Koltun, 2011), which sharpens the
pseudo labels and the predictions.

One file to copy: it needs numpy and pydensecrf (from PyPI: pydensecrf2).
"""
from collections.abc import Sequence

import numpy as np
import pydensecrf.densecrf as densecrf
from pydensecrf.utils import unary_from_softmax


def dense_crf(
        image: np.ndarray, probabilities: np.ndarray,
        bilateral: Sequence[float] = (4.0, 55.0, 3.0),
        gaussian: Sequence[float] = (3.0, 3.0),
        iterations: int = 10) -> np.ndarray:
    """Mean-field inference with -log probabilities as unaries and two Potts
    terms. The defaults are the paper's for labels.

    image (H, W, 3): uint8 RGB, the picture itself, not normalised.
    probabilities (L, H, W): in [0, 1], with a sum over L of 1 up to rounding.
    bilateral: weight, standard deviations in pixels and in colour (0..255).
    gaussian: weight, standard deviation in pixels. A weight of 0 leaves a term
        out; with a deviation of 0 pydensecrf crashes the process.

    Returns the marginals (L, H, W), float32. Raises ValueError for arrays of
    other shapes or types.
    """
    image, probabilities = np.asarray(image), np.asarray(probabilities)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image is {image.dtype} {image.shape}, not uint8 (H, W, 3)")
    shape, (height, width) = probabilities.shape, image.shape[:2]
    if probabilities.dtype.kind != "f" or shape[1:] != (height, width):
        raise ValueError(f"probabilities are {probabilities.dtype} {shape}, "
                         f"not float (L, {height}, {width})")
    num_labels = shape[0]
    if num_labels == 1:
        return np.ones(shape, np.float32)
    crf = densecrf.DenseCRF2D(width, height, num_labels)
    # Clipped, so that no label is forbidden for good.
    unary = unary_from_softmax(probabilities.astype(np.float32), clip=1e-5)
    crf.setUnaryEnergy(np.ascontiguousarray(unary))
    crf.addPairwiseGaussian(sxy=gaussian[1], compat=gaussian[0])
    crf.addPairwiseBilateral(
        sxy=bilateral[1], srgb=bilateral[2], compat=bilateral[0],
        rgbim=np.array(image, order="C"))
    marginals = np.array(crf.inference(iterations), np.float32)
    return marginals.reshape(shape)
