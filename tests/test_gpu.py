"""What can be known of a GPU without one: tensors that have a device and a shape, but no numbers, need none.

Where each operation runs and what waits for the GPU is seen; numbers, speed and the backward pass are not. The tests at
the end show numbers, and are skipped without a GPU.
"""
import pytest
import torch
from conftest import script
from test_kill import SMALL
from test_models import pooling_case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import models
import settings
import train_cls
import train_seg
from models import BAP

SIZE = 65, 65


class Waits(TorchDispatchMode):
    """Notes what makes the CPU wait for the GPU: a transfer that blocks, or is of memory that is not pinned, or values
    or a shape read off the GPU.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out, kwargs = op(*args, **kwargs or {}), kwargs or {}
        given = args[0].device.type if args and isinstance(args[0], torch.Tensor) else None
        masks = op is torch.ops.aten.index.Tensor and any(index.dtype == torch.bool for index in args[1])
        reads = masks or op is torch.ops.aten.nonzero.default or torch.Tag.data_dependent_output in op.tags
        moved = op is torch.ops.aten._to_copy.default and out.device.type != given
        waits = not kwargs.get("non_blocking") or moved and not getattr(args[0], "pinned", False)
        if given == "cuda" and (reads or moved) or moved and waits:
            self.found.append(str(op))
        return out


@pytest.fixture
def on_gpu(monkeypatch):
    """Calls function(*make()) on tensors without numbers; tells what in it waits, of make nothing."""
    def pin(tensor):
        tensor.pinned = True
        return tensor

    def run(make, function):
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            with torch.device("cuda"):
                given = make()
            with Waits() as waits:
                out = function(*given)
        return out, waits.found

    check = models.check_boxes  # reads the values of those on the CPU, which have none here
    monkeypatch.setattr(models, "check_boxes", lambda boxes: check([b for b in boxes if b.device.type != "cpu"]))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return run


@pytest.mark.parametrize("device, waits", [("cpu", []), ("cuda", ["aten.nonzero.default"])])
def test_bap(on_gpu, device, waits):
    """Boxes and background may be on the GPU, too, but then the number of queries is waited for."""
    features, boxes, image_size, background = pooling_case()

    def make():
        *here, mask = [torch.empty(tensor.shape, device=device) for tensor in (*boxes, background)]
        return torch.empty(features.shape), here, image_size, mask

    pooled, found = on_gpu(make, BAP())
    assert all(out.device.type == "cuda" for out in pooled)
    assert found == waits


def test_bap_is_exported_with_features_on_a_gpu():
    """Boxes and background on the CPU; a graph cannot pin memory."""
    features, boxes, image_size, background = pooling_case()
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        here = torch.empty(features.shape, device="cuda")
        *boxes, background = [torch.empty(tensor.shape) for tensor in (*boxes, background)]
    program = torch.export.export(BAP(), (here, boxes, image_size, background))
    *_, output = program.graph.nodes
    assert all(node.meta["val"].device.type == "cuda" for node in output.args[0])


@pytest.mark.parametrize("pooling", [BAP(), BAP(min_background=1.0)])
def test_the_classifiers_losses_wait_for_nothing(on_gpu, pooling):
    boxes = [torch.tensor([[3.0, 4, 40, 50], [10, 10, 30, 60]]), torch.zeros(0, 4)]
    batch = dict(boxes=boxes, labels=[torch.ones(len(b), dtype=torch.int64) for b in boxes],
                 background=models.outside_boxes(boxes, SIZE).byte())

    def make():
        network = models.BoxClassifier(3, width=0.125, pooling=pooling)
        return network, batch | {"image": torch.empty(2, 3, *SIZE, dtype=torch.uint8)}

    values, found = on_gpu(make, train_cls.objective)
    assert all(value.device.type == "cuda" for value in values.values())
    assert found == []


@pytest.mark.parametrize("loss", ["nal", "crf", "ret", "agree", "entropy", "bootstrap"])
def test_the_segmenters_losses_wait_for_nothing(on_gpu, loss):
    def make():
        labels = torch.empty(2, 2, *SIZE, dtype=torch.int64)
        return models.DeepLab(4, width=0.125), torch.empty(2, 3, *SIZE, dtype=torch.uint8), *labels

    def losses(network, images, y_crf, y_ret):
        return train_seg.segmentation_loss(settings.TrainSeg(loss=loss), network(images), y_crf, y_ret)

    value, found = on_gpu(make, losses)
    assert value.device.type == "cuda"
    assert found == []


# ---- on a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def training(stage, device):
    """-> (a small network on the device, its loss as a function without arguments)"""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    y_crf, y_ret = torch.randint(4, (2, 2, *SIZE)).to(device)
    boxes = [torch.tensor([[3.0, 4, 40, 50], [10, 10, 30, 60]]), torch.zeros(0, 4)]
    batch = dict(image=images.to(device), boxes=boxes, labels=[torch.ones(len(b), dtype=torch.int64) for b in boxes],
                 background=models.outside_boxes(boxes, SIZE).byte())
    if stage == "train_cls":
        network = models.BoxClassifier(3, width=0.125, dropout=0).train().to(device)
        return network, lambda: train_cls.objective(network, batch)["loss"]
    network = models.DeepLab(4, width=0.125, dropout=0).train().to(device)
    return network, lambda: train_seg.segmentation_loss(settings.TrainSeg(), network(batch["image"]), y_crf, y_ret)


def loss_and_gradient(stage, device, bf16=False):
    network, loss = training(stage, device)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        value = loss()
    value.backward()
    return torch.cat([value.detach()[None], *(p.grad.flatten() for p in network.parameters())]).cpu().double()


@needs_gpu
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-4), (True, 0.3)])
@pytest.mark.parametrize("stage", ["train_cls", "train_seg"])
def test_loss_and_gradient_are_those_of_the_cpu(monkeypatch, stage, bf16, tolerance):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected, got = loss_and_gradient(stage, "cpu"), loss_and_gradient(stage, "cuda", bf16)
    assert (got - expected).norm() <= tolerance * expected.norm()


@needs_gpu
@pytest.mark.parametrize("stage", ["train_cls", "train_seg"])
def test_a_training_step_waits_for_nothing(stage):
    network, loss = training(stage, "cuda")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    try:
        for mode in ("default", "error"):  # the first step sets things up
            torch.cuda.set_sync_debug_mode(mode)
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_deterministic_runs_are_equal(tmp_path):
    """Both trainings, twice, bit for bit."""
    for name in ("first", "second"):
        for stage in ("train_cls", "make_labels", "train_seg"):
            run = script(stage, *SMALL, f"run.name={name}", "data.train=val", "data.val=", cwd=tmp_path)
            assert run.returncode == 0, run.stderr
    for file in ("cls.pt", "seg.pt"):
        first, second = (models.read_file(tmp_path / "runs" / name / file)["model"] for name in ("first", "second"))
        assert all(torch.equal(first[key], second[key]) for key in first)
