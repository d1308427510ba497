"""The segmenter as torch.export and ONNX have it, with any height and width: the cosines of the network itself."""
import pytest
import torch
from torch.export import Dim

import models

# Of sides 8 k + 1, for which no padding is needed, and others.
SIZES = [(64, 64), (65, 65), (321, 321), (322, 322), (375, 500), (33, 500)]


def same_cosines(network, other, sizes):
    g = torch.Generator().manual_seed(1)
    for size in sizes:
        image = torch.rand(1, 3, *size, generator=g)
        with torch.inference_mode():
            expected = network(image)
        assert expected.shape[2:] == size and expected.std() > 0.01
        torch.testing.assert_close(other(image), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backbone, width, sizes", [("vgg16", 0.0625, SIZES), ("resnet50", 1, [(65, 65), (33, 70)])])
def test_any_height_and_width(tmp_path, backbone, width, sizes):
    torch.manual_seed(0)
    network = models.DeepLab(21, backbone, width=width).eval()
    program = torch.export.export(network, (torch.rand(1, 3, 70, 91),),
                                  dynamic_shapes={"images": {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}})
    same_cosines(network, program.module(), sizes)

    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime
    torch.onnx.export(program, dynamo=True).save(tmp_path / "seg.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "seg.onnx", options, providers=["CPUExecutionProvider"])
    same_cosines(network, lambda image: torch.from_numpy(session.run(None, {"images": image.numpy()})[0]), sizes)
