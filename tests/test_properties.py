"""What holds for all boxes, masks and images, under every transform:
hypothesis looks for a case where it does not."""
import numpy as np
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

import datasets
import make_labels
import models
from datasets import VOID
from settings import MakeLabels

settings.register_profile(
    "here", deadline=None, max_examples=60,
    suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")
SEEDS = st.integers(0, 10 ** 6)


@st.composite
def scenes(draw):
    """A sample of rectangles apart from each other, in tight boxes."""
    height, width = draw(st.integers(12, 60)), draw(st.integers(12, 60))
    mask = np.zeros((height, width), np.uint8)
    boxes, labels = [], []
    for label in range(1, draw(st.integers(0, 3)) + 1):
        x0 = draw(st.integers(0, width - 3))
        y0 = draw(st.integers(0, height - 3))
        x1 = draw(st.integers(x0 + 2, width))
        y1 = draw(st.integers(y0 + 2, height))
        if not mask[y0:y1, x0:x1].any():
            mask[y0:y1, x0:x1] = label
            boxes.append((x0, y0, x1, y1))
            labels.append(label)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    background = datasets.outside_boxes(boxes, (height, width))
    image = torch.from_numpy(np.repeat(mask[None] * 80, 3, 0))
    return {
        "id": "x", "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(
            boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "background": tv_tensors.Mask(background),
        "masks": tv_tensors.Mask(torch.from_numpy(mask)[None]),
    }


def extent(mask, label):
    """x0, y0, x1, y1 of a label's pixels, None where it has none."""
    y, x = np.nonzero(mask == label)
    if not len(x):
        return None
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def check_tight(sample, slack):
    """Every box fits its object within `slack` pixels, and an object
    without a box is a sliver."""
    mask = sample["masks"][0].numpy()
    boxes = dict(zip(sample["labels"].tolist(), sample["boxes"].tolist()))
    for label in set(np.unique(mask)) - {0, VOID} | set(boxes):
        seen = extent(mask, label)
        if label in boxes and seen is not None:
            apart = np.subtract(boxes[label], seen)
            assert np.abs(apart).max() <= slack, (boxes[label], seen)
        else:
            x0, y0, x1, y1 = boxes[label] if seen is None else seen
            assert min(x1 - x0, y1 - y0) <= 1 + slack


def check_background(sample):
    """1 on no pixel of an object or of the padding; 255 only there."""
    background = sample["background"][0].numpy()
    mask = sample["masks"][0].numpy()
    assert set(np.unique(background)) <= {0, 1, VOID}
    assert not ((background == 1) & (mask != 0)).any()
    batch = datasets.collate([sample])["background"][0, 0].numpy()
    assert np.array_equal(batch, background == 1)


SIDE = st.floats(-40, 80, width=32)


@given(st.lists(st.tuples(SIDE, SIDE, SIDE, SIDE), max_size=4),
       st.integers(1, 40), st.integers(1, 40))
def test_boxes_cover_the_same_pixels_in_both_modules(sides, height, width):
    """Also boxes that lie partly or wholly outside of the image."""
    boxes = torch.tensor(sides, dtype=torch.float32).reshape(-1, 2, 2)
    boxes = boxes.sort(1).values.flatten(1)
    found = datasets.outside_boxes(boxes, (height, width))
    assert found.shape == (1, height, width) and found.dtype == torch.uint8
    expected = models.outside_boxes([boxes], (height, width))[0]
    assert torch.equal(found, expected.byte())
    expected = reference.outside_boxes(boxes, (height, width))
    assert torch.equal(found[0], expected.byte())


@given(scenes())
def test_a_flip_keeps_boxes_tight(sample):
    flipped = v2.RandomHorizontalFlip(1.0)(sample)
    check_tight(flipped, 0)
    check_background(flipped)


@given(scenes(), st.floats(0.390625, 2.5, width=32))  # as torch draws it
def test_a_scale_keeps_boxes_tight_to_a_pixel(sample, factor):
    scaled = datasets.random_scale(sample, (factor, factor))
    expected = [max(1, round(factor * n)) for n in sample["image"].shape[1:]]
    assert list(scaled["image"].shape[1:]) == expected
    check_tight(scaled, 1)  # nearest sampling of masks rounds each edge


@given(scenes(), st.integers(9, 90), SEEDS)
def test_a_crop_and_its_padding_keep_boxes_tight(sample, crop, seed):
    torch.manual_seed(seed)
    fill = {tv_tensors.Image: [0, 0, 0], tv_tensors.Mask: VOID}
    cropped = v2.RandomCrop(crop)(datasets.pad_to(sample, crop, fill))
    cropped = datasets.drop_thin_boxes(cropped)
    assert cropped["image"].shape == (3, crop, crop)
    check_tight(cropped, 0)
    check_background(cropped)


@given(scenes(), st.integers(9, 90), st.floats(0.4, 1.2),
       st.floats(0, 1.3), SEEDS)
def test_the_whole_transform(sample, crop, low, more, seed):
    torch.manual_seed(seed)
    known = set(sample["labels"].tolist())
    scale = low, low + more
    out = datasets.training_transform(crop, (1, 2, 3), scale)(sample)
    assert out["image"].shape == (3, crop, crop)
    assert out["image"].dtype == torch.uint8
    assert set(np.unique(out["masks"])) <= {0, VOID} | known
    boxes, labels = out["boxes"], out["labels"].tolist()
    assert len(labels) == len(boxes) and set(labels) <= known
    assert (boxes >= 0).all() and (boxes <= crop).all()
    assert ((boxes[:, 2:] - boxes[:, :2]) >= 1).all()
    check_tight(out, 1)
    check_background(out)


@st.composite
def labelled(draw):
    """A scene, and a network's features and classifier drawn at random."""
    sample = draw(scenes())
    g = torch.Generator().manual_seed(draw(SEEDS))
    size = tuple(sample["image"].shape[1:])
    canvas = models.padded_size(size)
    cells = [1 + side // 8 for side in canvas]
    features = torch.randn(4, *cells, generator=g)
    weight = torch.randn(4, 4, generator=g)
    return sample, models.Upsampled(features, size, canvas), weight, g


@given(labelled(), st.booleans(), st.sampled_from(["box", "class"]),
       st.booleans(), st.sampled_from([0, 0.5, 0.99]))
def test_labels_are_the_images_own_and_background_outside_boxes(
        case, u0, norm, softmax, threshold):
    sample, up, weight, g = case
    s = MakeLabels(
        u0=u0, cam_norm=norm, softmax=softmax, threshold=threshold)
    boxes = sample["boxes"].as_subclass(torch.Tensor)
    labels = sample["labels"]
    classes = sorted(set(labels.tolist()))
    outside = sample["background"][0].as_subclass(torch.Tensor) == 1
    attention = make_labels.background_attention(up, weight, outside, s)
    assert attention.min() >= 0 and attention.max() <= 1
    maps = make_labels.activation_maps(
        up, weight, boxes, labels, classes, s)
    assert not maps.numel() or 0 <= maps.min() and maps.max() <= 1 + 1e-6
    u = make_labels.to_probabilities(attention, maps, outside, s)
    torch.testing.assert_close(
        u.sum(0), torch.ones(outside.shape), rtol=1e-5, atol=1e-5)
    marginals = torch.rand(u.shape, generator=g).numpy()  # of any CRF
    own = make_labels.unions(boxes, labels, classes, outside.shape)
    found = make_labels.Unaries(up, classes, own, attention, maps, u)
    y_crf = make_labels.label_by_crf(marginals, found)
    y_ret = make_labels.label_by_prototypes(y_crf, found, weight).numpy()
    y_crf = y_crf.numpy()
    for y in (y_crf, y_ret):
        assert set(np.unique(y)) <= {0, *classes}
        assert (y[outside.numpy()] == 0).all()
        for label in classes:  # a class stays in its own boxes
            own = datasets.outside_boxes(boxes[labels == label], y.shape)
            assert not (y[own[0].numpy() == 1] == label).any()


@given(scenes())
def test_bap_weighs_no_more_than_there_is(sample):
    """r and q are means: those of one constant are the constant."""
    size = models.padded_size(sample["image"].shape[1:])
    boxes = sample["boxes"].as_subclass(torch.Tensor)
    cells = [1 + side // 8 for side in size]
    features = torch.full((1, 3, *cells), 2.5)
    pooled = models.BAP()(features, [boxes], size)
    for means in (pooled.foreground, pooled.queries):
        torch.testing.assert_close(means, torch.full_like(means, 2.5))
    assert pooled.attention.min() >= 0 and pooled.attention.max() <= 1
