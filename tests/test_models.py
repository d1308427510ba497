"""models.py: pooling and upsampling against the equations in reference.py, and the networks' facts."""
import copy
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from urllib.error import URLError

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, SHARED
from PIL import Image
from torch import nn
from torchvision.tv_tensors import BoundingBoxes

import models
from models import BAP, BoxClassifier, DeepLab, Upsampled, WeightsError, outside_boxes

# map size, image size; the two differ by no round factor, or one side has a single cell
SIZES = [((7, 9), (53, 70)), ((5, 6), (5, 6)), ((1, 9), (7, 70)), ((6, 1), (40, 8)), ((9, 9), (65, 65))]


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    scale = theirs.abs().max().item() if theirs.numel() else 1.0
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * scale)


def random_features(N, C, h, w, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, C, h, w, generator=g, dtype=torch.float64) + 0.5


def random_boxes(counts, image_size, seed=0):
    """Boxes of any size and place, some reaching beyond the image."""
    g, (H, W) = torch.Generator().manual_seed(seed), image_size
    boxes = []
    for count in counts:
        centre = torch.rand(count, 2, generator=g) * torch.tensor([W, H])
        half = (torch.rand(count, 2, generator=g) * 0.3 + 0.02) * torch.tensor([W, H])
        boxes.append(torch.cat([centre - half, centre + half], 1))
    return boxes


DOUBLE_AND_FLOAT = (torch.float64, 1e-10), (torch.float32, 1e-4)  # with the tolerance of each


def same_pooling(features, boxes, image_size, background=None, under=lambda bap: bap, dtypes=DOUBLE_AND_FLOAT,
                 **settings):
    """Outputs, and the gradients of a random weighted sum of them, equal the reference's. `under`: what BAP is
    called through.
    """
    features.requires_grad_()
    expected = reference.bap(features, boxes, image_size, background, **settings)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=g, dtype=torch.float64) for out in expected]

    def gradient(pooled, features):
        total = sum((out * weight.to(out)).sum() for out, weight in zip(pooled, weights))
        return torch.autograd.grad(total + 0 * features.sum(), features)[0]

    theirs = gradient(expected, features)
    for dtype, tolerance in dtypes:
        f = features.detach().to(dtype).requires_grad_()
        pooled = under(BAP(**settings))(f, [b.to(dtype) for b in boxes], image_size, background)
        for name, out in zip(("foreground", "queries", "attention"), expected):
            assert getattr(pooled, name).dtype == dtype
            close(getattr(pooled, name).detach(), out.detach(), tolerance)
        close(gradient(pooled, f), theirs, tolerance)


# ---- BAP against the equations ----

@pytest.mark.parametrize("grid", [1, 3, 4, 5])
@pytest.mark.parametrize("map_size, image_size", SIZES)
def test_bap_equals_the_equations(map_size, image_size, grid):
    same_pooling(random_features(2, 4, *map_size), random_boxes((3, 1), image_size), image_size, grid=grid)


@pytest.mark.parametrize("bins", [1, 2, 3])
@pytest.mark.parametrize("counts", [(0,), (0, 0), (2, 0, 4), (7,)])
def test_bap_counts_and_bins(counts, bins):
    boxes = random_boxes(counts, (41, 50), seed=3)
    same_pooling(random_features(len(counts), 3, 6, 7), boxes, (41, 50), bins=bins)


@pytest.mark.parametrize("box", [
    (0, 0, 50, 41),  # the whole image
    (-9.5, -3, 70, 60),  # more than that
    (10, 5, 11, 30), (10.3, 5, 11.3, 6), (10.2, 5.4, 10.4, 5.6),  # a pixel wide; a pixel; less
    (0, 0, 50, 30), (0, 20, 25, 41), (-5, -5, 3.25, 2.5), (44, 38, 90, 50),  # at the edges
], ids=str)
def test_bap_box(box):
    same_pooling(random_features(1, 3, 6, 7), [torch.tensor([box], dtype=torch.float64)], (41, 50))


@pytest.mark.parametrize("box", [
    (10, -9, 20, -2), (10, -9, 20, 0), (10, 43, 20, 60), (-9, 10, -2, 20), (-9, 10, 0, 20), (52, 10, 60, 20)], ids=str)
def test_a_box_beside_the_image_touches_no_pixel(box):
    assert outside_boxes([torch.tensor([box]).float()], (41, 50)).all()


def test_box_slices_by_hand():
    """From the first pixel touched to the one behind the last."""
    cases = {(0, 0, 1, 1): (0, 1, 0, 1), (2.5, 3.0, 4.0, 5.1): (3, 6, 2, 4),
             (-3, -2.5, 4.2, 0.5): (0, 1, 0, 5), (2, -9, 3, -2): (0, 0, 2, 3)}
    for box, sides in cases.items():
        rows, columns = models.box_slices(box)
        assert (rows.start, rows.stop, columns.start, columns.stop) == sides


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_bap_background_with_padding(dtype):
    """Padding is not background: a frame of zeros outside the boxes too."""
    boxes = random_boxes((3, 1), (41, 50), seed=1)
    background = torch.stack([reference.outside_boxes(b, (41, 50)) for b in boxes])[:, None]
    background[..., 33:, :] = background[..., 44:] = 0
    same_pooling(random_features(2, 3, 6, 7), boxes, (41, 50), background.to(dtype))


