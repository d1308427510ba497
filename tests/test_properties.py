"""What holds for every box, mask and image, under every transform: hypothesis looks for a case where it does not."""
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

import datasets
import make_labels
import models

settings.register_profile("here", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")
VOID = 255


@st.composite
def scenes(draw, least=12, most=60):
    """A sample of solid rectangles: boxes tight round objects that a mask shows, later ones on top, each in sight."""
    height, width = draw(st.integers(least, most)), draw(st.integers(least, most))
    mask, boxes, labels = np.zeros((height, width), np.uint8), [], []
    for label in range(1, draw(st.integers(0, 3)) + 1):
        x0, y0 = draw(st.integers(0, width - 3)), draw(st.integers(0, height - 3))
        x1, y1 = draw(st.integers(x0 + 2, width)), draw(st.integers(y0 + 2, height))
        if mask[y0:y1, x0:x1].any():
            continue  # apart from each other, so that each mask shows a whole object
        mask[y0:y1, x0:x1] = label
        boxes.append((x0, y0, x1, y1))
        labels.append(label)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    image = torch.from_numpy(np.repeat(mask[None] * 80, 3, 0))
    return {
        "id": "x", "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "background": tv_tensors.Mask(models.outside_boxes([boxes], (height, width))[0].byte()),
        "masks": tv_tensors.Mask(torch.from_numpy(mask)[None]),
    }


def extent(mask, label):
    """x0, y0, x1, y1 of a label's pixels, None where it has none."""
    y, x = np.nonzero(mask == label)
    return (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else None


def check_tight(sample, slack):
    """Every box fits its object within `slack` pixels, and an object without a box is a sliver."""
    mask = sample["masks"][0].numpy()
    boxes = dict(zip(sample["labels"].tolist(), sample["boxes"].tolist()))
    for label in set(np.unique(mask)) - {0, VOID} | set(boxes):
        seen = extent(mask, label)
        if label not in boxes:
            assert min(seen[2] - seen[0], seen[3] - seen[1]) <= 1 + slack
        elif seen is None:
            x0, y0, x1, y1 = boxes[label]
            assert min(x1 - x0, y1 - y0) <= 1 + slack
        else:
            assert max(abs(a - b) for a, b in zip(boxes[label], seen)) <= slack, (boxes[label], seen)


def check_background(sample):
    """1 on no pixel of an object, nor of the padding; never but 0, 1, and 255 for the padding."""
    background, mask = sample["background"][0].numpy(), sample["masks"][0].numpy()
    assert set(np.unique(background)) <= {0, 1, VOID}
    assert not ((background == 1) & (mask != 0)).any()
    collated = datasets.collate([sample])["background"][0, 0].numpy()
    assert not ((collated == 1) & (mask != 0)).any() and set(np.unique(collated)) <= {0, 1}


@given(scenes())
def test_a_flip_keeps_boxes_tight(sample):
    check_tight(v2.RandomHorizontalFlip(1.0)(sample), 0)
    check_background(v2.RandomHorizontalFlip(1.0)(sample))


@given(scenes(), st.floats(0.390625, 2.5, width=32))  # as torch draws it: rounding is sharp
def test_a_scale_keeps_boxes_tight_to_a_pixel(sample, factor):
    scaled = datasets.random_scale(sample, (factor, factor))
    height, width = sample["image"].shape[1:]
    assert tuple(scaled["image"].shape[1:]) == (max(1, round(factor * height)), max(1, round(factor * width)))
    check_tight(scaled, 1)  # of the new size: nearest sampling rounds each edge


@given(scenes(), st.integers(9, 90), st.integers(0, 10 ** 6))
def test_a_crop_and_its_padding_keep_boxes_tight(sample, crop, seed):
    torch.manual_seed(seed)
    cropped = v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: [0, 0, 0], tv_tensors.Mask: VOID})(sample)
    cropped = datasets.drop_thin_boxes(cropped)
    assert cropped["image"].shape == (3, crop, crop)
    check_tight(cropped, 0)
    check_background(cropped)


