"""Preference optimisation: TRL's DPO trainer on the rows of our data layer.

The reference is the adapter that the run starts from, kept frozen beside the one that learns (the
base itself where there is none), so that the first margin is 0.

B pairs, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import trl
from packaging.version import Version
from trl import DPOConfig as TrlConfig
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from configs.finetune_schema import DpoConfig
from eagle.errors import EagleError
from records import Collator
from records.dataset import held_out_rows
from records.sources import resolve
from train.finetune.assistant import shipped_preferences
from train.finetune.preference import Pair, load_pairs
from train.finetune.run import Run
from train.finetune.sft import lazy, pad_id
from train.finetune.training import RunTrainer, arguments, shares


def dpo(run: Run) -> int:
    cfg: DpoConfig = run.cfg
    run.prepare()
    pairs, heldout, card = load_data(run)
    args = TrlConfig(
        **arguments(run),
        beta=cfg.dpo.beta,
        loss_type=[cfg.dpo.loss],
        label_smoothing=cfg.dpo.label_smoothing,
        max_length=None,  # pairs that are too long were set aside
    )
    run.build_model()
    run.identify(card)
    trainer = PreferenceTrainer(
        run,
        args=args,
        heldout=heldout,
        train_dataset=lazy([as_row(pair) for pair in pairs]),
        data_collator=PairCollator(pad_id(run.tokenizer)),
        processing_class=run.trainer_tokenizer(),
    )
    return trainer.fit()


def load_data(run: Run) -> tuple[list[Pair], list[Pair], dict]:
    """Pairs for training, held-out pairs, and the data card."""
    cfg: DpoConfig = run.cfg

    def load(paths: list[Path], name: str, most: int | None) -> tuple[list[Pair], dict]:
        out = run.output / name if run.world.first else None
        limited = cfg.data.model_copy(update={"max_rows": most})
        return load_pairs(limited, run.tokenizer, paths, out)

    files = resolve(cfg.data.paths) if cfg.data.paths else [shipped_preferences(cfg.data, "train")]
    pairs, card = load(files, "quarantine.jsonl", cfg.data.max_rows)
    if cfg.data.eval_paths or not cfg.data.paths:
        given = cfg.data.eval_paths
        kept = resolve(given) if given else [shipped_preferences(cfg.data, "eval")]
        heldout, _ = load(kept, "quarantine_eval.jsonl", cfg.data.max_eval_rows)
    else:
        held = held_out_rows(np.array([pair.key for pair in pairs]), cfg.data.heldout_fraction)
        heldout = [pair for pair, out in zip(pairs, held, strict=True) if out]
        pairs = [pair for pair, out in zip(pairs, held, strict=True) if not out]
    if not pairs or not heldout:
        raise EagleError(
            f"{len(pairs)} pairs are left to train on and {len(heldout)} held out: add data, or change "
            "data.heldout_fraction"
        )
    card |= {"format": "preference", "heldout_rows": len(heldout)}
    return pairs, heldout, card


def as_row(pair: Pair) -> dict:
    return {"chosen": pair.chosen, "rejected": pair.rejected}


class PairCollator:
    """Pairs as TRL's DPO loss takes them: input_ids, attention_mask, completion_mask [2B, T], all
    chosen rows before all rejected ones."""

    def __init__(self, pad: int) -> None:
        self.collate = Collator(pad, pad_to_multiple=8)

    def __call__(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        rows = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
        batch = self.collate([{"input_ids": r[0], "loss_mask": r[1]} for r in rows])
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"].long(),
            "completion_mask": batch["loss_mask"].long(),
        }


class PreferenceTrainer(RunTrainer, DPOTrainer):
    def __init__(self, run: Run, heldout: list[Pair], **options: Any) -> None:
        self.heldout = heldout
        super().__init__(run, eval_dataset=options["train_dataset"].select([0]), **options)
        if Version(trl.__version__) < Version("1.16"):
            # it sums log-probabilities in the dtype of the logits, where bf16 is right to a quarter
            # of a nat
            output = self.model.get_output_embeddings()
            output.register_forward_hook(lambda module, args, logits: logits.float())

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # rendered already

    def log_probs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[2B]: of each completion, in nats."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits = self.model(**inputs, use_cache=False).logits[:, :-1]
        kept, labels = batch["completion_mask"][:, 1:].bool(), batch["input_ids"][:, 1:]
        nll = F.cross_entropy(logits[kept].float(), labels[kept], reduction="none")
        return nll.new_zeros(kept.shape).masked_scatter(kept, -nll).sum(1)

    def measure(self) -> dict[str, float]:
        """Over all held-out pairs: the loss of the sigmoid objective, how often the chosen answer
        has the higher reward, by how much, and the rewards."""
        sums = torch.zeros(6, dtype=torch.float64)
        batch_size = self.args.per_device_eval_batch_size
        policy = self.accelerator.unwrap_model(self.model)
        for numbers, counted in shares(len(self.heldout), self.run.world, batch_size):
            batch = self.data_collator([as_row(self.heldout[n]) for n in numbers])
            batch = {k: v.to(self.run.world.device) for k, v in batch.items()}
            ours = self.log_probs(batch)
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                reference = self.log_probs(batch)
            chosen, rejected = (
                self.beta * (a - b).double().cpu()
                for a, b in zip(ours.chunk(2), reference.chunk(2), strict=True)
            )
            margin, keep = chosen - rejected, torch.tensor(counted)
            values = torch.stack(
                [
                    -F.logsigmoid(margin),
                    (margin > 0).double(),
                    margin,
                    chosen,
                    rejected,
                    torch.ones_like(margin),
                ]
            )
            sums += values[:, keep].sum(1)
        loss, right, margin, chosen, rejected, count = self.run.world.sum(sums).tolist()
        return {
            "loss": loss / count,
            "reward_accuracy": right / count,
            "reward_margin": margin / count,
            "reward_chosen": chosen / count,
            "reward_rejected": rejected / count,
        }
