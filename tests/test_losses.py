"""losses.py against the equations in reference.py: values, gradients, and what happens with void pixels."""
import math
from functools import partial

import pytest
import reference
import torch

import losses

VOID = 255
TWO_LABELS = ["noise_aware_loss", "agreement_loss", "entropy_loss", "bootstrap_loss"]


def random_case(N=2, L=4, H=5, W=6, differ=0.4, void=0.2, seed=0, ignore_index=VOID):
    """cosine in float64, y_crf, y_ret; about the given shares of pixels differ or are void."""
    g = torch.Generator().manual_seed(seed)
    cosine = (torch.rand(N, L, H, W, generator=g, dtype=torch.float64) * 2 - 1).requires_grad_()
    y_crf = torch.randint(L, (N, H, W), generator=g)
    other = (y_crf + torch.randint(1, L, (N, H, W), generator=g)) % L
    y_ret = torch.where(torch.rand(N, H, W, generator=g) < differ, other, y_crf)
    for labels in (y_crf, y_ret):
        labels[torch.rand(N, H, W, generator=g) < void / 2] = ignore_index
    return cosine, y_crf, y_ret


def test_every_loss_is_compared():
    found = {name for name in vars(losses) if name.endswith(("_loss", "_entropy"))}
    assert found == {*TWO_LABELS, "cross_entropy"}


def value_and_gradient(loss, cosine):
    loss = torch.as_tensor(loss, dtype=torch.float64) + 0 * cosine.sum()
    return loss.detach(), torch.autograd.grad(loss, cosine)[0]


