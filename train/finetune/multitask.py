"""Multi-task fine-tuning: transformers' trainer over a mixture of tasks.

N tasks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from configs.errors import ConfigError
from configs.finetune_schema import MultitaskConfig, TaskConfig
from eagle.checkpoint import atomic_write_text
from records import Collator, MixtureDataset
from records.mixture import RoundRobin
from train.finetune.rows import load_rows
from train.finetune.run import PREDICTIONS, Run
from train.finetune.task_heads import TaskHeads, attach, calibrate
from train.finetune.task_metrics import lines_of, measure_task, reliability
from train.finetune.tasks import TaskRow, by_kind, count_labels, render_record
from train.finetune.trainer import RunTrainer, arguments, pad_id

CALIBRATION = 96  # rows whose states set the heads' scale


def multitask(run: Run) -> int:
    if not run.cfg.tasks:
        raise ConfigError("no tasks: list them under `tasks:` in --config (see docs/finetune.md)")
    run.prepare()
    cfg: MultitaskConfig = run.cfg
    tasks, length = cfg.tasks, cfg.data.max_length
    rows, heldout, card = load_rows(
        run, "tasks", lambda record: render_record(record, tasks, run.tokenizer, length)
    )
    card |= {"format": "tasks", "labels": count_labels(rows, tasks, "training")}
    if cfg.data.eval_paths:
        count_labels(heldout, tasks, "held-out")
    run.tasks = [task.model_dump(mode="json") for task in tasks]
    args = arguments(TrainingArguments, run)
    run.build_model()
    collate = TaskCollator(pad_id(run.tokenizer), tasks)
    attach_heads(run, rows, collate)
    run.identify(card)
    mixture = mix(cfg, by_kind(rows))
    return MultitaskTrainer(
        run,
        RoundRobin(by_kind(heldout)),
        mixture=mixture,
        args=args,
        train_dataset=mixture,
        data_collator=collate,
    ).fit()


def mix(cfg: MultitaskConfig, kinds: list[list[TaskRow]]) -> MixtureDataset:
    """Kinds drawn by rows ** (1 / temperature); an epoch lasts until each has been seen whole."""
    weights = [len(kind) ** (1 / cfg.balance.temperature) for kind in kinds]
    return MixtureDataset(kinds, weights, cfg.data.seed)


def attach_heads(run: Run, rows: list[TaskRow], collate: TaskCollator) -> None:
    """Heads on the scale of the training labels and of the states before training; the same on
    every rank."""
    cfg: MultitaskConfig = run.cfg
    hidden = run.model.config.get_text_config().hidden_size
    heads = TaskHeads(cfg.tasks, hidden, cfg.balance.weights == "uncertainty")
    for n, task in enumerate(cfg.tasks):
        if task.type == "regression":
            labels = np.array([row.targets[0][n] for row in rows if row.targets])
            heads.mean[n], heads.std[n] = np.nanmean(labels), np.nanstd(labels) or 1.0
    attach(run.model, heads.to(run.world.device))
    read = RoundRobin([kind for kind in by_kind(rows) if kind[0].task < 0])
    seen = [read[n] for n in range(min(CALIBRATION, len(read)))]
    if seen:
        parts = (collate(seen[n : n + 8]) for n in range(0, len(seen), 8))
        with run.autocast():
            calibrate(run.model, [{k: v.to(run.world.device) for k, v in b.items()} for b in parts])


class TaskCollator:
    """Rows -> the tensors of `task_forward`. A ranking's candidates become sequences of one
    group."""

    def __init__(self, pad: int, tasks: Sequence[TaskConfig]) -> None:
        self.collate, self.tasks = Collator(pad, pad_to_multiple=8), tasks

    def __call__(self, rows: list[TaskRow]) -> dict[str, torch.Tensor]:
        flat, task, targets, group = [], [], [], []
        missing = [[float("nan")] * len(self.tasks)]
        for number, row in enumerate(rows):
            for ids, labels in zip(row.sequences, row.targets or missing, strict=True):
                flat.append({"input_ids": ids, "loss_mask": row.mask or [0] * len(ids)})
                task.append(row.task)
                group.append(number)
                targets.append(labels)
        batch = self.collate(flat)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"].long(),
            "loss_mask": batch["loss_mask"],
            "task": torch.tensor(task),
            "targets": torch.tensor(targets),
            "group": torch.tensor(group),
            "here": sum(self.labels_of(row) for row in rows),
        }

    def labels_of(self, row: TaskRow) -> torch.Tensor:
        """[N]: what a row adds to each task's count: supervised tokens, or one a label."""
        if row.task < 0:
            return (~torch.isnan(torch.tensor(row.targets[0]))).float()
        counts = torch.zeros(len(self.tasks))
        counts[row.task] = sum(row.mask)
        return counts


