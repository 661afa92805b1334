"""timm's way of training, as its train.py has it: optimiser, schedule, moving average and loaders are timm's."""

import timm
import torch
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler

import pcenet
from pcenet.data import open_source


class Digits(torch.utils.data.Dataset):
    def __init__(self, split: str) -> None:
        self.source = open_source("digits", split)
        self.transform = None  # create_loader sets it

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.source.image(index)), self.source.labels[index]


options = {"input_size": (3, 16, 16), "batch_size": 64, "num_workers": 0, "use_prefetcher": False, "hflip": 0.0}
loaders = {split: create_loader(Digits(split), **options, is_training=split == "train") for split in ("train", "val")}
model = timm.create_model("pce_nano", num_classes=10, widths=(12, 24, 48))  # small: the digits are
pcenet.attach_aux_losses(model)  # the one line that a loop without aux_loss needs
average, scaler = ModelEmaV3(model, decay=0.9), NativeScaler(device="cpu")
optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=3)
for epoch in range(3):
    for images, labels in loaders["train"]:
        optimizer.zero_grad()
        scaler(torch.nn.functional.cross_entropy(model(images), labels), optimizer, parameters=model.parameters())
        average.update(model)
    scheduler.step(epoch + 1)
right = [(average.module.eval()(x).argmax(1) == y).float() for x, y in loaders["val"]]
print("top-1", torch.cat(right).mean().item())