def same(name, cosine, *labels, **settings):
    loss = getattr(losses, name)(cosine, *labels, **settings)
    assert loss.shape == () and loss.dtype == cosine.dtype
    expected = getattr(reference, name)(cosine, *labels, **settings)
    for ours, theirs in zip(value_and_gradient(loss, cosine), value_and_gradient(expected, cosine)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("differ", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("void", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", TWO_LABELS)
def test_equals_the_equations(name, differ, void):
    same(name, *random_case(differ=differ, void=void))


@pytest.mark.parametrize("void", [0.0, 0.5, 1.0])
def test_cross_entropy_equals_the_equation(void):
    cosine, labels, _ = random_case(void=void)
    same("cross_entropy", cosine, labels)


def test_cross_entropy_of_no_label_is_zero_with_zero_gradient():
    cosine, labels, _ = random_case()
    loss = losses.cross_entropy(cosine, torch.full_like(labels, 255))
    loss.backward()
    assert loss.item() == 0 and not cosine.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_half_precision(dtype):
    cosine, labels, _ = random_case(L=200, seed=3)
    half = cosine.detach().to(dtype)
    loss = losses.cross_entropy(half, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(reference.cross_entropy(half.double(), labels)), rel=1e-5)


@pytest.mark.parametrize("name, settings", [
    ("noise_aware_loss", dict(gamma=0.0)),
    ("noise_aware_loss", dict(gamma=1.0)),
    ("noise_aware_loss", dict(gamma=2.5, weight=0.7, temperature=5.0)),
    ("agreement_loss", dict(temperature=1.0)),
    ("entropy_loss", dict(weight=1.5, temperature=3.0)),
    ("bootstrap_loss", dict(weight=1.5, beta=0.3, temperature=3.0)),
    ("bootstrap_loss", dict(weight=1.0, beta=1.0)),
])
def test_settings(name, settings):
    same(name, *random_case(seed=1), **settings)


@pytest.mark.parametrize("name", TWO_LABELS)
def test_ignore_index(name):
    for index in (-1, 3):  # 3: a label that the loss leaves out
        same(name, *random_case(seed=2, ignore_index=index), ignore_index=index)


@pytest.mark.parametrize("index", [-1, 3])
def test_ignore_index_of_cross_entropy(index):
    cosine, labels, _ = random_case(seed=2, ignore_index=index)
    same("cross_entropy", cosine, labels, ignore_index=index)


def test_confidence_equals_the_equation():
    """With void pixels, which are in neither S nor ~S."""
    cosine, y_crf, y_ret = random_case(seed=3)
    differ = (y_crf != y_ret) & (y_crf != VOID) & (y_ret != VOID)
    sigma = losses.confidence(cosine, y_crf, differ, gamma=7.0)
    assert sigma.shape == y_crf.shape and not sigma[~differ].any()
    for n, y, x in differ.nonzero().tolist():
        D = [1 + value.item() for value in cosine[n, :, y, x]]
        assert sigma[n, y, x].item() == pytest.approx((D[y_crf[n, y, x]] / max(D)) ** 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TWO_LABELS)
def test_half_precision_is_only_the_input(name, dtype):
    """Of cosines in half precision, the loss is that of the same numbers in double; 200 labels make long sums."""
    cosine, y_crf, y_ret = random_case(L=200, seed=3)
    half = cosine.detach().to(dtype)
    loss = getattr(losses, name)(half, y_crf, y_ret)
    expected = getattr(reference, name)(half.double(), y_crf, y_ret)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_by_hand():
    """Two labels, temperature log 3, so that cosines (1, 0) give H = (3/4, 1/4).

    Pixel 0: both say 0. Pixel 1: Ycrf 1, Yret 0, sigma = (1/2)^2.
    Pixel 2, cosines (0, 1): Ycrf 1, Yret 0, sigma 1. Pixel 3: void.
    """
    cosine = torch.tensor([[1.0, 1.0, 0.0, 0.3], [0.0, 0.0, 1.0, 0.2]]).reshape(1, 2, 1, 4)
    y_crf, y_ret = torch.tensor([[[0, 1, 1, VOID]]]), torch.tensor([[[0, 0, 0, 1]]])
    settings = dict(weight=0.5, temperature=math.log(3))
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    assert losses.noise_aware_loss(cosine, y_crf, y_ret, gamma=2.0, **settings).item() == pytest.approx(
        right + 0.5 * (wrong / 4 + right) / (1 / 4 + 1))
    assert losses.agreement_loss(cosine, y_crf, y_ret, temperature=math.log(3)).item() == pytest.approx(right)
    assert losses.entropy_loss(cosine, y_crf, y_ret, **settings).item() == pytest.approx(
        right + 0.5 * (3 / 4 * right + 1 / 4 * wrong))
    assert losses.bootstrap_loss(cosine, y_crf, y_ret, beta=0.6, **settings).item() == pytest.approx(
        right + 0.5 * (0.6 * wrong + 0.4 * right + right) / 2)
    assert losses.cross_entropy(cosine, y_crf, temperature=math.log(3)).item() == pytest.approx(
        (right + wrong + right) / 3)


@pytest.mark.parametrize("name", TWO_LABELS)
def test_void_everywhere_is_zero_with_zero_gradient(name):
    cosine, y_crf, y_ret = random_case()
    loss = getattr(losses, name)(cosine, torch.full_like(y_crf, VOID), y_ret)
    loss.backward()  # the trainer calls it as ever
    assert loss.item() == 0 and not cosine.grad.any()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TWO_LABELS)
def test_cosines_of_exactly_1_and_minus_1(name, dtype, gamma):
    g = torch.Generator().manual_seed(0)
    _, y_crf, y_ret = random_case(H=8, W=8)
    cosine = (torch.randint(2, (2, 4, 8, 8), generator=g) * 2 - 1).to(dtype)
    cosine[0, :, :4] = -1  # all D = 0
    cosine[1, :, :2] *= 1 + 2e-7  # just beyond, as rounding leaves them
    cosine.requires_grad_()
    settings = dict(gamma=gamma) if name == "noise_aware_loss" else {}
    loss = getattr(losses, name)(cosine, y_crf, y_ret, **settings)
    loss.backward()
    assert loss.isfinite() and cosine.grad.isfinite().all()


def test_sigma_zero_everywhere_leaves_the_first_term():
    cosine = torch.ones(1, 3, 2, 2, dtype=torch.float64)
    cosine[:, 1] = -1
    cosine.requires_grad_()
    y_crf, y_ret = torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[0, 0], [0, 2]]])
    loss = losses.noise_aware_loss(cosine, y_crf, y_ret)
    loss.backward()
    torch.testing.assert_close(loss, losses.agreement_loss(cosine, y_crf, y_ret))
    assert cosine.grad.isfinite().all()


@pytest.mark.parametrize("name", TWO_LABELS)
def test_gradients_of_first_and_second_order(name):
    cosine, y_crf, y_ret = random_case(N=1, H=3, W=4)

    def loss(cosine):  # at a temperature of 20 many gradients drown in the finite differences' rounding
        return getattr(losses, name)(cosine, y_crf, y_ret, temperature=4.0)

    assert torch.autograd.gradcheck(loss, cosine)
    assert torch.autograd.gradgradcheck(loss, cosine)


