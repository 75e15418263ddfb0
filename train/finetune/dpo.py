"""Preference optimisation: TRL's DPO trainer on pairs of rows.

The reference is the adapter that the run starts from, kept frozen beside the one that learns (the
base itself where there is none), so that the first margin is 0.

B pairs, T tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
import trl
from packaging.version import Version
from trl import DPOConfig as TrlConfig
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from configs.finetune_schema import DpoConfig
from records import Collator
from train.finetune.preference import renderer
from train.finetune.rows import load_rows
from train.finetune.run import Run
from train.finetune.sft import lazy
from train.finetune.trainer import RunTrainer, arguments, pad_id, token_losses

MEASURED = ("loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")


def dpo(run: Run) -> int:
    run.prepare()
    cfg: DpoConfig = run.cfg
    pairs, heldout, card = load_rows(run, "preferences", renderer(run.tokenizer, cfg.data))
    card |= {"format": "preference", "passages_cut": sum(pair.passages_cut for pair in pairs)}
    args = arguments(
        TrlConfig,
        run,
        beta=cfg.dpo.beta,
        loss_type=[cfg.dpo.loss],
        label_smoothing=cfg.dpo.label_smoothing,
        max_length=None,  # pairs that are too long were set aside
    )
    run.build_model()
    run.identify(card)
    return PreferenceTrainer(
        run,
        [pair._asdict() for pair in heldout],
        args=args,
        train_dataset=lazy([pair._asdict() for pair in pairs]),
        data_collator=PairCollator(pad_id(run.tokenizer)),
        processing_class=copy.deepcopy(run.tokenizer),
    ).fit()


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
    def __init__(self, run: Run, heldout: list[dict], **options: Any) -> None:
        super().__init__(run, heldout, **options)
        if Version(trl.__version__) < Version("1.16"):
            # it sums log-probabilities in the dtype of the logits: bf16 is right to a quarter nat
            output = self.model.get_output_embeddings()
            output.register_forward_hook(lambda module, args, logits: logits.float())

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # rendered already

    def measure(self) -> dict[str, float]:
        """Over all held-out pairs: the loss of the sigmoid objective, how often the chosen answer
        has the higher reward, by how much, and the rewards."""
        sums = torch.zeros(len(MEASURED) + 1, dtype=torch.float64)
        policy = self.accelerator.unwrap_model(self.model)
        for pairs, counted in self.shares():
            batch = tuple(self.collated(pairs).values())
            ours = -token_losses(self.model, *batch)[0].sum(1)
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                reference = -token_losses(self.model, *batch)[0].sum(1)
            chosen, rejected = (self.beta * (ours - reference).double().cpu()).chunk(2)
            margin = chosen - rejected
            loss, right = -F.logsigmoid(margin), (margin > 0).double()
            values = (loss, right, margin, chosen, rejected, torch.ones_like(margin))
            sums += torch.stack(values)[:, counted].sum(1)
        *found, count = self.run.world.sum(sums).tolist()
        return {name: value / count for name, value in zip(MEASURED, found, strict=True)}