def test_bap_background_in_boxes_and_nowhere():
    boxes = random_boxes((2, 2, 2), (41, 50))
    background = (torch.rand(3, 1, 41, 50, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    background[1] = 0
    background[2] = 1  # keep is 0 everywhere: plain pooling of every part
    same_pooling(random_features(3, 3, 6, 7), boxes, (41, 50), background)


def test_bap_zero_features():
    """ReLU leaves cells, and queries, of zeros: their cosine is 0, and no gradient is NaN."""
    features = random_features(2, 3, 6, 7)
    features[0, :, 1:4, 2:5] = 0
    features[1, :, :, :3] = 0
    boxes = [torch.tensor([[8.0, 4, 40, 33]]), torch.tensor([[20.0, 8, 44, 30]])]
    same_pooling(features, boxes, (41, 50))


def test_bap_tiny_box_beside_a_large_one():
    """Whether a part is background all through is asked of it alone. The tiny box lies on the edge of two cells."""
    boxes = [torch.tensor([[2.0, 2, 45, 38], [12.65, 10, 12.85, 10.2]])]
    same_pooling(random_features(1, 3, 6, 7), boxes, (41, 50), bins=1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_bap_boxes_of_another_type(dtype):
    features, box = random_features(1, 3, 6, 7), torch.tensor([[8, 4, 40, 33]])
    pooled, expected = BAP()(features.float(), [box.to(dtype)], (41, 50)), reference.bap(features, [box], (41, 50))
    for ours, theirs in zip(pooled, expected):
        assert ours.dtype == torch.float32
        close(ours, theirs, 1e-4)


def test_bap_no_boxes_and_zero_features():
    features = torch.zeros(2, 3, 6, 7, requires_grad=True)
    BAP()(features, random_boxes((0, 0), (41, 50)), (41, 50)).foreground.sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("min_background", [0.0, 0.2, 0.6])
def test_bap_min_background(min_background):
    """Backgrounds of 73 %, 44 % and 10 %."""
    boxes = [torch.tensor([[0.0, 0, 50, height]]) for height in (11, 23, 37)]
    same_pooling(random_features(3, 3, 6, 7), boxes, (41, 50), min_background=min_background)


def test_bap_share_of_exactly_min_background_is_pooled_plainly():
    features, box = random_features(1, 3, 8, 8), torch.tensor([[0.0, 0, 8, 7]])  # 1/8 background
    same_pooling(features, [box], (8, 8), min_background=0.125)
    features = features.detach()
    plain, aware = (bap(features, [box], (8, 8)) for bap in (BAP(), BAP(min_background=0.124)))
    assert torch.equal(plain.attention, reference.outside_boxes(box, (8, 8))[None, None])
    assert (aware.attention[0, 0, :7] > 0).any()
    close(plain.queries, aware.queries)


@pytest.mark.parametrize("mean_of_keep, expected", [(0.5e-4, 1 / 2), (2e-4, 1)])
def test_bap_part_that_looks_like_the_background_is_pooled_plainly(mean_of_keep, expected):
    """Half of a large box is background to the last digit, the other half differs by e: 1 - A is about e^2 / 2. Up to
    1e-4 on average the box's feature is the mean of both halves, beyond it is that of the other half."""
    e = 2 * mean_of_keep ** 0.5
    features = torch.tensor([1.0, 0], dtype=torch.float64).view(1, 2, 1, 1).repeat(1, 1, 8, 8)
    features[0, 1, :6, ::2] = e
    pooled = BAP(grid=1, bins=1)(features, [torch.tensor([[0.0, 0, 8, 6]])], (8, 8))
    assert (1 - pooled.attention[0, 0, :6]).mean().item() == pytest.approx(mean_of_keep, rel=1e-2)
    assert pooled.foreground.flatten().tolist() == pytest.approx([1, expected * e])


def test_bap_that_is_not_aware_is_average_pooling():
    features, boxes = random_features(2, 3, 6, 7), random_boxes((3, 2), (41, 50))
    pooled = BAP(bins=1, aware=False)(features, boxes, (41, 50))
    means = [reference.weighted_mean(f, reference.box_weights(box, (6, 7), (41, 50)))
             for f, image in zip(features, boxes) for box in image.tolist()]
    close(pooled.foreground, torch.stack(means)[:, None])
    assert len(pooled.queries) > 0


def test_bap_gradcheck():
    boxes = random_boxes((2, 1), (17, 25))
    features = random_features(2, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: tuple(BAP(grid=2)(f, boxes, (17, 25))), features)


def test_bap_images_do_not_influence_each_other():
    boxes = random_boxes((2, 0, 4, 1), (41, 50), seed=5)
    features, bap = random_features(4, 3, 6, 7), BAP()
    alone = [bap(f[None], [b], (41, 50)) for f, b in zip(features, boxes)]
    for together, parts in zip(bap(features, boxes, (41, 50)), zip(*alone)):
        close(together, torch.cat(parts), 1e-12)


def test_bap_order_of_boxes():
    features, (boxes,) = random_features(1, 3, 6, 7), random_boxes((5,), (41, 50))
    forth, back = (BAP()(features, [b], (41, 50)) for b in (boxes, boxes.flip(0)))
    close(forth.foreground, back.foreground.flip(0), 1e-12)
    close(forth.attention, back.attention, 1e-12)


@pytest.mark.parametrize("shape", [(2, 41, 50), (1, 1, 41, 50), (2, 3, 41, 50), (2, 1, 50, 41), (2, 1, 6, 7)])
def test_bap_needs_a_background_of_the_images_size(shape):
    with pytest.raises(ValueError) as error:
        BAP()(random_features(2, 3, 6, 7), random_boxes((1, 1), (41, 50)), (41, 50), torch.ones(shape))
    assert str(error.value) == f"background is {shape}, not (2, 1, 41, 50)"


@pytest.mark.parametrize("count", [1, 3])
def test_bap_needs_one_list_of_boxes_an_image(count):
    with pytest.raises(ValueError, match=f"^2 images but boxes of {count}$"):
        BAP()(random_features(2, 3, 6, 7), random_boxes((1,) * count, (41, 50)), (41, 50))


def test_bap_refuses_an_image_size_of_one_number():
    with pytest.raises(TypeError, match=r"^image_size is 50, not \(H, W\)$"):
        BAP()(random_features(1, 3, 6, 7), random_boxes((1,), (41, 50)), 50)


@pytest.mark.parametrize("wrong", [(30.0, 4.0, 10.0, 20.0), (3.0, 20.0, 10.0, 4.0)])
@pytest.mark.parametrize("background", [None, torch.ones(1, 1, 41, 50)])
def test_bap_refuses_boxes_the_wrong_way_round(wrong, background):
    boxes = [torch.tensor([(3.0, 4, 3, 20), wrong])]  # the first is empty
    with pytest.raises(ValueError) as error:
        BAP()(random_features(1, 3, 6, 7), boxes, (41, 50), background)
    assert str(error.value) == f"box {list(wrong)} has x1 < x0 or y1 < y0"
    BAP()(random_features(1, 3, 6, 7), [boxes[0][:1]], (41, 50), background)


@pytest.mark.parametrize("shape", [(0,), (4,), (2, 5), (2, 1, 4)])
def test_bap_refuses_boxes_of_another_shape(shape):
    with pytest.raises(ValueError, match=rf"^boxes are {re.escape(str(shape))}, not \(K, 4\)"):
        BAP()(random_features(1, 3, 5, 5), [torch.zeros(shape)], (40, 40))


def test_bap_takes_boxes_of_torchvision_in_xyxy_alone():
    features, box = random_features(1, 3, 6, 7), [[8.0, 4, 40, 33]]
    for name in ("XYWH", "CXCYWH"):
        boxes = BoundingBoxes(box, format=name, canvas_size=(41, 50))
        with pytest.raises(ValueError, match=f"^boxes are {name}, not XYXY$"):
            BAP()(features, [boxes], (41, 50))
    boxes = BoundingBoxes(box, format="XYXY", canvas_size=(41, 50))
    expected = reference.bap(features, [torch.tensor(box)], (41, 50))
    for ours, theirs in zip(BAP()(features, [boxes], (41, 50)), expected):
        close(ours, theirs)


def test_bap_holds_nothing():
    assert not list(BAP().parameters()) and not BAP().state_dict()


# ---- BAP by hand ----

def test_bap_by_hand():
    """A map of 1 x 4 cells, a pixel each; the box covers the middle two."""
    features = torch.tensor([[1.0, 0], [2, 0], [3, 4], [1, 0]]).T.reshape(1, 2, 1, 4)
    pooled = BAP(grid=1, bins=1)(features, [torch.tensor([[1.0, 0, 3, 1]])], (1, 4))
    assert pooled.queries.tolist() == [[1, 0]]
    torch.testing.assert_close(pooled.attention.flatten(), torch.tensor([1, 1, 0.6, 1]))
    torch.testing.assert_close(pooled.foreground, torch.tensor([[[3.0, 4]]]))


def test_bap_part_of_a_cell():
    """Two cells along 3 pixels, [0, 1.5] and [1.5, 3]: the box [0, 2] covers one and a third of the other."""
    features = torch.tensor([[[[0.0, 4]]]])
    pooled = BAP(bins=1, aware=False)(features, [torch.tensor([[0.0, 0, 2, 1]])], (1, 3))
    assert pooled.foreground.item() == pytest.approx(1.0)
    torch.testing.assert_close(pooled.attention.flatten(), torch.tensor([0, 2 / 3]))


def test_bap_bins_and_queries_go_row_by_row():
    features = torch.arange(16.0).reshape(1, 1, 4, 4)
    pooled = BAP(grid=2, bins=2)(features, [torch.tensor([[0.0, 0, 2, 2]])], (4, 4))
    assert pooled.queries.flatten().tolist() == [4.5, 10.5, 12.5]
    pooled = BAP(bins=2, aware=False)(features, [torch.tensor([[0.0, 0, 2, 2]])], (4, 4))
    assert pooled.foreground.flatten().tolist() == [0, 1, 4, 5]


def test_bap_grid_divides_the_feature_map():
    """A 4 x 4 map of 25 x 25 pixels, whose border cells are half as large: the four cells left of the box are the
    queries, each as it is, though parts of the image of a quarter each would cut into them."""
    features = random_features(1, 3, 4, 4)
    pooled = BAP()(features, [torch.tensor([[4.5, 0, 25, 25]])], (25, 25), torch.ones(1, 1, 25, 25).index_fill(
        3, torch.arange(4, 25), 0))
    close(pooled.queries, features[0, :, :, 0].T)


def test_bap_grid_cell_across_an_edge_counts_in_its_two_parts():
    """Three cells in two parts: the middle one is half in each."""
    features = torch.tensor([[[[3.0, 6, 12]]]])
    pooled = BAP(grid=2)(features, [torch.zeros(0, 4)], (1, 3))
    torch.testing.assert_close(pooled.queries.flatten(), torch.tensor([4.0, 10, 4, 10]))


def test_bap_finds_the_object():
    """An object in a box larger than it: what looks like the background outside is left out."""
    background, object_ = torch.tensor([2.0, 0, 1]), torch.tensor([-1.0, 5, 2])  # cosine 0
    features = background[None, :, None, None].repeat(1, 1, 12, 12)
    features[:, :, 4:8, 3:9] = object_[:, None, None]
    box = torch.tensor([[2.0, 2, 11, 10]])
    pooled = BAP()(features, [box], (12, 12))
    torch.testing.assert_close(pooled.foreground, object_.expand(1, 4, 3))
    torch.testing.assert_close(pooled.queries, background.expand(len(pooled.queries), 3))
    plain = BAP(aware=False)(features, [box], (12, 12))
    assert (plain.foreground - object_).abs().amax(2).min() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bap_of_constant_features_is_that_constant(dtype):
    """A = 1 in boxes too, up to rounding: nothing is kept, and no noise is weighed."""
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        constant = torch.randn(3, generator=g, dtype=torch.float64).to(dtype)
        features = constant[None, :, None, None].repeat(1, 1, 6, 7).requires_grad_()
        pooled = BAP()(features, random_boxes((3,), (41, 50)), (41, 50))
        torch.testing.assert_close(pooled.foreground, constant.expand(3, 4, 3), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pooled.attention, torch.ones(1, 1, 6, 7, dtype=dtype))
        pooled.foreground.sum().backward()
        assert features.grad.isfinite().all()


def test_bap_attention_is_at_most_1():
    """Of constant features rounding takes some cosines beyond it."""
    features = torch.randn(40, 64, 1, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 6, 7)
    assert BAP()(features, [torch.tensor([[8.0, 4, 40, 33]])] * 40, (41, 50)).attention.max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid, size", [(3, 6), (3, 9), (4, 12), (5, 15), (6, 42), (7, 49)])
def test_bap_grid_cells_that_end_on_cell_edges(grid, size, dtype):
    """Background in one grid cell gives one query: rounding lends its neighbours no sliver of it."""
    features, step = random_features(1, 3, size, size).to(dtype), size // grid
    for g in range(grid):
        background = torch.zeros(1, 1, size, size)
        background[..., step * g:step * (g + 1), step * (grid - 1 - g):step * (grid - g)] = 1
        pooled = BAP(grid=grid, min_background=0.0)(features, [torch.zeros(0, 4)], (size, size), background)
        expected = features[0][:, background[0, 0] > 0].mean(1)
        torch.testing.assert_close(pooled.queries, expected[None])


# ---- BAP under PyTorch's tools ----

FLOAT = DOUBLE_AND_FLOAT[1:]


def pooling_case(counts=(2, 0, 1), seed=0):
    """features, boxes, image_size, background; as in training, parts of the outside are not background."""
    boxes = random_boxes(counts, (41, 50), seed)
    background = torch.stack([reference.outside_boxes(b, (41, 50)) for b in boxes])[:, None]
    background[..., 33:, :] = 0
    return random_features(len(counts), 3, 6, 7, seed), boxes, (41, 50), background.float()


def test_bap_compiles_to_one_graph():
    same_pooling(*pooling_case(), under=partial(torch.compile, fullgraph=True), dtypes=FLOAT)


def test_bap_compiled_takes_any_counts_of_boxes():
    """Traced again where it must be; the backend that runs the traced operations as they are is quick."""
    compiled = torch.compile(BAP(), fullgraph=True, backend="eager")
    for seed, counts in enumerate([(1, 2), (2, 1), (3, 1), (0, 0), (0, 4)]):
        same_pooling(*pooling_case(counts, seed), under=lambda bap: compiled, dtypes=FLOAT)


def test_bap_compiles_without_background():
    features, boxes, image_size, _ = pooling_case()
    same_pooling(features, boxes, image_size, under=partial(torch.compile, backend="eager"), dtypes=FLOAT)


@pytest.mark.parametrize("strict", [False, True])
def test_bap_exports(strict):
    """What is exported with some numbers holds for others: boxes, features, background and the count of queries."""
    example, case = pooling_case(seed=1), pooling_case(seed=2)
    example[3][0] = 0  # no query of this image
    example = example[0].float(), *example[1:]
    same_pooling(*case, under=lambda bap: torch.export.export(bap, example, strict=strict).module(), dtypes=FLOAT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bap_under_autocast_is_the_same(dtype):
    """Half precision is only the features', as a network under autocast gives them: results have float32's."""
    features, boxes, image_size, background = pooling_case()
    features = features.to(dtype).double()
    same_pooling(features, boxes, image_size, background, under=torch.autocast("cpu", torch.bfloat16), dtypes=FLOAT)
    half = features.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = BAP()(half, boxes, image_size, background)
    expected = reference.bap(features, boxes, image_size, background)
    for ours, theirs in zip(pooled, expected):
        assert ours.dtype == torch.float32
        close(ours.detach(), theirs.detach(), 1e-4)
    gradients = [torch.autograd.grad(sum(out.square().sum() for out in outputs), f)[0]
                 for outputs, f in ((pooled, half), (expected, features))]
    close(*gradients, 1e-4 if dtype == torch.float32 else 2 ** -7)  # rounded once to bfloat16


def test_bap_channels_last():
    features, *case = pooling_case()
    same_pooling(features.to(memory_format=torch.channels_last), *case)


# ---- features looked at in the image's size ----

# map size, size, canvas
LOOKS = [((4, 5), (13, 17), None), ((4, 5), (11, 15), (16, 20)), ((4, 5), (1, 1), (13, 17)),
         ((1, 5), (3, 17), None), ((4, 1), (9, 4), (13, 8)), ((1, 1), (5, 6), None),
         ((5, 6), (5, 6), None), ((9, 8), (5, 6), None)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("map_size, size, canvas", LOOKS)
def test_upsampled_equals_interpolation(map_size, size, canvas, dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    features = random_features(1, 6, *map_size)[0]
    vectors = torch.randn(3, 6, generator=g, dtype=torch.float64).to(dtype)
    vectors[1] = 0
    masks = torch.rand(4, *size, generator=g) < 0.4
    masks[2], masks[3] = 0, 1
    look = Upsampled(features.to(dtype), size, canvas) if canvas else Upsampled(features.to(dtype), size)
    close(look.dot(vectors), reference.upsampled_dot(features, vectors, size, canvas), tolerance)
    close(look.norm, reference.upsampled_norm(features, size, canvas), tolerance)
    close(look.cosine(vectors), reference.upsampled_cosine(features, vectors, size, canvas), tolerance)
    for mask_dtype in (torch.bool, torch.uint8, dtype):
        means = reference.upsampled_mean(features, masks, size, canvas)
        close(look.mean(masks.to(mask_dtype)), means, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_upsampled_of_half_precision(dtype):
    """Its own rounding is all that differs: neither sums over the image nor coordinates are rounded to 16 bits."""
    features, size = random_features(1, 6, 10, 20)[0].to(dtype), (300, 600)
    look, masks = Upsampled(features, size), torch.ones(1, *size, dtype=torch.bool)
    vectors = random_features(1, 6, 1, 2)[0].flatten(1).T.to(dtype)
    close(look.norm, reference.upsampled_norm(features.double(), size), 1e-4)
    close(look.dot(vectors), reference.upsampled_dot(features.double(), vectors.double(), size), 1e-4)
    close(look.mean(masks), reference.upsampled_mean(features.double(), masks, size), 1e-4)


def test_upsampled_mean_of_weights():
    features, size = random_features(1, 6, 4, 5)[0], (13, 17)
    weights = torch.rand(2, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = reference.upsampled(features, size)
    expected = torch.stack([(w * dense).sum((1, 2)) / w.sum() for w in weights])
    close(Upsampled(features, size).mean(weights), expected)


def test_upsampled_of_zeros():
    features = random_features(1, 6, 4, 5)[0]
    features[:, :, 2:] = 0
    vectors = random_features(1, 6, 1, 2)[0].flatten(1).T
    look = Upsampled(features, (13, 17))
    close(look.cosine(vectors), reference.upsampled_cosine(features, vectors, (13, 17)))
    assert not look.cosine(vectors)[:, :, 8:].any() and not look.norm[:, 8:].any()


def test_upsampled_norm_where_neighbours_cancel():
    """Halfway from f to -f the feature is zero; rounding must leave no NaN."""
    f = random_features(1, 64, 1, 1)[0].float()
    features = torch.cat([f, -f, f, -f], 2).repeat(1, 3, 1)
    look = Upsampled(features, (9, 13))
    assert look.norm.isfinite().all() and look.norm.min() < 1e-2
    cosine = look.cosine(f.reshape(1, -1))
    assert cosine.isfinite().all() and cosine.abs().max() <= 1 + 1e-4


# ---- networks ----

def small(model=DeepLab, labels=5, **settings):
    torch.manual_seed(0)
    return model(labels, **dict(dict(backbone="vgg16", width=0.125, weights="none"), **settings)).eval()


def random_images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_vgg16_is_largefov():
    for build, labels, rate in (BoxClassifier, 20, 1), (DeepLab, 21, 12):
        with torch.device("meta"):
            model = build(labels)
        layers = list(model.backbone.features)
        convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
        assert [m.out_channels for m in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
        assert [m.dilation[0] for m in convolutions] == [1] * 10 + [2] * 3
        pools = [m for m in layers if isinstance(m, nn.MaxPool2d)]
        assert [(m.kernel_size, m.stride) for m in pools] == [(3, 2)] * 3 + [(3, 1)] * 2
        assert isinstance(layers[-1], nn.AvgPool2d) and (layers[-1].kernel_size, layers[-1].stride) == (3, 1)
        fc6, fc7 = model.backbone.fc6, model.backbone.fc7
        assert fc6.weight.shape == (1024, 512, 3, 3) and fc6.dilation == fc6.padding == (rate, rate)
        assert fc7.weight.shape == (1024, 1024, 1, 1)
        assert any(isinstance(m, nn.Dropout2d) and m.p == 0.5 for m in model.modules())
        assert model.classifier.weight.shape[:2] == (21, 1024) and model.classifier.bias is None


def test_vgg16_drops_whole_channels_after_fc6_and_fc7():
    model, seen = small(width=0.5), {}
    model.backbone.fc7.register_forward_pre_hook(lambda _, x: seen.update(fc6=x[0]))
    seen["fc7"] = model.train().features(random_images(1, 3, 65, 65))
    for x in seen.values():
        dead = (x == 0).flatten(2).all(2).float().mean()
        assert 0.4 < dead < 0.8


def test_resnet_is_deeplab_v2():
    model = DeepLab(21, backbone="resnet50", weights="none")
    for name, dilation in (("layer3", 2), ("layer4", 4)):
        first, *blocks = getattr(model.backbone, name)
        assert all(block.conv2.dilation == (dilation, dilation) for block in blocks)
        assert first.conv2.stride == first.downsample[0].stride == (1, 1)
    branches = list(model.head.branches)
    assert [b.dilation[0] for b in branches] == [b.padding[0] for b in branches] == [6, 12, 18, 24]
    assert all(b.weight.shape == (256, 2048, 3, 3) and b.bias is None for b in branches)
    x = random_images(1, 2048, 5, 5)
    torch.testing.assert_close(model.head(x), sum(b(x) for b in branches).relu())


@pytest.mark.parametrize("model, backbone", [
    (BoxClassifier, "vgg16"), (DeepLab, "vgg16"), (DeepLab, "vgg16_bn"), (DeepLab, "resnet50"),
    (DeepLab, "resnet50_caffe"), (DeepLab, "timm/tf_efficientnet_lite0")])
def test_cell_j_lies_on_pixel_8j(model, backbone):
    """9 x 9 cells for 65 x 65 pixels; the mirrored network on the mirrored image gives the mirrored map."""
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    model = small(model, backbone=backbone, width=0.125 if backbone.startswith("vgg") else 1.0)
    images = random_images(1, 3, 65, 65)
    with torch.no_grad():
        forth = model.features(images)
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.copy_(parameter.flip(2, 3))
        back = model.features(images.flip(2, 3))
    assert forth.shape[2:] == (9, 9) and forth.std() > 0
    close(back.flip(2, 3), forth.double(), 1e-3)


@pytest.mark.parametrize("size", [(65, 65), (64, 66), (33, 50), (7, 1)])
def test_deeplab_gives_cosines_of_the_images_size(size):
    model, (H, W) = small(), size
    images = random_images(2, 3, H, W)
    with torch.no_grad():
        cosine, phi = model(images), model.features(images)
    assert cosine.shape == (2, 5, H, W) and cosine.abs().max() <= 1 + 1e-6
    # at pixels 8 j stand the cells' own cosines
    rows = model.classifier.weight.flatten(1)
    cells = torch.cosine_similarity(phi[:, None], rows[None, :, :, None, None], dim=2)
    h, w = cosine[..., ::8, ::8].shape[2:]
    torch.testing.assert_close(cosine[..., ::8, ::8], cells[..., :h, :w], rtol=1e-4, atol=1e-5)


def test_deeplab_pads_with_the_mean_colour_at_the_right_and_bottom():
    model, images = small(), random_images(2, 3, 40, 52)
    padded = model.mean.reshape(1, 3, 1, 1).repeat(2, 1, 41, 57)
    padded[..., :40, :52] = images
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(padded)[..., :40, :52], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_deeplab_where_a_feature_is_zero(dtype):
    """As after a ReLU: its cosines are 0, and not 0 / 0."""
    model = small().to(dtype)
    model.features = lambda images: torch.zeros(1, model.classifier.in_features, 5, 5, dtype=dtype)
    assert (model(torch.zeros(1, 3, 33, 33)) == 0).all()


def test_boxes_of_several_types():
    """An image without any may have an empty tensor of integers, which must not round the others'."""
    features, box = random_features(2, 3, 9, 9).float(), torch.tensor([[0.5, 0.5, 10.5, 10.5]])
    mixed = BAP()(features, [torch.zeros(0, 4, dtype=torch.int64), box], (65, 65))
    torch.testing.assert_close(mixed, BAP()(features, [torch.zeros(0, 4), box], (65, 65)))
    rounded = BAP()(features, [torch.zeros(0, 4), box.floor()], (65, 65))
    assert not torch.allclose(mixed.foreground, rounded.foreground)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_precisions_take_uint8(dtype):
    model, image = small(DeepLab, 3), torch.arange(3 * 33 * 33).view(1, 3, 33, 33).to(torch.uint8)
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(model.to(dtype)(image), expected, atol=0.05, rtol=0, check_dtype=False)


@pytest.mark.parametrize("model", [BoxClassifier, DeepLab])
def test_images_are_uint8_or_in_0_to_1(model):
    model = small(model)
    images = torch.randint(256, (1, 3, 33, 33), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    torch.testing.assert_close(model.features(images), model.features(images / 255))
    assert {"mean", "std"} <= dict(model.named_buffers()).keys()
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(model.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))


def test_box_classifier_pools_and_classifies():
    model, images = small(BoxClassifier, 20), random_images(2, 3, 65, 65)
    boxes = random_boxes((2, 1), (65, 65))
    scores, pooled = model(images, boxes), BAP()(model.features(images), boxes, (65, 65))
    assert scores.foreground.shape == (3, 4, 21) and scores.queries.shape[1] == 21
    rows = model.classifier.weight.flatten(1)
    torch.testing.assert_close(scores.foreground, pooled.foreground @ rows.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.queries, pooled.queries @ rows.T, rtol=1e-4, atol=1e-5)
    (scores.foreground.sum() + scores.queries.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    nothing = model(images, random_boxes((0, 0), (65, 65)))
    assert nothing.foreground.shape == (0, 4, 21) and len(nothing.queries) == 32


def test_box_classifier_pools_what_it_is_told_is_background():
    """Padding is none: below row 40 nothing is background, although no box lies there."""
    model, images, boxes = small(BoxClassifier, 3), random_images(1, 3, 65, 65), random_boxes((2,), (65, 65))
    background = outside_boxes(boxes, (65, 65))
    background[:, :, 40:] = 0
    with torch.no_grad():
        scores, features = model(images, boxes, background), model.features(images)
    expected, rows = reference.bap(features.double(), boxes, (65, 65), background), model.classifier.weight.detach()
    assert 0 < len(expected.queries) < 16
    close(scores.queries, expected.queries @ rows.double().T, 1e-4)
    close(scores.foreground, expected.foreground @ rows.double().T, 1e-4)


@pytest.mark.parametrize("size", [(64, 65), (65, 70)])
def test_box_classifier_refuses_crops_of_other_sides(size):
    with pytest.raises(ValueError, match=rf"^crops of \({size[0]}, {size[1]}\): each side must be 8 k \+ 1"):
        small(BoxClassifier, 3)(torch.zeros(1, 3, *size), random_boxes((1,), size))


# ---- weights ----

def random_state(name):
    """torchvision's network, random; each tensor is a strided look at few numbers: files stay small."""
    g = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = torchvision.models.get_model(name).state_dict()
    for key, value in state.items():
        if value.dim() == 0:
            state[key] = torch.zeros((), dtype=value.dtype)
            continue
        strides = [stride for stride, _ in zip((5, 3, 2, 1), value.shape)]
        count = 1 + sum(stride * (size - 1) for stride, size in zip(strides, value.shape))
        state[key] = (torch.rand(count, generator=g) / 100).as_strided(value.shape, strides)
    return state


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a state dict where torch.hub keeps what it downloads; there is no network."""
    def offline(url, *args, **kwargs):
        raise URLError("no network")

    def put(name, entry, state):
        url = torchvision.models.get_model_weights(name)[entry].url
        file = tmp_path / "hub/checkpoints" / url.split("/")[-1]
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    return put


def assert_vgg16_holds(model, state):
    for key, value in model.backbone.features.state_dict().items():
        assert torch.equal(value, state["features." + key])
    fc6, fc7 = model.backbone.fc6, model.backbone.fc7
    wide6, wide7 = state["classifier.0.weight"], state["classifier.3.weight"]
    for o, i, y, x in (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (999, 511, 2, 2):
        assert fc6.weight[o, i, y, x] == wide6[4 * o, i * 49 + 3 * y * 7 + 3 * x]
        assert fc7.weight[o, i, 0, 0] == wide7[4 * o, 4 * i]
    assert torch.equal(fc6.bias, state["classifier.0.bias"][::4])
    assert torch.equal(fc7.bias, state["classifier.3.bias"][::4])


def test_vgg16_imagenet(hub):
    state = random_state("vgg16")
    hub("vgg16", "IMAGENET1K_V1", state)
    assert_vgg16_holds(BoxClassifier(3, backbone="vgg16", weights="imagenet"), state)


def test_vgg16_from_a_file(tmp_path):
    state = random_state("vgg16")
    torch.save(state, tmp_path / "mine.pth")
    model = DeepLab(3, backbone="vgg16", weights=str(tmp_path / "mine.pth"))
    assert_vgg16_holds(model, state)
    groups = {(g["lr"], g["weight_decay"]): g["params"] for g in
              model.parameter_groups(1.0, 5e-4, double_bias=True)}
    assert {k: len(v) for k, v in groups.items()} == {(1.0, 5e-4): 15, (2.0, 0.0): 15, (10.0, 5e-4): 1}


CAFFE_LAYERS = [f"conv{block}_{i}" for block, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1)]


@pytest.mark.parametrize("fully", ["cut", "matrices", "kernels"])
def test_vgg16_in_caffes_names(tmp_path, fully):
    """conv1_1 ... fc7 for BGR: the first layer answers to a BGR image as the file's own kernel does."""
    state = random_state("vgg16")
    old = [name for name in state if name.startswith("features.") and name.endswith(".weight")]
    assert len(old) == len(CAFFE_LAYERS) == 13
    file = {}
    for ours, theirs in zip(old, CAFFE_LAYERS):
        file[f"{theirs}.weight"], file[f"{theirs}.bias"] = state[ours], state[ours.replace("weight", "bias")]
    for ours, theirs in (("classifier.0", "fc6"), ("classifier.3", "fc7")):
        weight, bias = state[f"{ours}.weight"], state[f"{ours}.bias"]
        if fully == "cut":
            weight = weight.view(4096, 512, 7, 7)[::4, :, ::3, ::3] if theirs == "fc6" else weight[::4, ::4, None, None]
            bias = bias[::4]
        elif fully == "kernels":
            weight = weight.view(4096, -1, 7, 7) if theirs == "fc6" else weight[:, :, None, None]
        file[f"{theirs}.weight"], file[f"{theirs}.bias"] = weight, bias
    file["fc8.weight"] = torch.zeros(1000, 4)
    torch.save(file, tmp_path / "vgg16_20M.pth")
    model = BoxClassifier(3, backbone="vgg16", weights=str(tmp_path / "vgg16_20M.pth"))
    for ours, theirs in list(zip(old, CAFFE_LAYERS))[1:]:
        assert torch.equal(model.backbone.state_dict()[ours], file[f"{theirs}.weight"])
    state["features.0.weight"] = state["features.0.weight"].flip(1)
    assert_vgg16_holds(model, state)

    image = torch.randint(0, 256, (1, 3, 9, 9), dtype=torch.uint8)
    bgr = image.flip(1).float() - torch.tensor([104.008, 116.669, 122.675])[:, None, None]
    expected = F.conv2d(bgr, file["conv1_1.weight"], file["conv1_1.bias"], padding=1)
    seen = model.backbone.features[0]((image / 255 - model.mean) / model.std)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-3)
    assert {g["lr"]: len(g["params"]) for g in model.parameter_groups(1.0, 0.0)} == {1.0: 30, 10.0: 1}


def test_caffes_names_with_other_shapes(tmp_path):
    torch.save({"conv1_1.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="odd.pth: .* not of the shapes of its names"):
        BoxClassifier(3, backbone="vgg16", weights=str(tmp_path / "odd.pth"))


def test_a_classifier_of_nan_is_refused(tmp_path):
    """torchvision's IMAGENET1K_FEATURES holds one."""
    state = random_state("vgg16")
    state["classifier.3.weight"] = torch.tensor(torch.nan).expand(4096, 4096)
    torch.save(state, tmp_path / "features.pth")
    with pytest.raises(WeightsError, match="features.pth: holds NaN in classifier.3.weight$"):
        DeepLab(3, weights=tmp_path / "features.pth")


@pytest.mark.parametrize("value, kind", [(torch.nan, "NaN"), (-torch.inf, "infinity")])
def test_a_checkpoint_with_nan_is_refused_and_names_the_tensor(tmp_path, value, kind):
    state = small().state_dict()
    state["backbone.fc6.bias"][3] = value
    torch.save(checkpoint(state), tmp_path / "seg.pt")
    message = f"seg.pt: holds {kind} in backbone.fc6.bias$"
    for read in (
            models.load,
            lambda path: models.state_of(models.read_file(path), path),
            lambda path: DeepLab(5, weights=path, width=0.125)):
        with pytest.raises(WeightsError, match=message):
            read(tmp_path / "seg.pt")


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), OSError(5, "I/O error"), MemoryError()])
def test_a_fault_of_the_machine_is_no_broken_file(tmp_path, monkeypatch, fault):
    def read_bytes(path):
        raise fault

    monkeypatch.setattr("pathlib.Path.read_bytes", read_bytes)
    with pytest.raises(type(fault)) as error:
        DeepLab(3, weights=tmp_path / "good.pth")
    assert error.value is fault


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_resnet_imagenet_and_its_frozen_batch_norm(hub, name):
    state = random_state(name)
    hub(name, "IMAGENET1K_V1", state)
    model = DeepLab(3, backbone=name, weights="imagenet")
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[key])
    for _ in range(2):
        assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        assert model.head.training
        model.eval().train()  # what is true at the start is true again


def test_timm_from_a_file():
    pytest.importorskip("timm")
    file = SHARED / "weights/tf_efficientnet_lite0.pth"
    if not file.is_file():
        pytest.skip("needs ../shared/weights/tf_efficientnet_lite0.pth")
    model, state = DeepLab(3, backbone="timm/tf_efficientnet_lite0", weights=str(file)), torch.load(file)
    held = model.backbone.state_dict()
    assert "conv_stem.weight" in held and len(held) > 200
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in held.items())
    assert model.mean.unique().tolist() == model.std.unique().tolist() == [0.5]
    assert model.eval()(random_images(1, 3, 50, 65)).shape == (1, 3, 50, 65)


@pytest.mark.parametrize("kernel, dilation, bias", [
    ((3, 3), (2, 2), False), ((5, 5), (2, 2), True), ((5, 5), (4, 4), False), ((1, 9), (1, 2), True)])
@pytest.mark.parametrize("training", [True, False])
def test_dilated_groups(kernel, dilation, bias, training):
    """It is nn.Conv2d, with its gradients."""
    torch.manual_seed(0)
    padding = [rate * (side // 2) for side, rate in zip(kernel, dilation)]
    plain = nn.Conv2d(6, 6, kernel, padding=padding, dilation=dilation, groups=6, bias=bias).double()
    ours = copy.deepcopy(plain).train(training)
    ours.__class__ = models.DilatedGroups
    x, weights = torch.randn(2, 2, 6, 9, 13).double()
    results = []
    for layer in (plain, ours):
        image = x.clone().requires_grad_()
        out = layer(image)
        (out * weights).sum().backward()
        results.append([out, image.grad, *(p.grad for p in layer.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backbone", ["timm/tf_efficientnet_lite0", "timm/regnety_002"])
def test_every_dilated_grouped_layer_of_timm_is_ours(backbone):
    pytest.importorskip("timm")
    network = DeepLab(3, backbone)
    dilated = [m for m in network.backbone.modules() if isinstance(m, nn.Conv2d) and m.groups > 1 and m.dilation[0] > 1]
    assert len(dilated) >= 7 and all(type(m) is models.DilatedGroups for m in dilated)


def test_so_is_every_one_of_a_backbone_that_somebody_adds(monkeypatch):
    """An own branch of build_backbone gets the same protection."""
    layers = [nn.Conv2d(3, 4, 1, 8), nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), nn.Conv2d(4, 4, 3, 1, 1)]
    module = nn.Sequential(*layers)
    module.channels = 4
    monkeypatch.setattr(models, "build_backbone", lambda *_: (module, models.IMAGENET, set()))
    assert [type(m) for m in DeepLab(3, "mine").backbone] == [nn.Conv2d, models.DilatedGroups, nn.Conv2d]


@pytest.mark.parametrize("options", [dict(padding="same"), dict(padding="valid"),
                                     dict(padding=6, padding_mode="reflect")])
def test_dilated_groups_of_any_padding(options):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 4, 3, dilation=6, groups=4, **options).eval()
    ours, x = copy.deepcopy(plain), torch.randn(1, 4, 17, 19)
    ours.__class__ = models.DilatedGroups
    torch.testing.assert_close(ours(x), plain(x))


BF16_GRADIENTS = """
import sys
import torch
from models import DeepLab

backbone, width = sys.argv[1], float(sys.argv[2])
torch.manual_seed(0)
network = DeepLab(3, backbone, width=width, dropout=0).to(memory_format=torch.channels_last)
network.freeze_norm = True
for module in network.train().modules():
    if isinstance(module, torch.nn.BatchNorm2d):  # timm starts a block's last one at 0
        torch.nn.init.ones_(module.weight)
images = torch.rand(1, 3, 225, 225).to(memory_format=torch.channels_last)
weights = torch.rand(1, 3, 225, 225)

def gradients(bf16):
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        cosine = network(images)
    (cosine * weights).sum().backward()
    return {name: p.grad.double().flatten() for name, p in network.named_parameters() if p.dim() == 4}

full, half = gradients(False), gradients(True)
for name, gradient in full.items():
    print(torch.cosine_similarity(gradient, half[name], dim=0).item(), name)
"""


@pytest.mark.parametrize("backbone, width", [
    ("vgg16", 0.25), ("resnet50", 1.0), ("timm/tf_efficientnet_lite0", 1.0), ("timm/regnety_002", 1.0)])
def test_gradients_in_bf16_read_no_memory_that_nobody_wrote(backbone, width):
    """glibc fills what it hands out with 3e38 here: a gradient that reads it is not that of float32, or not finite."""
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_PERTURB_": "128"}
    run = subprocess.run([sys.executable, "-c", BF16_GRADIENTS, backbone, str(width)], env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    far = [line for line in run.stdout.splitlines() if not float(line.split()[0]) > 0.6]
    assert len(run.stdout.splitlines()) > 10 and not far


def test_timm_whose_cells_lie_elsewhere():
    """Cell j of ConvNeXt sees pixels 8 j to 8 j + 7, and the last column of pixels is seen by none. ResNet-D has as
    many cells as it should, but averages 2 x 2 of them in its shortcuts, so that they lie some 5 pixels off."""
    pytest.importorskip("timm")
    for name in ("convnext_atto", "resnet26d"):
        with pytest.raises(WeightsError, match=f"timm/{name}: its cells do not lie on every eighth pixel"):
            DeepLab(3, backbone=f"timm/{name}")
    for name in ("vgg11", "densenet121"):  # one asserts a stride of 32, one knows no such argument
        with pytest.raises(WeightsError, match=f"timm/{name}: timm cannot make it with output_stride=8; choose"):
            DeepLab(3, backbone=f"timm/{name}", weights="none")
    network = DeepLab(3, backbone="timm/mobilenetv3_small_050")
    assert network.training and network.backbone.training
    assert network.features(torch.rand(2, 3, 65, 65)).shape[2:] == (9, 9)


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(WeightsError, match="pip install timm"):
        DeepLab(3, backbone="timm/tf_efficientnet_lite0", weights="none")


def test_what_timm_raises_is_the_users_fault_or_the_machines(monkeypatch):
    timm = pytest.importorskip("timm")

    def build(fault):
        def create_model(*args, **settings):
            raise fault

        monkeypatch.setattr(timm, "create_model", create_model)
        DeepLab(3, backbone="timm/tf_efficientnet_lite0")

    for fault in (RuntimeError("no such\n stride"), FileNotFoundError("no such\n hub"), AssertionError("no such")):
        with pytest.raises(WeightsError) as error:
            build(fault)
        one_line(error, "timm/tf_efficientnet_lite0: no such")
    with pytest.raises(WeightsError, match="timm/tf_efficientnet_lite0: timm cannot make it"):
        build(AssertionError())  # such as `assert output_stride == 32`
    with pytest.raises(OSError, match="No space left"):
        build(OSError(28, "No space left on device"))


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("backbone, other", [
    ("vgg16", "resnet50"), ("vgg16", "vgg16_bn"), ("vgg16_bn", "vgg16"), ("resnet50", "vgg16"),
    ("resnet50", "resnet101"), ("resnet101", "resnet50"), ("timm/tf_efficientnet_lite0", "resnet18")])
def test_file_of_another_network(tmp_path, backbone, other):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    torch.save(random_state(other), tmp_path / "other.pth")
    with pytest.raises(WeightsError) as error:
        DeepLab(3, backbone=backbone, weights=str(tmp_path / "other.pth"))
    one_line(error, "other.pth")


@pytest.mark.parametrize("backbone", ["vgg16", "resnet50", "timm/tf_efficientnet_lite0"])
def test_file_without_weights(tmp_path, backbone):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    files = {name: tmp_path / name for name in ("absent.pth", "text.pth", "list.pth", "nothing.pth")}
    files["text.pth"].write_text("not weights\n")
    torch.save([1, 2], files["list.pth"])
    torch.save({}, files["nothing.pth"])
    for name, file in files.items():
        with pytest.raises(WeightsError) as error:
            DeepLab(3, backbone=backbone, weights=str(file))
        one_line(error, name)


def test_weights_that_cannot_be_had(hub):
    for backbone, weights in [("vgg16", "imagenet"), ("resnet50", "imagenet"), ("vgg17", "none"),
                              ("resnet101_caffe", "imagenet"), ("vgg16_caffe", "none"),
                              ("resnet50", "caffe"), ("vgg16_bn", "caffe"), ("timm/no_such_network", "none")]:
        with pytest.raises(WeightsError) as error:
            DeepLab(3, backbone=backbone, weights=weights)
        one_line(error)


@pytest.mark.parametrize("backbone, weights, width, words", [
    ("resnet50", "caffe", 1, "caffe does not exist for resnet50"), ("vgg16_bn", "caffe", 1, "caffe does not exist"),
    ("resnet50", "none", 0.5, "width: 0.5 is for vgg16")])
def test_weights_and_widths_that_do_not_exist(backbone, weights, width, words):
    with pytest.raises(WeightsError, match=words):
        DeepLab(3, backbone, weights, width)


@pytest.mark.parametrize("backbone, width", [("vgg16_bn", 0.0625), ("timm/tf_efficientnet_lite0", 1.0)])
def test_a_checkpoint_gives_its_backbone(tmp_path, backbone, width):
    classifier = BoxClassifier(3, backbone, width=width)
    classifier.mean.fill_(0.25)
    torch.save({"model": classifier.state_dict()}, tmp_path / "cls.pt")
    segmenter = DeepLab(4, backbone, tmp_path / "cls.pt", width)
    state = segmenter.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in classifier.backbone.state_dict().items())
    assert segmenter.mean.flatten().tolist() == [0.25] * 3
    assert segmenter.loaded >= {f"backbone.{name}" for name, _ in segmenter.backbone.named_parameters()}


def test_a_timm_network_from_a_file_is_a_pretrained_one(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "start.pth")
    network = DeepLab(3, "timm/tf_efficientnet_lite0", tmp_path / "start.pth")
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    slow, fast = ({names[id(p)] for p in group["params"]} for group in network.parameter_groups(1.0, 0.0))
    assert fast == {"classifier.weight", *(f"head.branches.{k}.weight" for k in range(4))}
    assert slow == {*names.values()} - fast
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_cosines_are_enlarged_in_float32():
    network = DeepLab(3, "vgg16", width=0.0625).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert network(torch.rand(1, 3, 65, 65)).dtype == torch.float32


def test_a_resnet_of_imagenets_names_sees_imagenets_colours(tmp_path):
    torch.save(random_state("resnet50"), tmp_path / "start.pth")
    network = DeepLab(3, "resnet50", tmp_path / "start.pth")
    assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert network.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_the_head_of_other_backbones():
    """A classifier's is a 3x3 convolution and ReLU; new convolutions start small."""
    torch.manual_seed(0)
    head, x = BoxClassifier(3, "resnet50").head, torch.randn(1, 2048, 5, 5)
    torch.testing.assert_close(head(x), F.conv2d(x, head[0].weight, head[0].bias, padding=1).relu())
    for convolution in (head[0], *DeepLab(3, "resnet50").head.branches):
        assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_a_loaded_network_is_a_pretrained_one():
    pytest.importorskip("timm")
    network = models.load(ROOT / "weights/voc2007_seg.pth").train()
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert [group["lr"] for group in network.parameter_groups(0.1, 0)] == [0.1]


# ---- whole checkpoints ----

def checkpoint(state, kind="DeepLab", width=0.125, classes="abcd"):
    """What train_seg.py and train_cls.py write, without their settings."""
    network = dict(kind=kind, backbone="vgg16", width=width)
    return dict(network=network, classes=list(classes), model=state)


@pytest.mark.parametrize("kind, labels", [(DeepLab, 5), (BoxClassifier, 4)])
def test_load(tmp_path, kind, labels):
    state = small(kind, labels).state_dict()
    state["mean"].fill_(0.25)
    torch.save(checkpoint(state, kind.__name__), tmp_path / "any.pt")
    network = models.load(tmp_path / "any.pt")
    assert type(network) is kind and not network.training
    assert network.classes == ["a", "b", "c", "d"] and network.fill == [64] * 3
    held = network.state_dict()
    assert held.keys() == state.keys()
    assert all(torch.equal(held[name], value) for name, value in state.items())


def test_load_does_without_what_another_pooling_learnt(tmp_path):
    """Stage 2 does not pool, so a classifier that was trained with somebody's own pooling makes labels all the same."""
    network = BoxClassifier(2, "vgg16", width=0.0625, pooling=BAP())
    network.pooling.power = nn.Parameter(torch.ones(1))
    made = dict(kind="BoxClassifier", backbone="vgg16", width=0.0625)
    torch.save(dict(network=made, classes=["a", "b"], model=network.state_dict()), tmp_path / "cls.pt")
    loaded = models.load(tmp_path / "cls.pt")
    expected = dict(network.named_parameters())
    assert expected.keys() - dict(loaded.named_parameters()).keys() == {"pooling.power"}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.named_parameters())


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    state = small().state_dict()
    whole = checkpoint(state)
    files = {
        "names.pt": state, "list.pt": [1], "kind.pt": checkpoint(state, "Net"),
        "without.pt": {k: v for k, v in whole.items() if k != "classes"},
        "classes.pt": checkpoint(state, classes="abc"),
        "narrow.pt": checkpoint(state, width=0.25)}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    for name in (*files, "absent.pt"):
        with pytest.raises(WeightsError) as error:
            models.load(tmp_path / name)
        one_line(error, name)


def test_the_example_that_predicts(tmp_path):
    """A network made by hand, every convolution of which hands on the colours:
    red is background, green and blue are the classes. In a folder with
    models.py, the program, the checkpoint and a photograph alone.
    """
    network = DeepLab(3, width=0.05)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
    network.classifier.weight.data = torch.eye(3, network.backbone.channels)
    torch.save(checkpoint(network.state_dict(), "DeepLab", 0.05, ["leaf", "sea"]),
               tmp_path / "seg.pt")
    stripes = np.zeros((60, 1500, 3), np.uint8)
    for channel in range(3):
        stripes[:, 500 * channel:500 * (channel + 1), channel] = 255
    exif = Image.Exif()
    exif[274] = 6  # it is stored on its side
    Image.fromarray(np.rot90(stripes)).save(tmp_path / "photo.png", exif=exif)
    for file in ("models.py", "examples/predict.py"):
        shutil.copy(ROOT / file, tmp_path)

    command = [sys.executable, "predict.py", "seg.pt", "photo.png", "out.png"]
    environment = {**os.environ, "PYTHONPATH": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    picture = Image.open(tmp_path / "out.png")
    assert picture.mode == "P" and picture.size == (1000, 40)
    colours = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]  # of VOC's 0, 1, 2
    for label, colour in enumerate(colours):
        stripe = 333 * label + 100, 0, 333 * label + 230, 40
        assert (np.array(picture.crop(stripe)) == label).all()
        assert (np.array(picture.convert("RGB").crop(stripe)) == colour).all()
    palette = np.array(picture.getpalette()).reshape(-1, 3)
    assert palette[15].tolist() == [192, 128, 128]  # person
    assert palette[255].tolist() == [224, 224, 192]  # void
    names = [line.split(":")[0] for line in run.stdout.splitlines()]
    assert names == ["background", "leaf", "sea"]
