"""segmentation-models-pytorch: its decoders on an encoder of this package, which it finds through timm as `tu-NAME`."""

import segmentation_models_pytorch as smp
import torch

import pcenet
from pcenet.data import SceneSource, build_segmentation_loader, segment_train_transform

EPOCHS = 3


def loader(split: str, count: int) -> torch.utils.data.DataLoader:
    scenes = SceneSource(split, count=count, size=(64, 64))
    transform = segment_train_transform((64, 64), scale=(1.0, 1.0))
    return build_segmentation_loader(scenes, transform, batch_size=8, train=True)


torch.manual_seed(0)
classes = len(SceneSource("train").classes)
model = smp.create_model(
    "unet", "tu-pce_nano_s2", encoder_weights=None, classes=classes, encoder_depth=3, decoder_channels=(64, 32, 16)
)
loss_of = torch.nn.CrossEntropyLoss(ignore_index=255)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(EPOCHS):
    for images, masks in loader("train", 96):
        with pcenet.record_routing(model) as records:
            loss = loss_of(model(images), masks)
        optimizer.zero_grad()
        (loss + pcenet.aux_loss(records)).backward()
        optimizer.step()
model.eval()
counts = [
    smp.metrics.get_stats(model(images).argmax(1), masks, mode="multiclass", num_classes=classes, ignore_index=255)
    for images, masks in loader("val", 24)
]
print("IoU", smp.metrics.iou_score(*map(torch.cat, zip(*counts, strict=True)), reduction="micro").item())
