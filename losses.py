"""The noise-aware loss (section 3.3 of the paper) and the losses that the paper sets beside it.

One file to copy: it needs torch alone. In all of them
    cosine (N, L, H, W) in [-1, 1]: cos(phi(p), W_c), phi the segmenter's last feature, W_c its classifier's row
    H = softmax(temperature * cosine) over L
    y_crf, y_ret (N, H, W) int64: the two pseudo labels, in 0..L-1; ignore_index in either leaves a pixel out
    S: the pixels where the two agree, ~S: where they differ
    group: a torch.distributed process group whose processes each hold a part of the batch (None: all of it is here)
and the result is a scalar, with a group that of the whole batch. A mean over no pixels is 0. No pixel is gathered.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


class Pixels(torch.autograd.Function):
    """What the losses read of each pixel: (cosine, labels, temperature, ignore_index) -> -log H_label, cosine_label
    and max_c cosine_c, each (N, H, W). An ignored label is read as 0: every use of it gives it no weight.

    Forward and backward each make one array of cosine's size, and none is kept between them: of the softmax, its
    sum at each pixel is enough. Autograd's own chain of these would keep one and make four.
    """

    @staticmethod
    def forward(ctx, cosine, labels, temperature, ignore_index):
        highest, where = cosine.max(1)
        total = (cosine - highest[:, None]).mul_(temperature).exp_().sum(1)
        log_sum = total.log_().add_(highest, alpha=temperature)
        given = cosine.gather(1, torch.where(labels == ignore_index, 0, labels)[:, None])[:, 0]
        small = torch.uint8 if cosine.shape[1] <= 256 else torch.int64
        ctx.save_for_backward(cosine, labels, where.to(small), log_sum)
        ctx.temperature, ctx.ignore_index = temperature, ignore_index
        return log_sum - temperature * given, given, highest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss, of_given, of_highest):
        cosine, labels, where, log_sum = ctx.saved_tensors
        of_loss = ctx.temperature * of_loss  # d(-log H_label) / d cosine_c = temperature (H_c - [c = label])
        gradient = (ctx.temperature * cosine).sub_(log_sum[:, None]).exp_().mul_(of_loss[:, None])
        labels = torch.where(labels == ctx.ignore_index, 0, labels)
        gradient.scatter_add_(1, labels[:, None], (of_given - of_loss)[:, None])
        del labels
        gradient.scatter_add_(1, where.long()[:, None], of_highest[:, None])
        return gradient, None, None, None


def read_pixels(cosine: Tensor, labels: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, ...]:
    """Pixels in float32 at least: a sum of exponentials in half precision would lose the small ones."""
    cosine = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
    return Pixels.apply(cosine, labels, temperature, ignore_index)


def agreement(y_crf: Tensor, y_ret: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The masks of S and ~S: (N, H, W) bool."""
    known = (y_crf != ignore_index) & (y_ret != ignore_index)
    return known & (y_crf == y_ret), known & (y_crf != y_ret)


class Total(torch.autograd.Function):
    """The sum of a tensor over a group's processes. Its gradient is the sum of theirs: each has the whole loss."""

    @staticmethod
    def forward(ctx, values, group):
        ctx.group, values = group, values.clone()
        torch.distributed.all_reduce(values, group=group)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def weighted_mean(values: Tensor, weights: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """sum weights values / sum weights; 0 where all weights are 0. The sums run over the whole group, and so does
    their gradient: DistributedDataParallel's mean of it over the processes is that of the whole batch.
    """
    above, below = (weights * values).sum(), weights.sum(dtype=values.dtype)
    if group is not None:
        above, below = Total.apply(torch.stack((above, below)), group)
    return above / torch.where(below > 0, below, 1)


def noise_aware_loss(cosine: Tensor, y_crf: Tensor, y_ret: Tensor, gamma: float = 7.0, weight: float = 0.1,
                     temperature: float = 20.0, ignore_index: int = 255, group: ProcessGroup | None = None) -> Tensor:
    """L = L_ce + weight * L_wce: trust Y_crf where Y_ret agrees, elsewhere as far as the classifier does.

        L_ce   = - mean over S of log H_{Y_crf(p)}(p)
        L_wce  = - sum over ~S of sigma(p) log H_{c*}(p) / sum over ~S of sigma(p),  c* = Y_crf(p)
        sigma  = (D_{c*}(p) / max_c D_c(p)) ^ gamma,  D_c(p) = 1 + cosine_c(p)

    The gradient flows through sigma, too.
    """
    same, differ = agreement(y_crf, y_ret, ignore_index)
    ce, given, highest = read_pixels(cosine, y_crf, temperature, ignore_index)
    # Clamped: rounding takes a cosine of -1 below it, and a power of a negative number is NaN.
    ratio = (1 + given).clamp(min=0) / (1 + highest).clamp(min=1e-6)
    sigma = torch.where(differ, ratio, 0) ** gamma * differ
    return weighted_mean(ce, same, group) + weight * weighted_mean(ce, sigma, group)


def cross_entropy(cosine: Tensor, labels: Tensor,
                  temperature: float = 20.0, ignore_index: int = 255, group: ProcessGroup | None = None) -> Tensor:
    """- mean over the pixels that have a label of log H_label(p)."""
    ce, _, _ = read_pixels(cosine, labels, temperature, ignore_index)
    return weighted_mean(ce, labels != ignore_index, group)


def agreement_loss(cosine: Tensor, y_crf: Tensor, y_ret: Tensor,
                   temperature: float = 20.0, ignore_index: int = 255, group: ProcessGroup | None = None) -> Tensor:
    """L_ce alone: ~S is left out."""
    same, _ = agreement(y_crf, y_ret, ignore_index)
    ce, _, _ = read_pixels(cosine, y_crf, temperature, ignore_index)
    return weighted_mean(ce, same, group)


def entropy_loss(cosine: Tensor, y_crf: Tensor, y_ret: Tensor, weight: float = 0.1,
                 temperature: float = 20.0, ignore_index: int = 255, group: ProcessGroup | None = None) -> Tensor:
    """L_ce + weight * mean over ~S of the entropy - sum_c H_c log H_c (Grandvalet and Bengio, 2004)."""
    _, differ = agreement(y_crf, y_ret, ignore_index)
    log_h = F.log_softmax(temperature * cosine.to(torch.promote_types(cosine.dtype, torch.float32)), 1)
    entropy = -(log_h.exp() * log_h).sum(1)
    ce = agreement_loss(cosine, y_crf, y_ret, temperature, ignore_index, group)
    return ce + weight * weighted_mean(entropy, differ, group)


def bootstrap_loss(cosine: Tensor, y_crf: Tensor, y_ret: Tensor, weight: float = 0.1, beta: float = 0.8,
                   temperature: float = 20.0, ignore_index: int = 255, group: ProcessGroup | None = None) -> Tensor:
    """L_ce + weight * mean over ~S of - (beta log H_{Y_crf} + (1 - beta) log max_c H_c): hard bootstrapping,
    which mixes the label with the network's own answer (Reed et al., 2015).
    """
    same, differ = agreement(y_crf, y_ret, ignore_index)
    ce, given, highest = read_pixels(cosine, y_crf, temperature, ignore_index)
    own = ce - temperature * (highest - given)  # - log max_c H_c
    return weighted_mean(ce, same, group) + weight * weighted_mean(beta * ce + (1 - beta) * own, differ, group)
