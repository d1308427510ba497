"""Prediction by views, and the choice of labels for the CRF."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from crf import dense_crf


class Colours(torch.nn.Module):
    """Cosine maps that are the image's channels: what views do to them can be told."""

    def forward(self, images):
        return images * torch.tensor([1.0, 1.0, 0.0])[:, None, None]


def test_one_view_is_the_network_itself():
    image = torch.randint(0, 256, (3, 20, 31), dtype=torch.uint8)
    expected = Colours()(image[None] / 255)[0]
    torch.testing.assert_close(evaluation.predict(Colours(), image, [1.0], False), expected)
    # Mirrored in and out again: the same for a network that sees one pixel at a time.
    torch.testing.assert_close(evaluation.predict(Colours(), image, [1.0], True), expected)


def test_views_are_averaged():
    image = torch.randint(0, 256, (3, 20, 31), dtype=torch.uint8)
    half = F.interpolate(image[None] / 255, (10, 16), mode="bilinear")
    half = F.interpolate(Colours()(half), (20, 31), mode="bilinear")[0]
    expected = (half + Colours()(image[None] / 255)[0]) / 2
    torch.testing.assert_close(evaluation.predict(Colours(), image, [0.5, 1.0], False), expected)


class LeftOnly(torch.nn.Module):
    def forward(self, images):
        ramp = torch.linspace(1, 0, images.shape[3]).expand(images.shape[0], 1, *images.shape[2:])
        return torch.cat((ramp, 1 - ramp, 0 * ramp), 1)


def test_flip_mirrors_back():
    image = torch.zeros(3, 8, 9, dtype=torch.uint8)
    torch.testing.assert_close(evaluation.predict(LeftOnly(), image, [1.0], True)[:2], torch.full((2, 8, 9), 0.5))


def test_labels_that_cannot_win_are_left_out_of_the_crf():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
    probabilities = np.full((6, 24, 30), 1e-4, np.float32)
    probabilities[[1, 4]] = rng.random((2, 24, 30)) + 0.1
    probabilities[3, 5, 7] = 0.05  # near the highest in one pixel
    probabilities /= probabilities.sum(0)
    arguments = (4.0, 121.0, 5.0), (3.0, 3.0), 5
    seen = []

    def crf(image, p, *rest):
        seen.append(len(p))
        np.testing.assert_allclose(p.sum(0), 1, rtol=1e-5)
        return dense_crf(image, p, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "dense_crf", crf)
        labels = evaluation.sharpen(image, np.log(probabilities), 4.0, *arguments)
        evaluation.sharpen(image, np.log(probabilities), 0.0, *arguments)
    assert seen == [3, 2]  # 1, 4 and 3; then those that are somewhere the highest
    assert set(np.unique(labels)) <= {1, 3, 4}
    assert (labels == dense_crf(image, probabilities, *arguments).argmax(0)).mean() > 0.99


@pytest.mark.parametrize("settings, name", [
    ({}, "plain"), ({"flip": True}, "flip"), ({"crf": True}, "CRF"),
    ({"scales": [0.5, 0.75, 1.0, 1.5], "flip": True, "crf": True}, "scales 0.5 0.75 1 1.5 + flip + CRF"),
])
def test_the_method_is_named(settings, name):
    assert evaluation.method(evaluation.Settings(**settings)) == name
