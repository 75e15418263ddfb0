"""Supervised fine-tuning: TRL's trainer on the rows of our data layer.

    rows (input_ids, loss_mask) -> labels, -100 where the mask is 0

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from configs.finetune_schema import SftConfig
from eagle.errors import EagleError
from records import Collator, load_dataset_for
from train.finetune.run import Run
from train.finetune.training import RunTrainer, arguments, shares


def sft(run: Run) -> int:
    cfg: SftConfig = run.cfg
    run.prepare()
    out = run.output if run.world.first else None
    data = load_dataset_for(cfg.data, run.tokenizer, split="train", out_dir=out)
    heldout = load_dataset_for(cfg.data, run.tokenizer, split="eval", out_dir=out)
    found = data.stats["supervised_tokens"]
    if found < cfg.data.min_supervised_tokens:
        raise EagleError(
            f"the data has {found} supervised tokens, fewer than data.min_supervised_tokens="
            f"{cfg.data.min_supervised_tokens}; add data, or lower the limit"
        )
    options = arguments(run)
    args = TrlConfig(
        **options,
        max_length=None,  # rows are cut by the data layer, which says so
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=cfg.data.num_workers or 0,
    )
    run.build_model()
    run.identify(data_card(cfg.data.format, data, heldout))
    trainer = SftTrainer(
        run,
        args=args,
        heldout=heldout,
        train_dataset=lazy(data),
        data_collator=LabelCollator(pad_id(run.tokenizer)),
        processing_class=run.trainer_tokenizer(),
    )
    trainer.add_callback(EpochOrder(data))
    return trainer.fit()


class SftTrainer(RunTrainer, SFTTrainer):
    def __init__(self, run: Run, heldout: Any, **options: Any) -> None:
        self.heldout = heldout
        super().__init__(run, eval_dataset=options["train_dataset"].select([0]), **options)

    def measure(self) -> dict[str, float]:
        batch = self.args.per_device_eval_batch_size
        return token_loss(self.model, self.heldout, self.data_collator, self.run.world, batch)


class LabelCollator:
    """The data layer's batches as trainers take them: input_ids, attention_mask and labels, [B, T]
    int64.
    """

    def __init__(self, pad: int) -> None:
        self.collate = Collator(pad, pad_to_multiple=8)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"].long(),
            "labels": batch["input_ids"].masked_fill(~batch["loss_mask"], -100),
        }


class EpochOrder(TrainerCallback):
    """A mixture has another order in each epoch."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.data.set_epoch(int(state.epoch or 0))


def lazy(rows: Any) -> Dataset:
    """Anything with rows by number as a `datasets.Dataset`, which TRL asks for: read when asked,
    not copied.
    """

    def read(asked: dict[str, list[int]]) -> dict[str, list]:
        found = [rows[n] for n in asked["row"]]
        return {key: [row[key] for row in found] for key in found[0]}

    return Dataset.from_dict({"row": range(len(rows))}).with_transform(read)


def pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def data_card(kind: str, data: Any, heldout: Any) -> dict:
    names = ("rows", "records", "bad", "truncated", "tokens", "supervised_tokens")
    return {
        "format": kind,
        "files": [path.name for path in data.paths],
        **{name: data.stats[name] for name in names},
        "heldout_rows": len(heldout),
    }


@torch.no_grad()
def token_loss(
    model: nn.Module, rows: Any, collate: LabelCollator, world: Any, batch_size: int
) -> dict[str, float]:
    """Mean negative log-likelihood (nats) and accuracy over all supervised tokens of `rows`,
    exactly: it depends neither on the batches nor on the ranks. All ranks must call it."""
    sums = torch.zeros(3, dtype=torch.float64)
    for numbers, counted in shares(len(rows), world, batch_size):
        batch = collate([rows[n] for n in numbers])
        batch = {k: v.to(world.device) for k, v in batch.items()}
        labels = batch.pop("labels")[:, 1:].clone()
        labels[~torch.tensor(counted, device=labels.device)] = -100
        logits = model(**batch, use_cache=False).logits[:, :-1]
        kept = labels != -100
        logits, labels = logits[kept].float(), labels[kept]
        nll = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum()
        sums += torch.stack([nll.double(), right.double(), kept.sum().double()]).cpu()
    loss, right, tokens = world.sum(sums).tolist()
    return {
        "loss": loss / max(tokens, 1),
        "token_accuracy": right / max(tokens, 1),
        "tokens": tokens,
    }
