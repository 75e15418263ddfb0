"""Preference optimisation: TRL's DPO trainer on pairs of rows.

The reference is the adapter that the run starts from, kept frozen beside the one that learns (the
base itself where there is none), so that the first margin is 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from packaging.version import Version
from trl import DPOConfig as TrlConfig
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import use_adapter

from configs.finetune_schema import DpoConfig
from records.chat import require_template
from train.finetune.preference import render_pair
from train.finetune.run import Run, load_rows
from train.finetune.trainer import RunTrainer, begin, token_losses

MEASURED = ("loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")


def dpo(run: Run) -> int:
    cfg: DpoConfig = run.cfg
    if cfg.data.template == "chat":
        require_template(run.tokenizer)
    pairs, heldout, card = load_rows(
        run, "preferences", lambda record: [render_pair(record, run.tokenizer, cfg.data)]
    )
    card |= {"format": "preference", "passages_cut": sum(pair.passages_cut for pair in pairs)}
    loss = {"loss_type": [cfg.dpo.loss], **cfg.dpo.model_dump(exclude={"loss"})}
    # pairs that are too long were set aside
    args = begin(run, card, TrlConfig, max_length=None, **loss)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    sets = [
        Dataset.from_dict({name: [getattr(pair, name) for pair in part] for name in columns})
        for part in (pairs, heldout)
    ]
    collate = DataCollatorForPreference(run.tokenizer.pad_token_id or 0, pad_to_multiple_of=8)
    return PreferenceTrainer(run, args, *sets, collate).fit()


class PreferenceTrainer(RunTrainer, DPOTrainer):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
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
            batch = self.collated(pairs)  # all chosen rows before all rejected ones
            given = [batch[k] for k in ("input_ids", "attention_mask", "completion_mask")]
            ours = -token_losses(self.model, *given)[0].sum(1)
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                reference = -token_losses(self.model, *given)[0].sum(1)
            chosen, rejected = (self.beta * (ours - reference).double().cpu()).chunk(2)
            margin = chosen - rejected
            loss, right = -F.logsigmoid(margin), (margin > 0).double()
            values = (loss, right, margin, chosen, rejected, torch.ones_like(margin))
            sums += torch.stack(values)[:, counted].sum(1)
        *found, count = self.run.world.sum(sums).tolist()
        return {name: value / count for name, value in zip(MEASURED, found, strict=True)}
