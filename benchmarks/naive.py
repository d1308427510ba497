"""The method as one writes it first: a loop over boxes, features upsampled to the image, gathered pixels.

Written from the equations, in float32 and with the library's own operators, for speed.py to compare with.
"""
import torch
import torch.nn.functional as F

import models


def bap(features, boxes, image_size, grid=4, bins=2):
    """BAP box by box -> (foreground, queries). Cells are counted whole or not at all, unlike models.BAP."""
    (_, _, h, w), (height, width) = features.shape, image_size
    background = F.interpolate(models.outside_boxes(boxes, image_size).to(features), (h, w), mode="nearest")
    foreground, queries = [], []
    for f, m, image_boxes in zip(features, background, boxes):
        attention, count = 0, 0
        for rows in torch.arange(h).chunk(grid):
            for columns in torch.arange(w).chunk(grid):
                cell = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
                if m[cell].sum() > 0:
                    q = (m[cell] * f[cell]).sum((1, 2)) / m[cell].sum()
                    queries.append(q)
                    attention = attention + F.relu(F.cosine_similarity(f, q[:, None, None], dim=0))
                    count += 1
        attention = m[0] + (1 - m[0]) * attention / max(count, 1)
        for x0, y0, x1, y1 in image_boxes.tolist():
            x0, x1, y0, y1 = x0 * w / width, x1 * w / width, y0 * h / height, y1 * h / height
            for i in range(bins):
                for j in range(bins):
                    top, left = int(y0 + (y1 - y0) * i / bins), int(x0 + (x1 - x0) * j / bins)
                    bottom = max(top + 1, int(y0 + (y1 - y0) * (i + 1) / bins))
                    right = max(left + 1, int(x0 + (x1 - x0) * (j + 1) / bins))
                    keep = 1 - attention[top:bottom, left:right]
                    part = f[:, top:bottom, left:right]
                    foreground.append((keep * part).sum((1, 2)) / keep.sum().clamp(min=1e-6))
    return torch.stack(foreground), torch.stack(queries)


def label_maps(features, weight, size, outside, classes, y_crf):
    """Everything that stage 2 reads from the features, upsampled first: u0, activation maps, cosines of Yret."""
    canvas = models.padded_size(size)
    f = F.interpolate(features[None], canvas, mode="bilinear", align_corners=True)[0, :, :size[0], :size[1]]
    q = (f * outside).sum((1, 2)) / outside.sum()
    attention = F.relu(F.cosine_similarity(f, q[:, None, None], dim=0))
    activation = [F.relu((f * weight[c][:, None, None]).sum(0)) for c in classes]
    cosines = []
    for c in [0, *classes]:
        mask = (y_crf == c).to(f)
        prototype = (f * mask).sum((1, 2)) / mask.sum().clamp(min=1)
        cosines.append(F.relu(F.cosine_similarity(f, prototype[:, None, None], dim=0)))
    return attention, torch.stack(activation), torch.stack(cosines)


def noise_aware_loss(cosine, y_crf, y_ret, gamma=7.0, weight=0.1, temperature=20.0, ignore_index=255):
    """NAL with the pixels of S and of ~S gathered into lists."""
    log_h = F.log_softmax(temperature * cosine, 1).permute(0, 2, 3, 1)
    d = 1 + cosine.permute(0, 2, 3, 1)
    known = (y_crf != ignore_index) & (y_ret != ignore_index)
    same, differ = known & (y_crf == y_ret), known & (y_crf != y_ret)
    ce = -log_h[same].gather(1, y_crf[same][:, None]).mean()
    d, labels = d[differ], y_crf[differ][:, None]
    sigma = (d.gather(1, labels)[:, 0] / d.amax(1)) ** gamma
    return ce + weight * -(sigma * log_h[differ].gather(1, labels)[:, 0]).sum() / sigma.sum()