class MultitaskTrainer(RunTrainer, Trainer):
    def __init__(self, run: Run, *given: Any, **options: Any) -> None:
        self.lines: list[dict] = []
        self.tasks: list[TaskConfig] = run.cfg.tasks
        self.seen = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        super().__init__(run, *given, **options)
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
            heads = self.model.get_base_model().task_heads
            if heads.learned:
                learned = torch.exp(-heads.log_variance.detach()).tolist()
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
            rows = [row for row, real in zip(rows, counted, strict=True) if real]
            if not rows:
                continue
            batch = self.collated(rows)
            out = self.model(**batch)
            seen += torch.stack([out["sums"].double().cpu(), batch["here"].double().cpu()])
            self.collect(rows, out["outputs"], found)
            for n, task in enumerate(self.tasks):
                if task.type == "generation":
                    chosen = [row for row in rows if row.task == n][: limit - len(found[n])]
                    found[n] += self.write(task, chosen)
        means, gathered = self.means(seen), self.run.world.gather(found)
        self.lines, metrics = [], {}
        for n, task in enumerate(self.tasks):
            lines = lines_of(task, [pair for part in gathered for pair in part[n]])
            self.lines += lines
            metrics[task.name] = measure_task(task, lines)
        out = {"loss": sum(t.weight * means.get(f"{t.name}/loss", 0) for t in self.tasks), **means}
        out |= {f"{name}/{k}": v for name, values in metrics.items() for k, v in values.items()}
        composite = reliability(self.tasks, metrics)
        return out | ({} if composite is None else {"reliability": composite})

    def collect(self, rows: list[TaskRow], outputs: dict, found: list[list]) -> None:
        """(prediction, label) of every label that is there."""
        heads = self.model.get_base_model().task_heads
        place = 0
        for row in rows:
            for n, output in outputs.items() if row.task < 0 else ():
                labels = [targets[n] for targets in row.targets]
                values = output[place : place + len(labels)].float()
                kind = self.tasks[n].type
                if np.isnan(labels[0]):
                    continue
                if kind == "ranking":
                    found[n].append((values.tolist(), labels))
                elif kind == "regression":
                    found[n].append((float(heads.destandardise(n, values[0])), labels[0]))
                else:
                    found[n].append((values[0].softmax(-1).tolist(), labels[0]))
            place += len(row.targets)

    def write(self, task: TaskConfig, rows: list[TaskRow]) -> list[tuple[str, str]]:
        """Greedy answers to the rows' prompts, with the answers that were wanted."""
        if not rows:
            return []
        tokenizer, pad = self.run.tokenizer, pad_id(self.run.tokenizer)
        prompts = [torch.tensor(row.sequences[0][: row.mask.index(1)]) for row in rows]
        masks = [torch.ones_like(prompt) for prompt in prompts]
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(parts, True, value, "left").to(self.run.world.device)
            for parts, value in ((prompts, pad), (masks, 0))
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

    def save_more(self, folder: Path) -> None:
        if self.lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
            atomic_write_text(folder / PREDICTIONS, text)
