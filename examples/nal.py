"""NAL in a training loop of your own, beside a copy of losses.py. VOC 2012 is
in data/VOCdevkit/VOC2012; a step takes one image of its list train.

The two labels here are stand-ins: whole boxes, and boxes without their rims.
Any two (N, H, W) tensors of labels will do, such as Ycrf and Yret from files.
Cells lie exactly on their pixels if images are padded first, as in bap.py.
"""
import torch
from torch.nn import functional as F
from torchvision.datasets import VOCDetection, wrap_dataset_for_transforms_v2
from torchvision.models.segmentation import fcn_resnet50
from torchvision.transforms import v2

from losses import noise_aware_loss

prepare = v2.Compose([
    v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
# In evaluation mode, so that batch normalisation keeps its statistics.
resnet = fcn_resnet50(weights_backbone="IMAGENET1K_V1").backbone.eval()
classes = torch.randn(21, 2048, 1, 1, requires_grad=True)
optimizer = torch.optim.SGD([*resnet.parameters(), classes], lr=1e-3)

images = VOCDetection("data", transforms=prepare)
for image, target in wrap_dataset_for_transforms_v2(images):
    size, boxes = image.shape[1:], target["boxes"].int().tolist()
    y_crf, y_ret = torch.zeros(2, 1, *size, dtype=torch.int64)
    for (x0, y0, x1, y1), label in zip(boxes, target["labels"]):
        y_crf[:, y0:y1, x0:x1] = label
        y_ret[:, y0 + 9:max(y1 - 9, 0), x0 + 9:max(x1 - 9, 0)] = label
    phi = F.normalize(resnet(image[None])["out"])
    cosine = F.conv2d(phi, F.normalize(classes))
    cosine = F.interpolate(cosine, size, mode="bilinear", align_corners=True)
    loss = noise_aware_loss(cosine, y_crf, y_ret)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
