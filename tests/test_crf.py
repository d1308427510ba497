"""crf.py: against a mean field with every pair of pixels written out, and what a user hands it."""
import inspect
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT

from crf import dense_crf


def two_colours(H=12, W=14, noise=6, seed=0):
    """(H, W, 3) uint8: red left of a slanted edge, blue right of it, some noise; and the blue's mask."""
    right = np.arange(W)[None] > W / 2 + (np.arange(H)[:, None] - H / 2) / 3
    image = np.where(right[..., None], (40, 60, 200), (200, 50, 40))
    image = image + np.random.default_rng(seed).integers(-noise, noise + 1, (H, W, 3))
    return image.clip(0, 255).astype(np.uint8), right


def guess(labels, L, sure=0.6, wrong=0.0, seed=0):
    """(L, H, W) float32: `sure` for the label, the rest shared; a share of the labels drawn anew."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(labels.shape) < wrong, rng.integers(L, size=labels.shape), labels)
    p = np.full((L, *labels.shape), (1 - sure) / (L - 1), np.float32)
    np.put_along_axis(p, labels[None], sure, 0)
    return p


@pytest.mark.parametrize("L", [1, 2, 5])
def test_marginals(L):
    image, _ = two_colours()
    p = np.random.default_rng(0).dirichlet(np.ones(L), (12, 14)).transpose(2, 0, 1).astype(np.float32)
    q = dense_crf(image, p)
    assert q.shape == (L, 12, 14) and q.dtype == np.float32
    assert (q >= 0).all() and np.allclose(q.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("bilateral, gaussian", [
    ((4.0, 55.0, 3.0), (3.0, 3.0)),
    ((0.0, 55.0, 3.0), (3.0, 3.0)),
    ((4.0, 5.0, 20.0), (3.0, 1.0)),
    ((1.0, 5.0, 10.0), (1.0, 2.0)),
])
def test_is_the_mean_field(bilateral, gaussian):
    """The library's filter is an approximation: one step is close, ten steps agree on the labels."""
    image, _ = two_colours()
    p = np.random.default_rng(0).dirichlet(np.ones(3), (12, 14)).transpose(2, 0, 1).astype(np.float32)
    p = p.clip(0.01) / p.clip(0.01).sum(0)
    for iterations, largest, average in [(1, 0.06, 0.01), (10, 0.5, 0.02)]:
        q = dense_crf(image, p, bilateral, gaussian, iterations)
        r = reference.mean_field(image, torch.from_numpy(p), bilateral, gaussian, iterations).numpy()
        assert (q.argmax(0) == r.argmax(0)).mean() > 0.97
        assert np.abs(q - r).max() < largest and np.abs(q - r).mean() < average


def test_cleans_noise_up_to_the_colour_edge():
    image, right = two_colours(40, 50)
    p = guess(right.astype(int), 2, wrong=0.3)
    assert (p.argmax(0) != right).mean() > 0.1
    assert (dense_crf(image, p).argmax(0) == right).all()


def test_keeps_what_is_sure_without_iterations_or_weights():
    image, right = two_colours()
    p = guess(right.astype(int), 3, wrong=0.3)
    assert np.allclose(dense_crf(image, p, iterations=0), p, atol=1e-5)
    off = dense_crf(image, p, bilateral=(0.0, 55.0, 3.0), gaussian=(0.0, 3.0))
    assert np.allclose(off, p, atol=1e-5)


def test_wide_and_high_are_not_mixed_up():
    """The edge runs across a wide image; the transposed problem has the transposed answer."""
    image, right = two_colours(10, 30)
    p = guess(right.astype(int), 2, wrong=0.2)
    q = dense_crf(image, p)
    turned = dense_crf(image.transpose(1, 0, 2), p.transpose(0, 2, 1)).transpose(0, 2, 1)
    assert (q.argmax(0) == right).all() and (turned.argmax(0) == right).all()
    assert np.abs(q - turned).max() < 0.05


