"""What can be known of a GPU without one: tensors that have a device and a shape, but no numbers, need none.

Where each operation runs and what waits for the GPU is seen; numbers, speed and the backward pass are not.
"""
import pytest
import torch
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
