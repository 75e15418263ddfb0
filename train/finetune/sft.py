"""Supervised fine-tuning: TRL's trainer on rows (input_ids, loss_mask).

B rows, T tokens.
"""

from __future__ import annotations

import pyarrow as pa
import torch
from datasets import Dataset
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from records import TokenizedData, load_dataset_for
from records.dataset import tell_shared
from train.finetune.run import Run
from train.finetune.trainer import RunTrainer, begin, token_losses
from train.runs import require_supervised


def sft(run: Run) -> int:
    cfg, out = run.cfg.data, run.output if run.world.first else None
    data, heldout = (
        load_dataset_for(cfg, run.tokenizer, split=split, out_dir=out)
        for split in ("train", "eval")
    )
    tell_shared(data.content, heldout.content)
    require_supervised(data.stats["supervised_tokens"], cfg.min_supervised_tokens)
    # rows are cut by the data layer, which says so
    prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    card = {"format": cfg.format, "files": [path.name for path in data.paths], **data.stats}
    del card["cache_hit"]
    card |= {"heldout_rows": len(heldout), "digest": data.digest}
    args = begin(run, card, TrlConfig, **prepared)
    for rows in (data, heldout):
        rows.require_ids_below(run.model.config.get_text_config().vocab_size)
    collate = DataCollatorForLanguageModeling(run.tokenizer.pad_token_id or 0, pad_to_multiple_of=8)
    return SftTrainer(run, args, Labelled(data), Labelled(heldout), collate, data).fit()


class SftTrainer(RunTrainer, SFTTrainer):
    def measure(self) -> dict[str, float]:
        """Mean negative log-likelihood (nats) and accuracy over all supervised held-out tokens,
        exactly: it depends neither on the batches nor on the ranks."""
        sums = torch.zeros(3, dtype=torch.float64)
        for rows, counted in self.shares():
            batch = self.collated(rows)
            mask = (batch["labels"] != -100) & counted[:, None].to(batch["labels"].device)
            nll, right = token_losses(self.model, batch["input_ids"], batch["attention_mask"], mask)
            sums += torch.stack([nll.double().sum(), right.sum(), mask[:, 1:].sum()]).cpu()
        loss, right, tokens = self.run.world.sum(sums).tolist()
        count = max(tokens, 1)
        return {"loss": loss / count, "token_accuracy": right / count, "tokens": tokens}


class Labelled(Dataset):
    """Rows as TRL asks for them, read when asked: labels are -100 where the loss mask is 0. As
    long as they are, without a table of them."""

    def __init__(self, rows: TokenizedData) -> None:
        super().__init__(pa.table({"input_ids": [[0]], "labels": [[0]]}))
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        row = self.rows[number]
        pairs = zip(row["input_ids"], row["loss_mask"], strict=True)
        labels = [token if kept else -100 for token, kept in pairs]
        return {"input_ids": row["input_ids"], "labels": labels}

    __getitems__ = None  # of a loader's batch: one by one
