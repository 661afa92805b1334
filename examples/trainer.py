"""Hugging Face's Trainer: transformers wraps any network of timm, ours too, so that it returns loss and logits."""

import torch
from transformers import AutoModelForImageClassification, TimmWrapperConfig, Trainer, TrainingArguments

import pcenet
from pcenet.data import eval_transform, open_source

prepare = eval_transform(16, mean=(0.5,) * 3, std=(0.5,) * 3)


class Digits(torch.utils.data.Dataset):
    def __init__(self, split: str) -> None:
        self.source = open_source("digits", split)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": prepare(self.source.image(index)), "labels": self.source.labels[index]}


config = TimmWrapperConfig(architecture="pce_nano", num_labels=10, model_args={"widths": (12, 24, 48)})
model = AutoModelForImageClassification.from_config(config)
pcenet.attach_aux_losses(model, scale=1 / 2)  # the Trainer divides its loss by the batches that it accumulates
arguments = TrainingArguments(
    output_dir="trainer",
    num_train_epochs=2,
    per_device_train_batch_size=32,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
)
trainer = Trainer(model, arguments, train_dataset=Digits("train"))
trainer.train()
found = trainer.predict(Digits("val"))
print("top-1", (found.predictions.argmax(axis=1) == found.label_ids).mean())
