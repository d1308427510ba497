"""Prediction by views."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import datasets
import engine
import eval as evaluation
import make_labels
import models
import settings


class Colours(torch.nn.Module):
    """Cosine maps that are the image's channels: what views do to them can be told."""

    def forward(self, images):
        return images * torch.tensor([1.0, 1.0, 0.0])[:, None, None]


def test_one_view_is_the_network_itself():
    image = torch.randint(0, 256, (3, 20, 31), dtype=torch.uint8)
    expected = Colours()(image[None] / 255)[0]
    torch.testing.assert_close(engine.predict(Colours(), image, [1.0], False), expected)
    # Mirrored in and out again: the same for a network that sees one pixel at a time.
    torch.testing.assert_close(engine.predict(Colours(), image, [1.0], True), expected)


def test_views_are_averaged():
    image = torch.randint(0, 256, (3, 20, 31), dtype=torch.uint8)
    half = F.interpolate(image[None] / 255, (10, 16), mode="bilinear")
    half = F.interpolate(Colours()(half), (20, 31), mode="bilinear")[0]
    expected = (half + Colours()(image[None] / 255)[0]) / 2
    torch.testing.assert_close(engine.predict(Colours(), image, [0.5, 1.0], False), expected)


class LeftOnly(torch.nn.Module):
    def forward(self, images):
        ramp = torch.linspace(1, 0, images.shape[3]).expand(images.shape[0], 1, *images.shape[2:])
        return torch.cat((ramp, 1 - ramp, 0 * ramp), 1)


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0, 1.5]])
def test_flip_mirrors_back(scales):
    image = torch.zeros(3, 8, 9, dtype=torch.uint8)
    torch.testing.assert_close(engine.predict(LeftOnly(), image, scales, True)[:2], torch.full((2, 8, 9), 0.5))


@pytest.mark.parametrize("changes, name", [
    ({}, "plain"), ({"flip": True}, "flip"), ({"crf": True}, "CRF"),
    ({"scales": (0.5, 0.75, 1.0, 1.5), "flip": True, "crf": True}, "scales 0.5 0.75 1 1.5 + flip + CRF"),
])
def test_the_method_is_named(changes, name):
    config = SimpleNamespace(eval=settings.Eval(**changes))
    assert engine.method(config) == name


class Sample(list):
    ids = ["x"]


def test_views_and_crf_are_those_of_the_settings(tmp_path, monkeypatch):
    config = settings.read("eval", [
        "scales=[0.5, 1]", "flip=true", "crf=true", "crf_bilateral=[1, 2, 3]", "crf_gaussian=[4, 5]",
        "crf_iterations=6", "train_seg.temperature=3", "run.workers=0"])
    config.device, seen = torch.device("cpu"), []
    image, cosine = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8), torch.rand(2, 4, 5)
    monkeypatch.setattr(engine, "predict", lambda network, image, *views: seen.append(views) or cosine)
    monkeypatch.setattr(evaluation, "dense_crf", lambda *given: seen.append(given) or given[1])
    network = models.DeepLab(2, width=0.0625)
    evaluation.predict_images(config, network, Sample([{"id": "x", "image": image}]), tmp_path)
    views, (picture, probabilities, *crf) = seen
    assert views == ((0.5, 1.0), True) and crf == [(1, 2, 3), (4, 5), 6]
    assert (picture == image.permute(1, 2, 0).numpy()).all()
    powers = (3 * cosine).exp()
    torch.testing.assert_close(torch.from_numpy(probabilities), powers / powers.sum(0))
    assert (datasets.read_mask(tmp_path / "x.png", 2) == cosine.argmax(0).numpy()).all()


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_of_labels_and_of_predictions(tmp_path, precision, dtype):
    conv, seen = torch.nn.Conv2d(3, 4, 3, 8, 1), []
    conv.trained_with = {}
    conv.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    config = settings.read("eval", [f"run.precision={precision}", "run.workers=0"])
    config.device, image = torch.device("cpu"), torch.randint(0, 256, (3, 16, 17), dtype=torch.uint8)
    network = SimpleNamespace(features=lambda images: conv(images / 255))
    assert make_labels.upsampled(config, network, image).features.dtype == torch.float32
    evaluation.predict_images(config, conv, Sample([{"id": "x", "image": image}]), tmp_path)
    assert seen == [dtype, dtype]


def test_labels_are_enlarged_without_new_ones_between(tmp_path):
    scores = np.zeros((4, 2, 3))
    scores[3, :, 1:] = 1
    evaluation.write_labels(tmp_path / "a.png", scores, (4, 6))
    assert datasets.read_mask(tmp_path / "a.png", 4).tolist() == [[0, 0, 3, 3, 3, 3]] * 4


def test_names_of_photographs(tmp_path):
    paths = [tmp_path / name for name in (
        "x/a.jpg", "x/b.jpg", "y/a.jpg", "z/c.jpg", "z/c.png")]
    assert evaluation.unique_names(paths) == [
        "x_a", "b", "y_a", "z_c_jpg", "z_c_png"]


def test_photographs_that_no_name_tells_apart_are_refused(tmp_path):
    for folder in ("x/z", "y/z"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(b"")
    with pytest.raises(settings.UsageError, match="several files of one name"):
        evaluation.Photos(f"{tmp_path}/*/z/a.jpg", 1000)


def test_longer_photographs_are_predicted_at_max_side(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "long.PNG")
    Image.new("RGB", (90, 60)).save(tmp_path / "short.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    photos = evaluation.Photos(str(tmp_path), 100)
    assert photos.ids == ["long", "short"]
    found = [(tuple(photos[k]["size"]), tuple(photos[k]["image"].shape)) for k in (0, 1)]
    assert found == [((100, 200), (3, 50, 100)), ((60, 90), (3, 60, 90))]
