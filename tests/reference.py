"""The paper's equations as they are written: loops over boxes, cells and pixels, in float64.

Slow and plain on purpose. The tests compare models.py, losses.py and crf.py with it, values and gradients.
"""
import math
from collections import namedtuple
from fractions import Fraction

import torch
import torch.nn.functional as F

Pooled = namedtuple("Pooled", "foreground queries attention")


# ---- geometry: boxes in continuous pixels, pixel i is [i, i + 1); in fractions, so nothing is rounded ----

def cell(j, cells, pixels):
    """Where feature cell j of `cells` lies along an image `pixels` long: (begin, end)."""
    if cells == 1:
        return Fraction(0), Fraction(pixels)
    step = Fraction(pixels - 1, cells - 1)
    centre = j * step + Fraction(1, 2)
    return max(centre - step / 2, 0), min(centre + step / 2, pixels)


def coverage(interval, cells, pixels):
    """The part of each cell that the interval covers: a list."""
    parts = []
    for j in range(cells):
        begin, end = cell(j, cells, pixels)
        shared = min(interval[1], end) - max(interval[0], begin)
        parts.append(max(shared, 0) / (end - begin))
    return parts


def box_weights(box, map_size, image_size):
    """(h, w): the part of each cell that the box covers."""
    x0, y0, x1, y1 = map(Fraction, box)
    rows = coverage((y0, y1), map_size[0], image_size[0])
    columns = coverage((x0, x1), map_size[1], image_size[1])
    return torch.tensor([[float(row * column) for column in columns] for row in rows], dtype=torch.float64)


def cut(box, rows, columns):
    """The box as rows x columns equal boxes, row by row."""
    x0, y0, x1, y1 = map(Fraction, box)
    dx, dy = (x1 - x0) / columns, (y1 - y0) / rows
    return [(x0 + i * dx, y0 + j * dy, x0 + (i + 1) * dx, y0 + (j + 1) * dy)
            for j in range(rows) for i in range(columns)]


def outside_boxes(boxes, image_size):
    """(H, W): 1 for each pixel that no box touches."""
    H, W = image_size
    background = torch.ones(H, W, dtype=torch.float64)
    for x0, y0, x1, y1 in boxes.tolist():
        for y in range(H):
            for x in range(W):
                if math.floor(x0) <= x < math.ceil(x1) and math.floor(y0) <= y < math.ceil(y1):
                    background[y, x] = 0
    return background


def cell_means(image, map_size):
    """(h, w): the mean of an image of 0 and 1 over each cell; a pixel counts with the area it shares."""
    (h, w), (H, W) = map_size, image.shape
    rows = [coverage((y, y + 1), h, H) for y in range(H)]
    columns = [coverage((x, x + 1), w, W) for x in range(W)]
    means = torch.zeros(h, w, dtype=torch.float64)
    for j in range(h):
        for i in range(w):
            means[j, i] = float(sum(rows[y][j] * columns[x][i] for y in range(H) if rows[y][j]
                                    for x in range(W) if columns[x][i] and image[y, x]))
    return means


# ---- background-aware pooling ----

def cosine(a, b):
    if not a.any() or not b.any():
        return torch.zeros((), dtype=torch.float64)
    return a @ b / (a.norm() * b.norm())