def test_input_is_left_alone_and_may_be_a_view():
    image, right = two_colours()
    p = guess(right.astype(int), 2, wrong=0.2)
    expected = dense_crf(image, p)
    wide = np.zeros((12, 28, 3), np.uint8)
    wide[:, ::2] = image
    image_view, p_view = wide[:, ::2], np.asfortranarray(p)
    before = image_view.copy(), p_view.copy()
    assert np.array_equal(dense_crf(image_view, p_view), expected)
    assert np.array_equal(image_view, before[0]) and np.array_equal(p_view, before[1])
    image.flags.writeable = p.flags.writeable = False  # as PIL and a memory map give them
    assert np.array_equal(dense_crf(image, p), expected)
    assert np.array_equal(dense_crf(image, p.astype(np.float64)), expected)


def test_hard_probabilities():
    image, right = two_colours()
    p = guess(right.astype(int), 3, sure=1.0)
    q = dense_crf(image, p)
    assert np.isfinite(q).all() and (q.argmax(0) == right).all()


def test_the_defaults_are_the_papers_for_labels():
    *_, bilateral, gaussian, iterations = inspect.signature(dense_crf).parameters.values()
    assert (bilateral.default, gaussian.default, iterations.default) == ((4.0, 55.0, 3.0), (3.0, 3.0), 10)


def test_a_probability_of_0_counts_as_1e_5():
    p = np.zeros((3, 4, 5), np.float32)
    p[0] = 1
    q = dense_crf(np.zeros((4, 5, 3), np.uint8), p, iterations=0)
    np.testing.assert_allclose(q[1:], 1e-5, rtol=1e-3)


def test_a_label_of_probability_0_is_not_forbidden():
    """One pixel of one colour with 80 others is sure of another label."""
    p = np.zeros((2, 9, 9), np.float32)
    p[0], p[:, 4, 4] = 1, (0, 1)
    q = dense_crf(np.full((9, 9, 3), 200, np.uint8), p, bilateral=(30.0, 55.0, 3.0), gaussian=(0.0, 3.0))
    assert not q.argmax(0).any()


def test_bilateral_rgb_std_holds_colours_apart():
    """A Gaussian kernel alone pulls a lone pixel over; the bilateral one leaves it with its colour."""
    image = np.full((9, 9, 3), 200, np.uint8)
    image[3:6, 3:6] = 20
    labels = np.zeros((9, 9), int)
    labels[3:6, 3:6] = 1
    p = guess(labels, 2, sure=0.55)
    apart = dense_crf(image, p, bilateral=(10.0, 55.0, 3.0), gaussian=(0.0, 3.0))
    blind = dense_crf(image, p, bilateral=(10.0, 55.0, 1e4), gaussian=(0.0, 3.0))
    assert (apart.argmax(0) == labels).all() and (blind.argmax(0) == 0).all()


@pytest.mark.parametrize("change", [
    lambda image, p: (image[..., 0], p),  # grey
    lambda image, p: (image[..., [0, 1, 2, 2]], p),  # RGBA
    lambda image, p: (image.transpose(2, 0, 1), p),
    lambda image, p: (image.astype(np.float32) / 255, p),
    lambda image, p: (image.astype(np.int64), p),
    lambda image, p: (image, p[0]),
    lambda image, p: (image, p.transpose(1, 2, 0)),
    lambda image, p: (image[:-1], p),
    lambda image, p: (image, p[:, :, :-1]),
    lambda image, p: (image, (p * 255).astype(np.uint8)),
], ids=["grey", "rgba", "channels-first", "float-image", "int-image", "no-labels", "labels-last",
        "other-height", "other-width", "int-probabilities"])
def test_wrong_input_is_told(change):
    image, right = two_colours()
    with pytest.raises(ValueError, match=r"^(image is|probabilities are) .*, not (uint8|float) \("):
        dense_crf(*change(image, guess(right.astype(int), 2)))


def test_it_is_one_file_to_copy(tmp_path):
    shutil.copy(ROOT / "crf.py", tmp_path)
    environment = {**os.environ, "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-c", "import crf"], cwd=tmp_path, env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
