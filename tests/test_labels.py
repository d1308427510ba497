"""Stage 2 against the equations of section 3.2, pixel by pixel on features upsampled first."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import make_labels
import models
import settings

HEIGHT, WIDTH, CHANNELS = 21, 30, 5


def scene(seed, boxes=((3, 2, 14, 17), (10, 5, 28, 19), (4, 4, 9, 9)), labels=(2, 1, 2)):
    """Random features of a padded image, boxes and a classifier of background and three classes."""
    g = torch.Generator().manual_seed(seed)
    size, canvas = (HEIGHT, WIDTH), models.padded_size((HEIGHT, WIDTH))
    features = torch.randn(CHANNELS, 4, 5, generator=g, dtype=torch.float64)
    weight = torch.randn(4, CHANNELS, generator=g, dtype=torch.float64)
    boxes, labels = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)
    outside = models.outside_boxes([boxes], size)[0, 0] == 1
    up = models.Upsampled(features, size, canvas)
    dense = F.interpolate(features[None], canvas, mode="bilinear", align_corners=True)[0, :, :HEIGHT, :WIDTH]
    return up, dense, weight, boxes, labels, outside


def literal_attention(dense, weight, outside, use_u0):
    known = [(y, x) for y in range(HEIGHT) for x in range(WIDTH) if outside[y, x]]
    attention = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    if use_u0 and known:
        q = sum(dense[:, y, x] for y, x in known) / len(known)
        value = lambda y, x: max(0.0, (dense[:, y, x] @ q / (dense[:, y, x].norm() * q.norm())).item())  # noqa: E731
    else:
        cam = [[max(0.0, (dense[:, y, x] @ weight[0]).item()) for x in range(WIDTH)] for y in range(HEIGHT)]
        highest = max(map(max, cam))
        value = lambda y, x: cam[y][x] / highest  # noqa: E731
    for y in range(HEIGHT):
        for x in range(WIDTH):
            attention[y, x] = value(y, x)
    return attention


def literal_maps(dense, weight, boxes, labels, per_box):
    classes = sorted(set(labels.tolist()))
    maps = torch.zeros(len(classes), HEIGHT, WIDTH, dtype=torch.float64)
    for k, c in enumerate(classes):
        pixels = [[(y, x) for y in range(int(y0), int(y1)) for x in range(int(x0), int(x1))]
                  for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()) if label == c]
        if not per_box:
            pixels = [sum(pixels, [])]
        for group in pixels:
            cam = {p: max(0.0, (dense[:, p[0], p[1]] @ weight[c]).item()) for p in group}
            for p, value in cam.items():
                maps[(k, *p)] = value / (max(cam.values()) or 1)  # a later box's stand
    return maps


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("use_u0", [True, False])
def test_background_attention(seed, use_u0):
    up, dense, weight, _, _, outside = scene(seed)
    attention = make_labels.background_attention(up, weight, outside, settings.MakeLabels(u0=use_u0))
    expected = literal_attention(dense, weight, outside, use_u0)
    torch.testing.assert_close(attention, expected, rtol=1e-5, atol=1e-9)


def test_no_background_outside_uses_the_activation_map():
    up, dense, weight, _, _, outside = scene(0, boxes=((0, 0, WIDTH, HEIGHT),), labels=(1,))
    attention = make_labels.background_attention(up, weight, outside, settings.MakeLabels())
    expected = literal_attention(dense, weight, outside, False)
    torch.testing.assert_close(attention, expected, rtol=1e-5, atol=1e-9)


def test_no_activation_of_the_background_is_zero():
    up, _, weight, _, _, outside = scene(0, boxes=((0, 0, WIDTH, HEIGHT),), labels=(1,))
    assert not make_labels.background_attention(up, 0 * weight, outside, settings.MakeLabels()).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", ["box", "class"])
def test_activation_maps(seed, norm):
    up, dense, weight, boxes, labels, _ = scene(seed)
    maps = make_labels.activation_maps(up, weight, boxes, labels, [1, 2], settings.MakeLabels(cam_norm=norm))
    torch.testing.assert_close(maps, literal_maps(dense, weight, boxes, labels, norm == "box"), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("seed, highest_outside", [(1, False), (2, True)])
def test_unaries(seed, highest_outside):
    up, dense, weight, boxes, labels, outside = scene(seed)
    u0 = literal_attention(dense, weight, outside, True)
    assert (u0[outside].max() > u0[~outside].max()) == highest_outside
    maps = literal_maps(dense, weight, boxes, labels, True)
    result = make_labels.to_probabilities(u0, maps, outside, settings.MakeLabels(threshold=0.6))
    summed = make_labels.to_probabilities(u0, maps, outside, settings.MakeLabels(threshold=0.6, softmax=False))
    highest = max(u0[y, x].item() for y in range(HEIGHT) for x in range(WIDTH))  # also outside the boxes
    for y in range(HEIGHT):
        for x in range(WIDTH):
            if outside[y, x]:
                assert result[:, y, x].tolist() == [1, 0, 0] == summed[:, y, x].tolist()
                continue
            u = [u0[y, x].item() if u0[y, x] >= 0.6 * highest else 0.0, *maps[:, y, x].tolist()]
            total = sum(map(math.exp, u))
            assert result[:, y, x].tolist() == pytest.approx([math.exp(v) / total for v in u], rel=1e-5)
            if sum(u) > 0.01:
                assert summed[:, y, x].tolist() == pytest.approx([v / sum(u) for v in u], rel=1e-3, abs=1e-3)


def test_the_maximum_reaches_any_threshold():
    everywhere = torch.ones(2, 2)
    s = settings.MakeLabels(threshold=1.0)
    probabilities = make_labels.to_probabilities(everywhere, torch.zeros(1, 2, 2), everywhere < 0, s)
    assert probabilities[0].flatten().tolist() == pytest.approx([math.e / (math.e + 1)] * 4)


def softmax_by_hand(scores):
    shares = [math.exp(score) for score in scores]
    return [share / sum(shares) for share in shares]


@pytest.mark.parametrize("k, scale", [(0.5, 0), (0.5, 3.0), (0, 3.0), (-0.5, 3.0)])
def test_logits_as_unaries(k, scale):
    up, dense, weight, boxes, labels, outside = scene(1)
    own, s = make_labels.unions(boxes, labels, [1, 2], (HEIGHT, WIDTH)), settings.MakeLabels(
        logit_scale=k, logit_bias=2.0, cosine_scale=scale)
    maps = torch.einsum("kc,cyx->kyx", weight[:3], dense)
    result = make_labels.logit_probabilities(maps, own, up, s)
    a, prototypes = {}, [0, 0, 0]
    for y in range(HEIGHT):
        for x in range(WIDTH):
            inside = [any(c == label and x0 <= x < x1 and y0 <= y < y1 for (x0, y0, x1, y1), label in zip(
                boxes.tolist(), labels.tolist())) for c in (1, 2)]
            assert outside[y, x] != any(inside)
            a[y, x] = [k * (dense[:, y, x] @ weight[0]).item()] + [
                k * ((dense[:, y, x] @ weight[c]).item() + 2) if here else -math.inf
                for c, here in zip((1, 2), inside)]
            prototypes = [q + share * dense[:, y, x] for q, share in zip(prototypes, softmax_by_hand(a[y, x]))]
    for (y, x), scores in a.items():
        f = dense[:, y, x]
        cosines = [(f @ q / f.norm() / q.norm()).item() for q in prototypes]
        expected = softmax_by_hand([score + scale * cosine for score, cosine in zip(scores, cosines)])
        assert result[:, y, x].tolist() == pytest.approx(expected, rel=1e-6)


def test_logits_are_averaged_over_sizes():
    """Each size as of an image that was resized by itself."""
    torch.manual_seed(0)
    network = models.BoxClassifier(2, "vgg16_bn", width=0.0625).eval()
    image, w = torch.randint(0, 256, (3, 40, 57), dtype=torch.uint8), network.classifier.weight
    config = settings.read("make_labels", [])
    config.device, expected = torch.device("cpu"), 0
    with torch.inference_mode():
        up = make_labels.upsampled(config, network, image)
        found = make_labels.logits(config, network, image, up, w, [1, 1.5])
        for height, width in ((40, 57), (60, 86)):
            view = F.interpolate(image[None] / 255, (height, width), mode="bilinear")
            features = network.features(view)
            size = models.padded_size((height, width))
            dense = F.interpolate(features, size, mode="bilinear", align_corners=True)[0, :, :height, :width]
            maps = torch.einsum("kc,cyx->kyx", w, dense)
            expected = expected + F.interpolate(maps[None], (40, 57), mode="bilinear")[0] / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.std() > 0


def labels_of(marginals, up, boxes, labels, weight):
    """Ycrf and Yret."""
    classes = sorted(set(labels.tolist()))
    own = make_labels.unions(boxes, labels, classes, (HEIGHT, WIDTH))
    u = make_labels.Unaries(up, classes, own, None, None, None)
    before = marginals.clone()
    y_crf = make_labels.label_by_crf(marginals.numpy(), u)
    assert marginals.equal(before)
    return y_crf, make_labels.label_by_prototypes(y_crf, u, weight)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("missing", [False, True])
def test_retrieval(seed, missing):
    """Random marginals' Ycrf and Yret; or those of a CRF that leaves the second class nothing."""
    up, dense, weight, boxes, labels, outside = scene(seed, labels=(3, 1, 3))
    marginals = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    marginals[:, outside] = torch.tensor([1.0, 0, 0])[:, None]
    marginals[2] *= not missing
    got = labels_of(marginals, up, boxes, labels, weight)
    pixels = [(y, x) for y in range(HEIGHT) for x in range(WIDTH)]
    own = {p: {c for (x0, y0, x1, y1), c in zip(boxes.tolist(), labels.tolist())
               if y0 <= p[0] < y1 and x0 <= p[1] < x1} for p in pixels}
    channel, prototypes = {0: 0, 1: 1, 3: 2}, {}
    y_crf = {p: max({0, *own[p]}, key=lambda c: marginals[(channel[c], *p)]) for p in pixels}
    for c in channel:
        members = [dense[:, y, x] for y, x in pixels if y_crf[y, x] == c]
        prototypes[c] = sum(members) / len(members) if members else weight[c]
    for y, x in pixels:
        allowed = {0, *own[y, x]}
        cosines = {c: max(0.0, F.cosine_similarity(dense[:, y, x], prototypes[c], dim=0).item()) for c in allowed}
        assert got[0][y, x] == y_crf[y, x] and got[1][y, x] == max(sorted(allowed), key=cosines.get)