def weighted_mean(f, weights):
    """sum_p weights(p) f(p) / sum_p weights(p); None where the weights are all zero."""
    C, h, w = f.shape
    above, below = torch.zeros(C, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for j in range(h):
        for i in range(w):
            above = above + weights[j, i] * f[:, j, i]
            below = below + weights[j, i]
    return above / below if below > 0 else None


def grid_weights(h, w, grid):
    """The feature map cut into grid x grid equal parts, row by row: of each, (h, w), the share of every cell in it.

    Counted in feature cells: cell i reaches from i to i + 1, and a part is h / grid cells high, w / grid wide.
    """
    def share(i, part, cells):
        begin, end = Fraction(part * cells, grid), Fraction((part + 1) * cells, grid)
        return max(min(end, i + 1) - max(begin, i), 0)

    return [torch.tensor([[float(share(j, a, h) * share(i, b, w)) for i in range(w)] for j in range(h)],
                         dtype=torch.float64) for a in range(grid) for b in range(grid)]


def bap(features, boxes, image_size, background=None, grid=4, bins=2, min_background=0.125):
    """Pooled(foreground (sum K, bins * bins, C), queries (J, C), attention (N, 1, h, w))."""
    N, C, h, w = features.shape
    foreground, queries, attention = [], [], []
    for n in range(N):
        f = features[n]
        pixels = outside_boxes(boxes[n], image_size) if background is None else background[n, 0].double()
        M = cell_means(pixels, (h, w))
        # q_g, for the grid cells that hold background
        q = [weighted_mean(f, cells * M) for cells in grid_weights(h, w, grid)]
        q = [q_g for q_g in q if q_g is not None]
        plain = float(pixels.mean()) <= min_background or not q
        # A = 1 on background, the mean of ReLU(cos(f, q_g)) in boxes
        A = torch.zeros(h, w, dtype=torch.float64)
        for j in range(h):
            for i in range(w):
                a = 0.0 if plain else sum(F.relu(cosine(f[:, j, i], q_g)) for q_g in q) / len(q)
                A[j, i] = M[j, i] + (1 - M[j, i]) * a
        keep = torch.ones_like(A) if plain else 1 - A
        for box in boxes[n].tolist():
            for part in cut(box, bins, bins):
                weights = box_weights(part, (h, w), image_size)
                r = weighted_mean(f, weights * keep)
                r = weighted_mean(f, weights) if r is None else r
                # a part that lies outside the image gives zeros
                foreground.append(torch.zeros_like(f[:, 0, 0]) if r is None else r)
        queries += q
        attention.append(A[None])
    return Pooled(torch.stack(foreground).reshape(-1, bins * bins, C) if foreground
                  else torch.zeros(0, bins * bins, C, dtype=torch.float64),
                  torch.stack(queries) if queries else torch.zeros(0, C, dtype=torch.float64),
                  torch.stack(attention))


# ---- features at the image's size ----

def upsampled(features, size, canvas=None):
    """(C, H, W): the features (C, h, w) at each pixel."""
    H, W = size
    image = F.interpolate(features[None].double(), canvas or size, mode="bilinear", align_corners=True)
    return image[0, :, :H, :W]


def upsampled_dot(features, vectors, size, canvas=None):
    return torch.einsum("kc,chw->khw", vectors.double(), upsampled(features, size, canvas))


def upsampled_norm(features, size, canvas=None):
    return upsampled(features, size, canvas).norm(dim=0)


def upsampled_cosine(features, vectors, size, canvas=None):
    image = upsampled(features, size, canvas)
    return torch.stack([torch.stack([torch.stack([cosine(image[:, y, x], v.double()) for x in range(size[1])])
                                     for y in range(size[0])]) for v in vectors])


def upsampled_mean(features, masks, size, canvas=None):
    image = upsampled(features, size, canvas)
    means = torch.zeros(len(masks), len(image), dtype=torch.float64)
    for k, mask in enumerate(masks):
        pixels = [image[:, y, x] for y in range(size[0]) for x in range(size[1]) if mask[y, x]]
        if pixels:
            means[k] = sum(pixels) / len(pixels)
    return means


# ---- losses: cosine (N, L, H, W), labels (N, H, W) ----

def log_softmax(logits):
    top = logits.detach().max()
    return logits - top - (logits - top).exp().sum().log()


def split(cosine, y_crf, y_ret, temperature, ignore_index):
    """The pixels of S and of ~S, each as (cosines (L,), log H (L,), label)."""
    agree, differ = [], []
    N, _, H, W = cosine.shape
    for n in range(N):
        for y in range(H):
            for x in range(W):
                crf, ret = int(y_crf[n, y, x]), int(y_ret[n, y, x])
                if crf == ignore_index or ret == ignore_index:
                    continue
                cos = cosine[n, :, y, x]
                (agree if crf == ret else differ).append((cos, log_softmax(temperature * cos), crf))
    return agree, differ


def mean(values, weights=None):
    weights = [1.0] * len(values) if weights is None else weights
    return sum(w * v for w, v in zip(weights, values)) / sum(weights) if values else 0.0


def noise_aware_loss(cosine, y_crf, y_ret, gamma=7.0, weight=0.1, temperature=20.0, ignore_index=255):
    agree, differ = split(cosine, y_crf, y_ret, temperature, ignore_index)
    sigma = [((1 + cos[c]) / (1 + cos).max()) ** gamma for cos, _, c in differ]
    return (mean([-log_H[c] for _, log_H, c in agree])
            + weight * mean([-log_H[c] for _, log_H, c in differ], sigma))


def agreement_loss(cosine, y_crf, y_ret, temperature=20.0, ignore_index=255):
    agree, _ = split(cosine, y_crf, y_ret, temperature, ignore_index)
    return mean([-log_H[c] for _, log_H, c in agree])


def entropy_loss(cosine, y_crf, y_ret, weight=0.1, temperature=20.0, ignore_index=255):
    agree, differ = split(cosine, y_crf, y_ret, temperature, ignore_index)
    return (mean([-log_H[c] for _, log_H, c in agree])
            + weight * mean([-(log_H.exp() * log_H).sum() for _, log_H, _ in differ]))


def bootstrap_loss(cosine, y_crf, y_ret, weight=0.1, beta=0.8, temperature=20.0, ignore_index=255):
    agree, differ = split(cosine, y_crf, y_ret, temperature, ignore_index)
    return (mean([-log_H[c] for _, log_H, c in agree])
            + weight * mean([-(beta * log_H[c] + (1 - beta) * log_H.max()) for _, log_H, c in differ]))


def cross_entropy(cosine, labels, temperature=20.0, ignore_index=255):
    return agreement_loss(cosine, labels, labels, temperature, ignore_index)


# ---- the fully connected CRF ----

def mean_field(image, probabilities, bilateral, gaussian, iterations):
    """Marginals (L, H, W) with every pair of pixels written out, Potts model.

    Q(p) ~ P(p) exp(sum_m weight_m sum_q k_m(p, q) Q(q)), each kernel k_m a Gaussian normalised on both
    sides by the square root of its sums: k(p, q) / sqrt(k(p) k(q)).
    """
    L, H, W = probabilities.shape
    points = [(y, x, *image[y, x].tolist()) for y in range(H) for x in range(W)]

    def kernel(xy_std, rgb_std=math.inf):
        std = (xy_std, xy_std, rgb_std, rgb_std, rgb_std)
        k = torch.zeros(len(points), len(points), dtype=torch.float64)
        for i, p in enumerate(points):
            for j, q in enumerate(points):
                k[i, j] = math.exp(-sum(((a - b) / s) ** 2 for a, b, s in zip(p, q, std)) / 2)
        root = k.sum(1).sqrt()
        return k / root[:, None] / root[None, :]

    k = bilateral[0] * kernel(bilateral[1], bilateral[2]) + gaussian[0] * kernel(gaussian[1])
    log_p = torch.as_tensor(probabilities, dtype=torch.float64).clamp(min=1e-8).log().reshape(L, -1)
    q = log_p.softmax(0)
    for _ in range(iterations):
        q = (log_p + q @ k).softmax(0)
    return q.reshape(L, H, W)
