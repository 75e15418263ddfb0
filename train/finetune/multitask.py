"""Multi-task fine-tuning: transformers' trainer over a mixture of N tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from configs.errors import ConfigError
from configs.finetune_schema import MultitaskConfig, TaskConfig
from records import Collator, MixtureDataset
from records.mixture import RoundRobin
from train.finetune import tasks as registry
from train.finetune.policy import HEADS
from train.finetune.run import Run, load_rows
from train.finetune.task_heads import TaskHeads, attach, calibrate
from train.finetune.trainer import RunTrainer, begin

CALIBRATION = 96  # rows whose states set the heads' scale


def multitask(run: Run) -> int:
    if not run.cfg.tasks:
        raise ConfigError("no tasks: list them under `tasks:` in --config (see docs/finetune.md)")
    cfg: MultitaskConfig = run.cfg
    tasks, length = cfg.tasks, cfg.data.max_length
    rows, heldout, card = load_rows(
        run, "tasks", lambda record: registry.render_record(record, tasks, run.tokenizer, length)
    )
    card |= {"format": "tasks", "labels": registry.count_labels(rows, tasks, "training")}
    if cfg.data.eval_paths:
        registry.count_labels(heldout, tasks, "held-out")
    run.tasks = [task.model_dump(mode="json") for task in tasks]
    collate = TaskCollator(run.tokenizer.pad_token_id or 0, tasks)
    args = begin(run, card, attach=partial(attach_heads, rows, collate))
    kinds, held = registry.by_task(rows), RoundRobin(registry.by_task(heldout))
    # an epoch lasts until each task has been seen whole
    weights = [len(kind) ** (1 / cfg.balance.temperature) for kind in kinds]
    mixture = MixtureDataset(kinds, weights, cfg.data.seed)
    return MultitaskTrainer(run, args, mixture, held, collate, mixture).fit()


def attach_heads(rows: list[registry.TaskRow], collate: TaskCollator, run: Run) -> None:
    """Heads on the scale of the training labels and of the states before training; the same on
    every rank."""
    cfg: MultitaskConfig = run.cfg
    hidden = run.model.config.get_text_config().hidden_size
    heads = TaskHeads(cfg.tasks, hidden, cfg.balance.weights == "uncertainty")
    for n, task in enumerate(cfg.tasks):
        if task.type == "regression":
            labels = [row.labels[0] for row in rows if row.task == n]
            heads.mean[n], heads.std[n] = np.mean(labels), np.std(labels) or 1.0
    attach(run.model, heads.to(run.world.device))
    read = RoundRobin([part for part in registry.by_task(rows) if part[0].labels])
    if seen := [read[n] for n in range(min(CALIBRATION, len(read)))]:
        parts = (collate(seen[n : n + 8]) for n in range(0, len(seen), 8))
        with run.autocast():
            calibrate(run.model, [{k: v.to(run.world.device) for k, v in b.items()} for b in parts])


class TaskCollator:
    """Rows -> the tensors of `task_forward`. A ranking's candidates become sequences of one
    group."""

    def __init__(self, pad: int, tasks: Sequence[TaskConfig]) -> None:
        self.collate, self.tasks = Collator(pad, pad_to_multiple=8), tasks

    def __call__(self, rows: list[registry.TaskRow]) -> dict[str, torch.Tensor]:
        flat, here = [], torch.zeros(len(self.tasks))  # supervised tokens, or one a label
        for number, row in enumerate(rows):
            here[row.task] += sum(row.mask or [1])
            for ids, label in zip(row.sequences, row.labels or [math.nan], strict=True):
                flat.append((ids, row.mask or [0] * len(ids), row.task, number, label))
        ids, masks, *more = zip(*flat, strict=True)
        pairs = zip(ids, masks, strict=True)
        batch = self.collate([{"input_ids": i, "loss_mask": m} for i, m in pairs])
        batch |= dict(zip(("task", "group", "labels"), map(torch.tensor, more), strict=True))
        return {**batch, "here": here}


class MultitaskTrainer(RunTrainer, Trainer):
    def __init__(self, run: Run, *given: Any) -> None:
        self.tasks: list[TaskConfig] = run.cfg.tasks
        self.heads: TaskHeads = run.model.get_base_model().task_heads
        self.seen = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        super().__init__(run, *given)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's counts, not by us

    def _get_num_items_in_batch(self, batch_samples, device):
        """[N]: labels of each task in the step, over its micro batches and all ranks."""
        counts = sum(batch["here"] for batch in batch_samples)
        return self.run.world.sum(counts.cpu()).float().to(device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, counts=num_items_in_batch)
        self.seen += torch.stack([out["sums"].double().cpu(), inputs["here"].double().cpu()])
        # trainers take means over ranks; the counts are of all of them
        loss = out["loss"] * self.run.world.size
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.means(self.seen)
            if self.heads.learned:
                learned = torch.exp(-self.heads.log_variance.detach()).tolist()
                logs |= {f"{t.name}/weight": w for t, w in zip(self.tasks, learned, strict=True)}
            self.seen.zero_()
        super().log(logs, start_time)

    def means(self, seen: torch.Tensor) -> dict[str, float]:
        """seen [2, N]: sums and counts of this rank -> each task's mean over all ranks."""
        sums, counts = self.run.world.sum(seen).tolist()
        found = zip(self.tasks, sums, counts, strict=True)
        return {f"{task.name}/loss": total / count for task, total, count in found if count}

    def measure(self) -> dict[str, float]:
        """The weighted sum of the tasks' mean held-out losses, and every metric."""
        seen = torch.zeros_like(self.seen)
        found: list[list] = [[] for _ in self.tasks]
        limit = -(-self.run.cfg.balance.max_generations // self.run.world.size)
        for rows, counted in self.shares():
            rows = rows[: int(counted.sum())]  # those too many are the last
            if not rows:
                continue
            batch = self.collated(rows)
            out = self.model(**batch)
            seen += torch.stack([out["sums"].double().cpu(), batch["here"].double().cpu()])
            self.collect(rows, out["outputs"], found)
            for n, task in enumerate(self.tasks):
                left = max(limit - len(found[n]), 0) if task.type == "generation" else 0
                if chosen := [row for row in rows if row.task == n][:left]:
                    found[n] += self.write(task, chosen)
        means, gathered = self.means(seen), self.run.world.gather(found)
        self.run.predictions, metrics = [], {}
        for n, task in enumerate(self.tasks):
            lines = registry.lines_of(task, [pair for part in gathered for pair in part[n]])
            self.run.predictions += lines
            metrics[task.name] = registry.measure_task(task, lines)
        out = {"loss": sum(t.weight * means.get(f"{t.name}/loss", 0) for t in self.tasks), **means}
        out |= {f"{name}/{k}": v for name, values in metrics.items() for k, v in values.items()}
        composite = registry.reliability(self.tasks, metrics)
        return out | ({} if composite is None else {"reliability": composite})

    def collect(self, rows: list[registry.TaskRow], outputs: dict, found: list[list]) -> None:
        """(prediction, label) of every row of a task that predicts."""
        for n, output in outputs.items():
            values, ranked = iter(self.heads.predict(n, output)), self.tasks[n].type == "ranking"
            for row in (row for row in rows if row.task == n):
                part = list(islice(values, len(row.labels)))
                found[n].append((part, row.labels) if ranked else (part[0], row.labels[0]))

    def write(self, task: TaskConfig, rows: list[registry.TaskRow]) -> list[tuple[str, str]]:
        """Greedy answers to the rows' prompts, with the answers that were wanted."""
        tokenizer, pad = self.run.tokenizer, self.run.tokenizer.pad_token_id or 0
        prompts = [torch.tensor(row.sequences[0][: row.mask.index(1)]) for row in rows]
        ids, mask = (
            pad_sequence(parts, True, value, "left").to(self.run.world.device)
            for parts, value in ((prompts, pad), ([torch.ones_like(p) for p in prompts], 0))
        )
        # the last token of an answer: with most templates, the one that ends the turn
        ends = {row.sequences[0][max(np.flatnonzero(row.mask or []))] for row in rows}
        ends &= set(tokenizer.added_tokens_decoder)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
            eos_token_id=sorted(ends | {tokenizer.eos_token_id} - {None}),
            pad_token_id=pad,
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return [(text.strip(), row.answer) for text, row in zip(texts, rows, strict=True)]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.heads.load_state_dict(load_file(Path(resume_from_checkpoint) / HEADS))
