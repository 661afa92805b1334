"""A LightningModule of your own: the auxiliary loss is added to the loss, and Lightning does the rest."""

import lightning
import timm
import torch
from torch.nn.functional import cross_entropy

import pcenet
from pcenet.data import build_loader, eval_transform, open_source


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("pce_nano", num_classes=10, widths=(12, 24, 48))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _index: int) -> torch.Tensor:
        images, labels = batch
        with pcenet.record_routing(self.model) as records:
            loss = cross_entropy(self.model(images), labels)
        return loss + pcenet.aux_loss(records)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _index: int) -> None:
        images, labels = batch
        self.log("top-1", (self.model(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def loader(split: str) -> torch.utils.data.DataLoader:
    transform = eval_transform(16, mean=(0.5,) * 3, std=(0.5,) * 3)
    return build_loader(open_source("digits", split), transform, batch_size=64, train=split == "train")


task = Classifier()
trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(task, loader("train"))
(result,) = trainer.validate(task, loader("val"), verbose=False)
print("top-1", result["top-1"])
