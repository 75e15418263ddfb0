"""Supervised fine-tuning: TRL's trainer on rows (input_ids, loss_mask).

B rows, T tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from configs.finetune_schema import SftConfig
from records import Collator, load_dataset_for
from train.finetune.run import Run
from train.finetune.trainer import RunTrainer, arguments, pad_id, shares, token_losses
from train.runs import require_supervised


def sft(run: Run) -> int:
    run.prepare()
    cfg: SftConfig = run.cfg
    out = run.output if run.world.first else None
    data = load_dataset_for(cfg.data, run.tokenizer, split="train", out_dir=out)
    heldout = load_dataset_for(cfg.data, run.tokenizer, split="eval", out_dir=out)
    require_supervised(data.stats["supervised_tokens"], cfg.data.min_supervised_tokens)
    args = arguments(
        TrlConfig,
        run,
        max_length=None,  # rows are cut by the data layer, which says so
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    run.build_model()
    names = ("rows", "records", "bad", "truncated", "tokens", "supervised_tokens")
    run.identify(
        {
            "format": cfg.data.format,
            "files": [path.name for path in data.paths],
            **{name: data.stats[name] for name in names},
            "heldout_rows": len(heldout),
        }
    )
    return SftTrainer(
        run,
        heldout,
        mixture=data,
        args=args,
        train_dataset=lazy(data),
        data_collator=LabelCollator(pad_id(run.tokenizer)),
        processing_class=copy.deepcopy(run.tokenizer),
    ).fit()


class SftTrainer(RunTrainer, SFTTrainer):
    def measure(self) -> dict[str, float]:
        batch = self.args.per_device_eval_batch_size
        return token_loss(self.model, self.heldout, self.data_collator, self.run.world, batch)


class LabelCollator:
    """Batches as trainers take them: input_ids, attention_mask, labels, [B, T] int64; labels are
    -100 where the loss mask is 0."""

    def __init__(self, pad: int) -> None:
        self.collate = Collator(pad, pad_to_multiple=8)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"].long(),
            "labels": batch["input_ids"].masked_fill(~batch["loss_mask"], -100),
        }


def lazy(rows: Any) -> Dataset:
    """Anything with rows by number as the `datasets.Dataset` that TRL asks for, read when asked."""

    def read(asked: dict[str, list[int]]) -> dict[str, list]:
        found = [rows[n] for n in asked["row"]]
        return {key: [row[key] for row in found] for key in found[0]}

    return Dataset.from_dict({"row": range(len(rows))}).with_transform(read)


@torch.no_grad()
def token_loss(
    model: nn.Module, rows: Any, collate: LabelCollator, world: Any, batch_size: int
) -> dict[str, float]:
    """Mean negative log-likelihood (nats) and accuracy over all supervised tokens of `rows`,
    exactly: it depends neither on the batches nor on the ranks. All ranks must call it."""
    sums = torch.zeros(3, dtype=torch.float64)
    for numbers, counted in shares(len(rows), world, batch_size):
        batch = {k: v.to(world.device) for k, v in collate([rows[n] for n in numbers]).items()}
        mask = batch["labels"] != -100
        mask &= torch.tensor(counted, device=world.device)[:, None]
        nll, right = token_losses(model, batch["input_ids"], batch["attention_mask"], mask)
        sums += torch.stack([nll.double().sum(), right.sum(), mask[:, 1:].sum()]).cpu()
    loss, right, tokens = world.sum(sums).tolist()
    return {
        "loss": loss / max(tokens, 1),
        "token_accuracy": right / max(tokens, 1),
        "tokens": tokens,
    }
