"""Multi-task fine-tuning: transformers' trainer over a mixture of tasks.

S sequences of a batch, T tokens, N tasks.
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
from records.dataset import held_out_rows
from records.mixture import RoundRobin
from records.sources import resolve
from train.finetune.assistant import shipped_tasks
from train.finetune.run import PREDICTIONS, Run
from train.finetune.sft import EpochOrder, pad_id
from train.finetune.task_heads import TaskHeads, attach, calibrate
from train.finetune.task_metrics import lines_of, measure_task, reliability
from train.finetune.tasks import TaskRow, TaskRows, load_tasks, require_labels, split_heldout
from train.finetune.training import RunTrainer, arguments, shares

CALIBRATION = 96  # rows whose states set the heads' scale


def multitask(run: Run) -> int:
    cfg: MultitaskConfig = run.cfg
    if not cfg.tasks:
        raise ConfigError("no tasks: list them under `tasks:` in --config (see docs/finetune.md)")
    run.prepare()
    kinds, heldout, card = load_data(run)
    run.tasks = [task.model_dump(mode="json") for task in cfg.tasks]
    run.build_model()
    hidden = run.model.config.get_text_config().hidden_size
    heads = TaskHeads(cfg.tasks, hidden, cfg.balance.weights == "uncertainty")
    standardise(heads, kinds)
    attach(run.model, heads.to(run.world.device))
    collate = TaskCollator(pad_id(run.tokenizer), cfg.tasks)
    if seen := first_read(kinds, CALIBRATION):
        batches = [collate(seen[n : n + 8]) for n in range(0, len(seen), 8)]
        with run.autocast():
            calibrate(
                run.model, [{k: v.to(run.world.device) for k, v in b.items()} for b in batches]
            )
    run.identify(card)
    mixture = mix(cfg, kinds)
    trainer = MultitaskTrainer(
        run,
        args=TrainingArguments(**arguments(run)),
        heldout=RoundRobin(heldout),
        train_dataset=mixture,
        data_collator=collate,
    )
    trainer.add_callback(EpochOrder(mixture))
    return trainer.fit()


def load_data(run: Run) -> tuple[list[TaskRows], list[TaskRows], dict]:
    """Rows by kind for training, the same held out, and the data card."""
    cfg: MultitaskConfig = run.cfg

    def load(paths: list[Path], name: str, most: int | None) -> tuple[list[TaskRows], dict]:
        out = run.output / name if run.world.first else None
        limited = cfg.data.model_copy(update={"max_rows": most})
        return load_tasks(limited, cfg.tasks, run.tokenizer, paths, out)

    files = resolve(cfg.data.paths) if cfg.data.paths else [shipped_tasks(cfg.data, "train")]
    kinds, card = load(files, "quarantine.jsonl", cfg.data.max_rows)
    if cfg.data.eval_paths or not cfg.data.paths:
        given = cfg.data.eval_paths
        kept = resolve(given) if given else [shipped_tasks(cfg.data, "eval")]
        heldout, held_card = load(kept, "quarantine_eval.jsonl", cfg.data.max_eval_rows)
        require_labels(cfg.tasks, held_card, "held-out")
    else:
        fraction = cfg.data.heldout_fraction
        kinds, heldout = split_heldout(kinds, lambda keys: held_out_rows(np.array(keys), fraction))
    require_labels(cfg.tasks, card, "training")
    card["format"] = "tasks"
    card["heldout_rows"] = sum(map(len, heldout))
    return kinds, heldout, card


def mix(cfg: MultitaskConfig, kinds: list[TaskRows]) -> MixtureDataset:
    """Kinds drawn by rows ** (1 / temperature); an epoch lasts until each has been seen whole."""
    weights = [len(kind) ** (1 / cfg.balance.temperature) for kind in kinds]
    return MixtureDataset(kinds, weights, cfg.data.seed)


def standardise(heads: TaskHeads, kinds: list[TaskRows]) -> None:
    """Mean and deviation of each regression's training labels."""
    for n, task in enumerate(heads.tasks):
        if task.type == "regression":
            rows = [row for kind in kinds for row in kind.rows if row.targets]
            labels = np.array([row.targets[0][n] for row in rows])
            labels = labels[~np.isnan(labels)]
            heads.mean[n], heads.std[n] = float(labels.mean()), float(labels.std()) or 1.0


def first_read(kinds: list[TaskRows], count: int) -> list[TaskRow]:
    """Up to `count` rows that heads read, from all kinds alike; the same on every rank."""
    read = [kind for kind in kinds if kind.rows[0].task < 0]
    order = RoundRobin(read)
    return [order[n] for n in range(min(count, len(order)))] if read else []


class TaskCollator:
    """Rows -> the tensors of `task_forward`. A ranking's candidates become sequences of one
    group.
    """

    def __init__(self, pad: int, tasks: Sequence[TaskConfig]) -> None:
        self.collate, self.tasks = Collator(pad, pad_to_multiple=8), tasks

    def __call__(self, rows: list[TaskRow]) -> dict[str, torch.Tensor]:
        flat, task, targets, group = [], [], [], []
        here = torch.zeros(len(self.tasks))
        for number, row in enumerate(rows):
            for place, ids in enumerate(row.sequences):
                flat.append({"input_ids": ids, "loss_mask": row.mask or [0] * len(ids)})
                task.append(row.task)
                group.append(number)
                missing = [float("nan")] * len(self.tasks)
                targets.append(row.targets[place] if row.targets else missing)
            here += self.labels_of(row)
        batch = self.collate(flat)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"].long(),
            "loss_mask": batch["loss_mask"],
            "task": torch.tensor(task),
            "targets": torch.tensor(targets),
            "group": torch.tensor(group),
            "here": here,
        }

    def labels_of(self, row: TaskRow) -> torch.Tensor:
        """[N]: what a row adds to each task's count: supervised tokens, or one a label."""
        counts = torch.zeros(len(self.tasks))
        if row.task >= 0:
            counts[row.task] = sum(row.mask)
        else:
            counts += (~torch.isnan(torch.tensor(row.targets[0]))).float()
        return counts


