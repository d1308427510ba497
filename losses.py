"""The noise-aware loss (section 3.3 of the paper), and the losses that the
paper compares it with.

One file to copy: it needs torch alone. In all of them

    cosine        (N, L, H, W) in [-1, 1]: cos(phi(p), W_c) of pixel p,
                  label c; phi is the segmenter's last feature, W_c its
                  classifier's row
    H             softmax(temperature * cosine) over the labels
    y_crf, y_ret  (N, H, W), int64 or uint8: two pseudo labels, in 0..L-1
    ignore_index  in either of them leaves the pixel out; a value that their
                  type can hold
    S, ~S         the pixels where the two agree, and where they differ
    group         of torch.distributed, whose processes each hold a part of
                  the batch; None: all of it is here

The result is a scalar of the whole batch, in float32 at least; a mean over no
pixels is 0. torch.func's grad and vmap and second derivatives work, but not
over a group.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Group = dist.ProcessGroup | None


def noise_aware_loss(
        cosine: Tensor, y_crf: Tensor, y_ret: Tensor,
        gamma: float = 7.0, weight: float = 0.1, temperature: float = 20.0,
        ignore_index: int = 255, group: Group = None) -> Tensor:
    """L_ce + weight * L_wce: trust Y_crf where Y_ret agrees, elsewhere as
    far as the classifier does. With c* = Y_crf(p), D_c(p) = 1 + cosine_c(p),

        L_ce   = - mean over S of log H_{c*}(p)
        L_wce  = - sum over ~S of sigma(p) log H_{c*}(p)
                 / sum over ~S of sigma(p)
        sigma  = (D_{c*}(p) / max_c D_c(p)) ^ gamma

    The gradient flows through sigma, too.
    """
    cosine = in_float32(cosine)
    agree, differ = agreement(y_crf, y_ret, ignore_index)
    ce = -at_label(log_softmax(cosine, temperature), y_crf, ignore_index)
    sigma = confidence(cosine, y_crf, differ, gamma, ignore_index)
    l_wce = weighted_mean(ce, sigma, group)
    return weighted_mean(ce, agree, group) + weight * l_wce


def cross_entropy(
        cosine: Tensor, labels: Tensor, temperature: float = 20.0,
        ignore_index: int = 255, group: Group = None) -> Tensor:
    """- mean over the pixels that have a label of log H_label(p)."""
    ce = -at_label(log_softmax(cosine, temperature), labels, ignore_index)
    return weighted_mean(ce, labels != ignore_index, group)


def agreement_loss(
        cosine: Tensor, y_crf: Tensor, y_ret: Tensor,
        temperature: float = 20.0, ignore_index: int = 255,
        group: Group = None) -> Tensor:
    """L_ce alone: ~S is left out."""
    agree, _ = agreement(y_crf, y_ret, ignore_index)
    ce = -at_label(log_softmax(cosine, temperature), y_crf, ignore_index)
    return weighted_mean(ce, agree, group)


def entropy_loss(
        cosine: Tensor, y_crf: Tensor, y_ret: Tensor,
        weight: float = 0.1, temperature: float = 20.0,
        ignore_index: int = 255, group: Group = None) -> Tensor:
    """L_ce + weight * mean over ~S of the entropy, - sum_c H_c log H_c
    (Grandvalet and Bengio, 2004).
    """
    agree, differ = agreement(y_crf, y_ret, ignore_index)
    log_h = log_softmax(cosine, temperature)
    ce = -at_label(log_h, y_crf, ignore_index)
    entropy = weighted_mean(-(log_h.exp() * log_h).sum(1), differ, group)
    return weighted_mean(ce, agree, group) + weight * entropy


def bootstrap_loss(
        cosine: Tensor, y_crf: Tensor, y_ret: Tensor,
        weight: float = 0.1, beta: float = 0.8,
        temperature: float = 20.0, ignore_index: int = 255,
        group: Group = None) -> Tensor:
    """L_ce + weight * mean over ~S of hard bootstrapping, which mixes the
    label with the network's own answer (Reed et al., 2015):
    - (beta log H_{Y_crf} + (1 - beta) log max_c H_c).
    """
    agree, differ = agreement(y_crf, y_ret, ignore_index)
    log_h = log_softmax(cosine, temperature)
    ce = -at_label(log_h, y_crf, ignore_index)
    mixed = beta * ce - (1 - beta) * log_h.max(1).values
    bootstrap = weighted_mean(mixed, differ, group)
    return weighted_mean(ce, agree, group) + weight * bootstrap


def confidence(cosine: Tensor, y_crf: Tensor, differ: Tensor, gamma: float,
               ignore_index: int = 255) -> Tensor:
    """sigma of noise_aware_loss (N, H, W) in [0, 1]; 0 where not `differ`, the
    mask of ~S.
    """
    # Clamped: rounding may leave D below 0, whose power would be NaN.
    D = (1 + at_label(cosine, y_crf, ignore_index)).clamp(min=0)
    D_max = (1 + cosine.max(1).values).clamp(min=1e-6)
    return torch.where(differ, D / D_max, 0) ** gamma * differ


def in_float32(cosine: Tensor) -> Tensor:
    """At least: sums of exponentials in half precision lose the small ones."""
    return cosine.to(torch.promote_types(cosine.dtype, torch.float32))


def log_softmax(cosine: Tensor, temperature: float) -> Tensor:
    """log H: (N, L, H, W)."""
    return F.log_softmax(temperature * in_float32(cosine), 1)


def at_label(scores: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """scores (N, L, H, W) of each pixel's label: (N, H, W). A void pixel gets
    label 0's score, which the caller must leave out. Raises ValueError for
    labels of another size, of which gather would take a corner.
    """
    if labels.shape != scores.shape[:1] + scores.shape[2:]:
        raise ValueError(f"labels are {tuple(labels.shape)}, cosines "
                         f"{tuple(scores.shape)}, not (N, H, W), (N, L, H, W)")
    channel = torch.where(labels == ignore_index, 0, labels.long())
    return scores.gather(1, channel[:, None])[:, 0]


def agreement(
        y_crf: Tensor, y_ret: Tensor,
        ignore_index: int) -> tuple[Tensor, Tensor]:
    """The masks of S and ~S: (N, H, W) bool."""
    if y_crf.shape != y_ret.shape:
        raise ValueError(f"y_crf is {tuple(y_crf.shape)}, y_ret "
                         f"{tuple(y_ret.shape)}")
    known = (y_crf != ignore_index) & (y_ret != ignore_index)
    return known & (y_crf == y_ret), known & (y_crf != y_ret)


def weighted_mean(values: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """sum w values / sum w over the whole group; 0 where w is 0 everywhere."""
    sums = torch.stack(((w * values).sum(), w.sum(dtype=values.dtype)))
    if group is not None:
        # Each process has the value of the whole batch, but the graph of its
        # own part alone. That part's gradient is multiplied by the number of
        # processes, so that DistributedDataParallel's mean over them is the
        # gradient of the whole batch.
        total = sums.detach().clone()
        dist.all_reduce(total, group=group)
        sums = total + dist.get_world_size(group) * (sums - sums.detach())
    above, below = sums
    return above / torch.where(below > 0, below, 1)
