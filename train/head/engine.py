"""The DeepSpeed engine around the unrolled head, and its optimizer state as plain full tensors.

The head keeps fp32 weights, which are the master weights; bf16 is the dtype it computes in
(autocast). So a state is independent of the ZeRO stage and of the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from configs.deepspeed_presets import deepspeed_config
from configs.schema import HeadTrainConfig, TrainConfig
from eagle.errors import EagleError
from train.head.distributed import World, import_deepspeed

STEP, MOMENTS = "step", ("exp_avg", "exp_avg_sq")


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices except
    `lm_head`, AdamW for the rest. Muon's update is scaled to AdamW's size, so both take the same
    learning rate."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], cfg: TrainConfig) -> None:
        named = list(named)
        matrices = [p for name, p in named if p.ndim == 2 and "lm_head" not in name]
        rest = [p for name, p in named if p.ndim != 2 or "lm_head" in name]
        shared = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
        self.parts = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared),
            torch.optim.AdamW(rest, betas=tuple(cfg.betas), **shared),
        ]
        super().__init__([{"params": [p for _, p in named]}], {"lr": cfg.lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()


class Engine:
    """Call it and `backward(loss)` for each micro-batch of a step; then `update()` once."""

    def __init__(self, module: nn.Module, cfg: HeadTrainConfig, world: World) -> None:
        self.cfg, self.world, self.zero = cfg, world, cfg.train.zero
        self.head = module.head
        config, optimizer = deepspeed_config(cfg, world.size), None
        if cfg.train.optimizer == "muon":
            if self.zero:
                raise EagleError("train.optimizer=muon needs whole matrices: use train.zero=0")
            optimizer = MuonAdamW(self._trained(), cfg.train)
            config.pop("optimizer")
        if self.zero == 3:
            config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 10_000)
        trained = [p for p in module.parameters() if p.requires_grad]
        self.engine, *_ = import_deepspeed().initialize(
            model=module, model_parameters=trained, optimizer=optimizer, config=config
        )

    def __call__(self, *args):
        return self.engine(*args)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.head.named_parameters() if p.requires_grad]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's gradients. `loss` is this rank's share of a global sum (DeepSpeed
        takes means over ranks, which is undone here); `last`: of the step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def update(self) -> float:
        """Clip and update. Returns the gradient's norm before clipping."""
        from deepspeed.utils import safe_get_full_grad

        norm = None
        if self.zero == 0:  # DeepSpeed keeps no norm there
            grads = [safe_get_full_grad(p) for _, p in self._trained()]
            norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None])
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer below DeepSpeed's wrappers."""
        return self.engine.optimizer.optimizer if self.zero else self.engine.optimizer

    def weights(self) -> dict[str, torch.Tensor]:
        """Full trained fp32 weights, on the CPU of every rank, which all must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param if self.zero else torch.Tensor.detach
        return {n: full(p).cpu().clone() for n, p in self._trained()}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """`name/key` -> full tensor, on the CPU. All ranks must call it, after a step or more."""
        from deepspeed.utils import safe_get_full_optimizer_state

        out, inner = {}, self._inner
        steps = [float(state[STEP]) for state in inner.state.values() if STEP in state]
        for name, p in self._trained():
            if self.zero:
                found = {key: safe_get_full_optimizer_state(p, key) for key in MOMENTS}
                found[STEP] = torch.tensor(max(steps))
            else:
                found = {k: torch.as_tensor(v).detach() for k, v in inner.state[p].items()}
            out |= {f"{name}/{key}": value.cpu().clone() for key, value in found.items()}
        return out

    def load_optimizer_state(self, state: dict[str, torch.Tensor], prime: Callable) -> None:
        """Put `optimizer_state()` back; the weights must be in the head already. ZeRO makes its
        state at the first update: `prime` runs one, at learning rate 0, which changes no weight."""
        from deepspeed.utils import safe_set_full_optimizer_state

        of: dict[str, dict[str, torch.Tensor]] = {}
        for place, value in state.items():
            name, key = place.rsplit("/", 1)
            of.setdefault(name, {})[key] = value
        needed = {STEP, *MOMENTS} if self.zero else set()
        for name, _ in self._trained():
            if not of.get(name) or needed - of[name].keys():
                raise EagleError(
                    f"the checkpoint has no state of this optimizer for {name}; start a new run"
                )
        if self.zero == 0:
            for name, p in self._trained():
                self._inner.state[p] = {
                    key: value.clone() if key == STEP else value.to(p.device, copy=True)
                    for key, value in of[name].items()
                }
            return
        self.set_lr(0.0)
        prime()
        for name, p in self._trained():
            for key in MOMENTS:
                safe_set_full_optimizer_state(p, of[name][key].to(self.world.device), key)
            steps = float(of[name][STEP])
        for kept in self._inner.state.values():
            if STEP in kept:  # a tensor: the presets ask for torch's AdamW
                kept[STEP].fill_(steps)