def test_labels_stay_inside_their_boxes():
    up, _, weight, boxes, labels, outside = scene(0)

    marginals = torch.full((3, HEIGHT, WIDTH), 0.1)
    marginals[1] = 0.8  # class 1 everywhere
    y_crf, y_ret = (y.numpy() for y in labels_of(marginals, up, boxes, labels, weight))
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[5:19, 10:28] = True  # the one box of class 1
    assert ((y_crf == 1) == inside).all()
    assert not (y_ret == 1)[~inside].any()
    assert (y_ret[outside.numpy()] == 0).all()


def test_labels_of_boxes_put_the_smaller_box_on_top():
    boxes, labels = torch.tensor([[0., 0, 4, 4], [1, 1, 3, 3], [3, 0, 6, 2]]), torch.tensor([1, 2, 3])
    expected = [[1, 1, 1, 3, 3, 3], [1, 2, 2, 3, 3, 3], [1, 2, 2, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert make_labels.label_by_boxes(boxes, labels, (4, 6)).tolist() == expected


def test_labels_of_boxes_hold_each_pixel_that_a_box_touches():
    found = make_labels.label_by_boxes(torch.tensor([[0.6, 1.2, 2.4, 2.3]]), torch.tensor([2]), (4, 4))
    assert found.tolist() == [[0] * 4, [2, 2, 2, 0], [2, 2, 2, 0], [0] * 4]


def test_no_boxes():
    up, _, weight, boxes, labels, outside = scene(0, boxes=(), labels=())
    s = settings.MakeLabels()
    u0 = make_labels.background_attention(up, weight, outside, s)
    maps = make_labels.activation_maps(up, weight, boxes, labels, [], s)
    assert make_labels.to_probabilities(u0, maps, outside, s).eq(1).all()
