"""Several tasks through one model: generation through its own output layer, the rest through small
heads.

S sequences of a batch, T tokens, H hidden, N tasks, C classes.

    loss = sum over tasks of  weight * sum of its losses / labels of it in the whole step

The step's labels are counted over micro batches and ranks, so the gradient is that of each task's
mean, however rows are split.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from configs.finetune_schema import TaskConfig
from train.finetune.trainer import token_losses


class TaskHeads(nn.Module):
    """A linear layer in fp32 for each task that predicts, and a log variance for each task.

    center, spread [H]: of the states that the heads read, before training; they see standardised
    ones. mean, std [N]: of a regression's training labels; its head works on the standardised
    scale.
    """

    def __init__(self, tasks: list[TaskConfig], hidden: int, learned: bool) -> None:
        super().__init__()
        self.tasks, self.learned = tasks, learned
        self.heads = nn.ModuleDict()
        for n, task in enumerate(tasks):  # a name may hold a dot, which a module's may not
            if task.type != "generation":
                # a ranking knows differences only, in which a bias would cancel
                head = nn.Linear(hidden, len(task.classes or [0]), bias=task.type != "ranking")
                self.heads[str(n)] = head
        for p in self.heads.parameters():  # they begin with the mean, and with classes alike
            nn.init.zeros_(p)
        if learned:
            self.log_variance = nn.Parameter(torch.zeros(len(tasks)))
        self.register_buffer("center", torch.zeros(hidden))
        self.register_buffer("spread", torch.ones(hidden))
        self.register_buffer("mean", torch.zeros(len(tasks)))
        self.register_buffer("std", torch.ones(len(tasks)))
        weights = torch.tensor([task.weight for task in tasks])
        self.register_buffer("weight", weights, persistent=False)

    def forward(self, n: int, state: torch.Tensor) -> torch.Tensor:
        """state [S, H] -> what the head of task n says: [S, C] or [S]."""
        # a step of Adam moves an output by up to lr * sum |state|: scaled, so that wide models do
        # not jump
        state = (state.float() - self.center) / self.spread * state.shape[-1] ** -0.25
        with torch.autocast(state.device.type, enabled=False):
            output = self.heads[str(n)](state)
        return output if self.tasks[n].classes else output[:, 0]

    def combine(self, sums: torch.Tensor, counts: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """sums [N] of losses and labels `here` [N] of a micro batch, `counts` [N] of the step ->
        its loss. Learned weights are those of Kendall et al. (2018): exp(-s) * loss + s / 2."""
        counts = counts.clamp_min(1)
        means = sums / counts
        if self.learned:
            s = self.log_variance
            means = torch.exp(-s) * means + 0.5 * s * (here / counts)
        return (self.weight * means).sum()

    def predict(self, n: int, output: torch.Tensor) -> list:
        """Outputs of task n -> probabilities of the classes, or numbers on the labels' scale."""
        if self.tasks[n].classes:
            return output.float().softmax(-1).tolist()
        return (output.float() * self.std[n] + self.mean[n]).tolist()


def attach(model: nn.Module, heads: TaskHeads) -> None:
    """Make the base of a peft model take `task=` batches; without them it is what it was. The heads
    become a part of it, so that they are moved, wrapped and saved together."""
    base = model.get_base_model()
    base.task_heads = heads
    original = base.forward

    @functools.wraps(type(base).forward)  # `generate` reads the signature
    def forward(*args: Any, task: torch.Tensor | None = None, **batch: Any):
        if task is None:
            return original(*args, **batch)
        return task_forward(base, original, task, batch)

    base.forward = forward


def task_forward(base: nn.Module, original: Any, task: torch.Tensor, batch: dict) -> dict[str, Any]:
    """task [S]. batch: input_ids, attention_mask, loss_mask [S, T]; labels [S], of tasks that
    predict; group [S], the record of a ranking; here [N] labels of this batch; counts [N] of the
    step, if this batch is not the whole of it -> {loss, sums [N], outputs {task: [S', ...]}}, S'
    the rows of a task that predicts, in order."""
    heads: TaskHeads = base.task_heads
    ids, attention, here = (batch[k] for k in ("input_ids", "attention_mask", "here"))
    sums = [torch.zeros((), device=ids.device) for _ in heads.tasks]
    outputs: dict[int, torch.Tensor] = {}
    reads = torch.tensor([t.type != "generation" for t in heads.tasks], device=ids.device)[task]
    if (~reads).any():
        supervised = batch["loss_mask"][~reads]
        nll, _ = token_losses(original, *trim(ids[~reads], attention[~reads], supervised))
        for n in task[~reads].unique().tolist():
            sums[n] = nll[task[~reads] == n].sum()
    state = torch.zeros(0, heads.center.shape[0], device=ids.device)
    if reads.any():
        state = last_state(base, ids[reads], attention[reads])
    for n in map(int, heads.heads):
        # every head on every rank, if only on no row: ZeRO joins gradients in the order in which
        # they come, and it must be the same one everywhere
        mine = task == n
        output = heads(n, state[mine[reads]])
        sums[n] = output.sum()
        if mine.any():
            outputs[n], asked = output, (batch["labels"][mine], batch["group"][mine])
            sums[n] = task_loss(heads, n, output, *asked)
    found, counts = torch.stack(sums), batch.get("counts")
    loss = heads.combine(found, here if counts is None else counts, here)
    return {"loss": loss, "sums": found.detach(), "outputs": outputs}


def last_state(base: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ids, mask [S, T], padded on the right -> each row's final state of its last token, [S, H]."""
    ids, mask = trim(ids, mask)
    hidden = base.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    return hidden.last_hidden_state[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]


@torch.no_grad()
def calibrate(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """Set `center` and `spread` of the heads from batches of rows that they will read."""
    base = model.get_base_model()
    model.eval()
    states = (last_state(base, b["input_ids"], b["attention_mask"]) for b in batches)
    found = torch.cat([state.float() for state in states])
    base.task_heads.center.copy_(found.mean(0))
    base.task_heads.spread.copy_(found.std(0, correction=0).clamp_min(1e-3))


def task_loss(heads: TaskHeads, n: int, output, target, group) -> torch.Tensor:
    """The sum of task n's losses over its rows. target, group [S]."""
    config = heads.tasks[n]
    if config.type == "classification":
        nll = F.cross_entropy(output, target.long(), reduction="none")
        focal = (1 - torch.exp(-nll)) ** 2 if config.loss_name == "focal" else 1
        return (nll * focal).sum()
    if config.type == "regression":
        target = (target - heads.mean[n]) / heads.std[n]
        losses = {"mse": F.mse_loss, "huber": F.smooth_l1_loss, "mae": F.l1_loss}
        return losses[config.loss_name](output, target, reduction="sum")
    return ranking_loss(output, target, group, config.loss_name)


def ranking_loss(output, target, group, name: str) -> torch.Tensor:
    """RankNet: over the pairs of one record whose labels differ, averaged within each record,
    summed over records. output, target, group [S]."""
    same = group[:, None] == group[None]  # [S, S]
    better = same & (target[:, None] > target[None])
    margin = output[:, None] - output[None]
    loss = F.softplus(-margin) if name == "logistic" else F.relu(1 - margin)
    pairs = (same * better.sum(1)).sum(1)  # [S]: of the record
    return ((loss * better).sum(1) / pairs.clamp_min(1)).sum()


def trim(ids: torch.Tensor, mask: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Without the columns that are padding in every row."""
    width = int(mask.sum(1).max())
    return ids[:, :width], mask[:, :width].long(), *(part[:, :width] for part in more)