@given(scenes(), st.integers(9, 90), st.floats(0.4, 1.2), st.floats(0, 1.3), st.integers(0, 10 ** 6))
def test_the_whole_transform(sample, crop, low, more, seed):
    torch.manual_seed(seed)
    given_labels = set(sample["labels"].tolist())
    out = datasets.training_transform(crop, (1, 2, 3), (low, low + more))(sample)
    assert out["image"].shape == (3, crop, crop) and out["image"].dtype == torch.uint8
    assert set(np.unique(out["masks"])) <= {0, VOID} | given_labels  # no label comes from nowhere
    assert len(out["labels"]) == len(out["boxes"]) and set(out["labels"].tolist()) <= given_labels
    check_tight(out, 1)
    boxes = out["boxes"]
    assert (boxes >= 0).all() and (boxes <= crop).all() and ((boxes[:, 2:] - boxes[:, :2]) >= 1).all()
    check_background(out)


@st.composite
def labelled(draw):
    """A scene, and a network's features and classifier drawn at random."""
    sample = draw(scenes())
    g = torch.Generator().manual_seed(draw(st.integers(0, 10 ** 6)))
    size = tuple(sample["image"].shape[1:])
    canvas = models.padded_size(size)
    features = torch.randn(4, *(1 + side // 8 for side in canvas), generator=g)
    weight = torch.randn(4, 4, generator=g)
    return sample, models.Upsampled(features, size, canvas), weight, g


class Classifier:
    def __init__(self, weight):
        self.classifier = torch.nn.Linear(4, 4, bias=False)
        self.classifier.weight = torch.nn.Parameter(weight, requires_grad=False)


@given(labelled(), st.booleans(), st.sampled_from(["box", "class"]), st.booleans(), st.sampled_from([0, 0.5, 0.99]))
def test_labels_are_the_images_own_and_background_outside_boxes(case, u0, norm, softmax, threshold):
    sample, up, weight, g = case
    s = make_labels.Settings(u0=u0, cam_norm=norm, softmax=softmax, threshold=threshold)
    boxes, labels = sample["boxes"].as_subclass(torch.Tensor), sample["labels"]
    classes, outside = sorted(set(labels.tolist())), sample["background"][0].as_subclass(torch.Tensor) == 1
    attention = make_labels.background_attention(up, weight, outside, s)
    assert attention.min() >= 0 and attention.max() <= 1
    maps = make_labels.activation_maps(up, weight, boxes, labels, classes, s)
    assert not maps.numel() or 0 <= maps.min() and maps.max() <= 1 + 1e-6
    u = make_labels.unaries(attention, maps, outside, s)
    torch.testing.assert_close(u.sum(0), torch.ones(outside.shape), rtol=1e-5, atol=1e-5)
    marginals = torch.rand(u.shape, generator=g).numpy()  # whatever the CRF says
    prepared = "x", up, outside, boxes, labels, classes, None
    y_crf, y_ret = make_labels.finish(s, Classifier(weight), prepared, marginals)
    for y in (y_crf, y_ret):
        assert set(np.unique(y)) <= {0, *classes}
        assert (y[outside.numpy()] == 0).all()
    for label in classes:
        mine = labels == label  # a class stays in its own boxes
        own = make_labels.regions(boxes[mine], labels[mine], [label], outside.shape)
        assert not ((y_crf == label) & ~own[0].numpy()).any()
        assert not ((y_ret == label) & ~own[0].numpy()).any()


@given(scenes())
def test_bap_weighs_no_more_than_there_is(sample):
    """r and q are means: of features that are all one constant, that constant."""
    size = models.padded_size(sample["image"].shape[1:])
    features = torch.full((1, 3, *(1 + side // 8 for side in size)), 2.5)
    pooled = models.BAP()(features, [sample["boxes"].as_subclass(torch.Tensor)], size)
    torch.testing.assert_close(pooled.foreground, torch.full_like(pooled.foreground, 2.5))
    torch.testing.assert_close(pooled.queries, torch.full_like(pooled.queries, 2.5))
    assert pooled.attention.min() >= 0 and pooled.attention.max() <= 1
