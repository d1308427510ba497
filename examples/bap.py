"""BAP in a training loop of your own, beside a copy of models.py. Each box's
features are trained to be its class, the background's queries to be class 0.
VOC 2012 is in data/VOCdevkit/VOC2012; a step takes one image of list train.

VOC's xmin and ymin count from 1. datasets.py subtracts 1; this does not.
"""
import torch
from torch.nn import functional as F
from torchvision.datasets import VOCDetection, wrap_dataset_for_transforms_v2
from torchvision.models.segmentation import fcn_resnet50
from torchvision.transforms import v2

from models import BAP, outside_boxes, padded_size

prepare = v2.Compose([
    v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
# In evaluation mode, so that batch normalisation keeps its statistics.
resnet = fcn_resnet50(weights_backbone="IMAGENET1K_V1").backbone.eval()
pooling, classifier = BAP(), torch.nn.Linear(2048, 21, bias=False)
parameters = [*resnet.parameters(), *classifier.parameters()]
optimizer = torch.optim.SGD(parameters, lr=1e-3)

images = VOCDetection("data", transforms=prepare)
for image, target in wrap_dataset_for_transforms_v2(images):
    size, boxes = image.shape[1:], target["boxes"].float()
    # BAP takes the corner cells to lie on the corner pixels: at stride 8,
    # sides are 8 k + 1.
    height, width = padded_size(size)
    padding = (0, width - size[1], 0, height - size[0])
    maps = resnet(F.pad(image[None], padding))["out"]
    background = F.pad(outside_boxes([boxes], size), padding)
    pooled = pooling(maps, [boxes], (height, width), background)
    features = torch.cat((pooled.foreground.flatten(0, 1), pooled.queries))
    # A box has 2 x 2 features.
    labels = target["labels"].repeat_interleave(4)
    labels = F.pad(labels, (0, len(pooled.queries)))
    loss = F.cross_entropy(classifier(features), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