def test_one_label_alone():
    """H is 1 then: no loss, no gradient, and a void pixel asks for no second label."""
    cosine = torch.full((1, 1, 1, 3), 0.5, requires_grad=True)
    labels = torch.tensor([[[0, 0, VOID]]])
    loss = losses.noise_aware_loss(cosine, labels, labels)
    loss.backward()
    assert loss.item() == 0 and not cosine.grad.any()


@pytest.mark.parametrize("name", TWO_LABELS)
def test_uint8_labels(name):
    """As PNGs hold them, both or either; 200 labels: the last ones are no negative numbers."""
    cosine, y_crf, y_ret = random_case(L=200)
    for labels in ((y_crf.byte(), y_ret.byte()), (y_crf.byte(), y_ret), (y_crf, y_ret.byte())):
        same(name, cosine, *labels)


def test_uint8_labels_of_cross_entropy():
    cosine, labels, _ = random_case(L=200)
    same("cross_entropy", cosine, labels.byte())


@pytest.mark.parametrize("label", [4, -1, 254])
def test_a_label_that_does_not_exist_is_an_error(label):
    cosine, y_crf, y_ret = random_case(L=4)
    y_crf[0, 0, 0] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        losses.noise_aware_loss(cosine, y_crf, y_ret)


def test_sigma_is_not_detached():
    """With one pixel in ~S, sigma cancels; with two, raising the surer pixel's sigma moves the mean."""
    cosine, y_crf, y_ret = random_case(differ=1.0, void=0)
    full, = torch.autograd.grad(losses.noise_aware_loss(cosine, y_crf, y_ret), cosine)
    D = 1 + cosine.detach()
    sigma = (D.gather(1, y_crf[:, None])[:, 0] / D.amax(1)) ** 7
    nll = -(20 * cosine).log_softmax(1).gather(1, y_crf[:, None])[:, 0]
    detached, = torch.autograd.grad(0.1 * (sigma * nll).sum() / sigma.sum(), cosine)
    assert not torch.allclose(full, detached)


# ---- under PyTorch's tools ----

class Module(torch.nn.Module):
    def forward(self, *inputs):
        return losses.noise_aware_loss(*inputs)


def exported(loss):
    """The loss, exported with other numbers than it is called with."""
    cosine, y_crf, y_ret = random_case(void=0, seed=5)
    return torch.export.export(Module(), (cosine.detach().float(), y_crf, y_ret)).module()


def channels_last(loss):
    return lambda cosine, *labels: loss(cosine.contiguous(memory_format=torch.channels_last), *labels)


@pytest.mark.parametrize("under", [
    partial(torch.compile, fullgraph=True), exported, torch.autocast("cpu", torch.bfloat16), channels_last
], ids=["compile", "export", "autocast", "channels_last"])
def test_noise_aware_loss_under(under):
    cosine, y_crf, y_ret = random_case(seed=4)
    single = cosine.detach().float().requires_grad_()
    loss = under(losses.noise_aware_loss)(single, y_crf, y_ret)
    assert loss.dtype == torch.float32
    expected = reference.noise_aware_loss(cosine, y_crf, y_ret)
    ours, theirs = value_and_gradient(loss, single), value_and_gradient(expected, cosine)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TWO_LABELS)
def test_a_gradient_for_each_image_by_torch_func(name):
    """vmap over the images of a batch, each a batch of one."""
    cosine, y_crf, y_ret = random_case(N=3)

    def loss(cosine, *labels):
        return getattr(losses, name)(cosine[None], *(y[None] for y in labels))

    gradients, values = torch.func.vmap(torch.func.grad_and_value(loss))(cosine.detach(), y_crf, y_ret)
    for n, found in enumerate(zip(values, gradients)):
        image = cosine[n:n + 1].detach().requires_grad_()
        expected = value_and_gradient(getattr(reference, name)(image, y_crf[n:n + 1], y_ret[n:n + 1]), image)
        for ours, theirs in zip(found, (expected[0], expected[1][0])):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("wrong", [(2, 4, 4), (1, 8, 8), (2, 1, 8, 8)])
@pytest.mark.parametrize("name", ["noise_aware_loss", "agreement_loss", "entropy_loss", "bootstrap_loss"])
def test_labels_of_another_shape(name, wrong):
    cosine, right = torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)
    other = torch.zeros(wrong, dtype=torch.int64)
    for pair in ((other, other), (right, other), (other, right)):
        with pytest.raises(ValueError, match=r"^(labels are|y_crf is) \("):
            getattr(losses, name)(cosine, *pair)
    with pytest.raises(ValueError):
        losses.cross_entropy(cosine, other)
