"""Hugging Face's `transformers.Trainer`: it calls backward itself, so `compute_loss` returns `joint_loss`.

python examples/with_hf_trainer.py
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from digits import accuracies, datasets, loaders, pretrained
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import bitstrata as bs


class JointTrainer(Trainer):
    """Trains every precision; evaluates the widest."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if model.training:
            return bs.joint_loss(model, inputs["pixel_values"], inputs["labels"])
        logits = model(inputs["pixel_values"])
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*items, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(quick: bool = False, artifact: str = "digits-trainer.strata") -> dict[int, float]:
    torch.manual_seed(0)
    train, test = datasets(quick)
    batches, test_batches = loaders(quick)
    model = pretrained(batches, epochs=2 if quick else 10)

    example, _ = next(iter(batches))
    bs.quantize_(model, bs.recipes.strata(w=(1, 2, 4)), example, input=bs.Pixels((0.0,), (1.0,)))
    bs.calibrate_(model, [example])

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1 if quick else 5,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            remove_unused_columns=False,  # the items are pairs, which `collate` names
            label_names=["labels"],
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        bs.accumulate_(model, arguments.gradient_accumulation_steps)
        # The trainer's own groups would decay step sizes; parameter_groups does not.
        optimizer = torch.optim.SGD(bs.parameter_groups(model, weight_decay=1e-4), lr=0.02, momentum=0.9)
        trainer = JointTrainer(
            model, arguments, data_collator=collate, train_dataset=train, eval_dataset=test, compute_metrics=accuracy,
            optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.train()

    network = model.cpu().eval()
    bs.pack(bs.lower(network, example), artifact, overwrite=True)
    return accuracies(network, test_batches)


if __name__ == "__main__":
    for bits, share in main("--quick" in sys.argv).items():
        print(f"{bits} bits: {share:.2%}")
