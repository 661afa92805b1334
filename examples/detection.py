"""torchvision's detectors on a backbone of this package: its maps of several strides go through a feature pyramid."""

import timm
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, masks_to_boxes
from torchvision.transforms.v2.functional import to_dtype, to_image

import pcenet
from pcenet.data import SceneSource


class Backbone(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 32
        self.maps = timm.create_model("pce_nano_s2", features_only=True)  # strides 2, 4, 8
        self.pyramid = FeaturePyramidNetwork(self.maps.feature_info.channels(), self.out_channels)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid({str(level): x for level, x in enumerate(self.maps(x))})


scenes, kinds = SceneSource("train", count=4), ("person", "tree", "building", "pavement")
images, targets = [to_dtype(to_image(scenes.image(index)), scale=True) for index in range(4)], []
for index in range(4):
    things, numbers = scenes.objects(index), torch.from_numpy(scenes.instances(index))
    boxes = masks_to_boxes(torch.stack([numbers == thing.number for thing in things])) + torch.tensor([0, 0, 1, 1])
    targets.append({"boxes": boxes, "labels": torch.tensor([1 + kinds.index(thing.class_name) for thing in things])})
anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
model = FasterRCNN(Backbone(), 1 + len(kinds), min_size=128, max_size=128, rpn_anchor_generator=anchors)
pcenet.attach_aux_losses(model)  # torchvision's own training loop may then be used as it is
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(10):
    loss = sum(model(images, targets).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("loss", loss.item())
