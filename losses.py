"""The noise-aware loss (section 3.3 of the paper) and the losses that the paper sets beside it.

One file to copy: it needs torch alone. In all of them
    cosine (N, L, H, W) in [-1, 1]: cos(phi(p), W_c), phi the segmenter's last feature, W_c its classifier's row
    H = softmax(temperature * cosine) over L
    y_crf, y_ret (N, H, W) int64: the two pseudo labels, in 0..L-1; ignore_index in either leaves a pixel out
    S: the pixels where the two agree, ~S: where they differ
and the result is a scalar. A mean over no pixels is 0. No pixel is gathered: memory stays at a few times L H W.
"""
import torch
import torch.nn.functional as F


def minus_log(cosine, labels, temperature, ignore_index):
    """-log H_label(p), 0 where the label is ignore_index: (N, H, W)."""
    return F.cross_entropy(temperature * cosine, labels, ignore_index=ignore_index, reduction="none")


def agreement(y_crf, y_ret, ignore_index):
    """The masks of S and ~S: (N, H, W) bool."""
    known = (y_crf != ignore_index) & (y_ret != ignore_index)
    return known & (y_crf == y_ret), known & (y_crf != y_ret)


def weighted_mean(values, weights):
    """sum weights values / sum weights; 0 where all weights are 0."""
    total = weights.sum(dtype=values.dtype)
    return (weights * values).sum() / torch.where(total > 0, total, 1)


def noise_aware_loss(cosine, y_crf, y_ret, gamma=7.0, weight=0.1, temperature=20.0, ignore_index=255):
    """L = L_ce + weight * L_wce: trust Y_crf where Y_ret agrees, elsewhere as far as the classifier does.

        L_ce   = - mean over S of log H_{Y_crf(p)}(p)
        L_wce  = - sum over ~S of sigma(p) log H_{c*}(p) / sum over ~S of sigma(p),  c* = Y_crf(p)
        sigma  = (D_{c*}(p) / max_c D_c(p)) ^ gamma,  D_c(p) = 1 + cosine_c(p)

    The gradient flows through sigma, too.
    """
    same, differ = agreement(y_crf, y_ret, ignore_index)
    ce = minus_log(cosine, y_crf, temperature, ignore_index)
    labels = torch.where(differ, y_crf, 0)
    d = 1 + cosine.gather(1, labels[:, None])[:, 0]
    # Clamped: rounding takes a cosine of -1 below it, and a power of a negative number is NaN.
    ratio = d.clamp(min=0) / (1 + cosine.amax(1)).clamp(min=1e-6)
    sigma = torch.where(differ, ratio, 0) ** gamma * differ
    return weighted_mean(ce, same) + weight * weighted_mean(ce, sigma)


def cross_entropy(cosine, labels, temperature=20.0, ignore_index=255):
    """- mean over the pixels that have a label of log H_label(p)."""
    return weighted_mean(minus_log(cosine, labels, temperature, ignore_index), labels != ignore_index)


def agreement_loss(cosine, y_crf, y_ret, temperature=20.0, ignore_index=255):
    """L_ce alone: ~S is left out."""
    same, _ = agreement(y_crf, y_ret, ignore_index)
    return weighted_mean(minus_log(cosine, y_crf, temperature, ignore_index), same)


def entropy_loss(cosine, y_crf, y_ret, weight=0.1, temperature=20.0, ignore_index=255):
    """L_ce + weight * mean over ~S of the entropy - sum_c H_c log H_c (Grandvalet and Bengio, 2004)."""
    _, differ = agreement(y_crf, y_ret, ignore_index)
    log_h = F.log_softmax(temperature * cosine, 1)
    entropy = -(log_h.exp() * log_h).sum(1)
    return agreement_loss(cosine, y_crf, y_ret, temperature, ignore_index) + weight * weighted_mean(entropy, differ)


def bootstrap_loss(cosine, y_crf, y_ret, weight=0.1, beta=0.8, temperature=20.0, ignore_index=255):
    """L_ce + weight * mean over ~S of - (beta log H_{Y_crf} + (1 - beta) log max_c H_c): hard bootstrapping,
    which mixes the label with the network's own answer (Reed et al., 2015).
    """
    same, differ = agreement(y_crf, y_ret, ignore_index)
    log_h = F.log_softmax(temperature * cosine, 1)
    ce = minus_log(cosine, y_crf, temperature, ignore_index)
    mixed = beta * ce - (1 - beta) * log_h.amax(1)
    return weighted_mean(ce, same) + weight * weighted_mean(mixed, differ)