class MultitaskTrainer(RunTrainer, Trainer):
    def __init__(self, run: Run, heldout: Any, **options: Any) -> None:
        self.heldout, self.lines = heldout, []
        self.tasks: list[TaskConfig] = run.cfg.tasks
        self.seen = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        super().__init__(run, eval_dataset=options["train_dataset"], **options)
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
            sums, counts = self.run.world.sum(self.seen)
            for n, task in enumerate(self.tasks):
                if counts[n]:
                    logs[f"{task.name}/loss"] = float(sums[n] / counts[n])
            heads = self.model.get_base_model().task_heads
            if heads.learned:
                variances = torch.exp(-heads.log_variance.detach()).tolist()
                logs |= {f"{t.name}/weight": w for t, w in zip(self.tasks, variances, strict=True)}
            self.seen.zero_()
        super().log(logs, start_time)

    def measure(self) -> dict[str, float]:
        """The weighted sum of the tasks' mean held-out losses, and every metric."""
        sums = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        found: dict[int, list] = {n: [] for n in range(len(self.tasks))}
        asked: dict[int, int] = dict.fromkeys(found, 0)
        for numbers, counted in shares(len(self.heldout), self.run.world, self.batch_size):
            rows = [self.heldout[n] for n, real in zip(numbers, counted, strict=True) if real]
            if not rows:
                continue
            batch = self.data_collator(rows)
            batch = {k: v.to(self.run.world.device) for k, v in batch.items()}
            out = self.model(**batch)
            sums += torch.stack([out["sums"].double().cpu(), batch["here"].double().cpu()])
            self.collect(rows, out["outputs"], found)
            limit = -(-self.run.cfg.balance.max_generations // self.run.world.size)
            for n, task in enumerate(self.tasks):
                chosen = [row for row in rows if row.task == n][: max(0, limit - asked[n])]
                asked[n] += len(chosen)
                found[n] += self.write(task, chosen)
        losses, counts = self.run.world.sum(sums)
        gathered = self.run.world.gather(found)
        self.lines, metrics = [], {}
        for n, task in enumerate(self.tasks):
            lines = lines_of(task, [pair for part in gathered for pair in part[n]])
            self.lines += lines
            metrics[task.name] = measure_task(task, lines)
        means = {
            t.name: float(losses[n] / counts[n]) for n, t in enumerate(self.tasks) if counts[n]
        }
        weights = {task.name: task.weight for task in self.tasks}
        out = {"loss": sum(weights[name] * mean for name, mean in means.items())}
        out |= {f"{name}/loss": mean for name, mean in means.items()}
        out |= {f"{name}/{k}": v for name, values in metrics.items() for k, v in values.items()}
        composite = reliability(self.tasks, metrics)
        return out | ({} if composite is None else {"reliability": composite})

    @property
    def batch_size(self) -> int:
        return self.args.per_device_eval_batch_size

    def collect(self, rows: list[TaskRow], outputs: dict, found: dict[int, list]) -> None:
        """(prediction, label) of every label that is there."""
        heads = self.model.get_base_model().task_heads
        place = 0
        for row in rows:
            if row.task >= 0:
                continue
            for n, task in enumerate(self.tasks):
                labels = [targets[n] for targets in row.targets]
                if np.isnan(labels[0]):
                    continue
                values = outputs[n][place : place + len(labels)].float()
                if task.type == "classification":
                    found[n].append((values[0].softmax(-1).tolist(), labels[0]))
                elif task.type == "regression":
                    found[n].append((float(heads.destandardise(n, values[0])), labels[0]))
                else:
                    found[n].append((values.tolist(), labels))
            place += len(row.sequences)

    def write(self, task: TaskConfig, rows: list[TaskRow]) -> list[tuple[str, str]]:
        """Greedy answers to the rows' prompts, with the answers that were wanted."""
        if not rows:
            return []
        tokenizer, device = self.run.tokenizer, self.run.world.device
        prompts = [row.sequences[0][: row.prompt_length] for row in rows]
        width, pad = max(map(len, prompts)), pad_id(tokenizer)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        special = set(tokenizer.added_tokens_decoder)
        ends = {row.sequences[0][last_target(row)] for row in rows} & special
        ends |= {tokenizer.eos_token_id} - {None}
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            use_cache=True,
        )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return [(text.strip(), row.answer) for text, row in zip(texts, rows, strict=True)]

    def save_more(self, folder: Path) -> None:
        if self.lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
            atomic_write_text(folder / PREDICTIONS, text)


def last_target(row: TaskRow) -> int:
    """Where the last token of the answer stands: with most templates, the one that ends the
    turn.
    """
    return max(n for n, supervised in enumerate(row.mask) if supervised)
