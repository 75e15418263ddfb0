"""The DeepSpeed engine around the unrolled head, and its optimizer state as plain full tensors.

The head keeps fp32 weights, which are the master weights; bf16 is the dtype it computes in
(autocast). So a state is independent of the ZeRO stage and of the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from configs.deepspeed_presets import deepspeed_config
from configs.schema import HeadTrainConfig
from eagle.errors import EagleError
from train.head.distributed import World, import_deepspeed
from train.head.optimizer import MuonAdamW

STEP = "step"


class Engine:
    """Call it and `backward(loss)` for each micro-batch of a step, however many; then `update()`
    once.
    """

    def __init__(self, module: nn.Module, cfg: HeadTrainConfig, world: World) -> None:
        self.cfg, self.world, self.zero = cfg, world, cfg.train.zero
        self.head = module.head
        config = deepspeed_config(cfg, world.size)
        client = None
        if cfg.train.optimizer == "muon":
            if self.zero:
                raise EagleError(
                    f"train.optimizer=muon needs whole matrices, train.zero={self.zero} splits them; "
                    "use train.zero=0 or train.optimizer=adamw"
                )
            client = MuonAdamW(self._trained(), cfg.train)
            config.pop("optimizer")
        if self.zero == 3:
            config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 10_000)
        self.engine, *_ = import_deepspeed().initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            optimizer=client,
            config=config,
        )

    def __call__(self, *args):
        return self.engine(*args)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of the head, without an embedding of its own."""
        return [(n, p) for n, p in self.head.named_parameters() if p.requires_grad]

    @property
    def can_forget(self) -> bool:
        """Whether a step can be begun again: ZeRO 2 and 3 have shared gradients among ranks by
        then.
        """
        return self.zero < 2

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's gradients. `loss` is this rank's share of a global sum (DeepSpeed
        takes means over ranks, which is undone here); `last`: of the step. In ZeRO 0 and 1 nothing
        leaves the rank."""
        self.engine.set_gradient_accumulation_boundary(last and not self.can_forget)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def forget(self) -> None:
        """Drop the gradients added since the last update."""
        assert self.can_forget, self.zero
        for p in self.head.parameters():
            p.grad = p.grad_accum = None
        if hasattr(self.engine.optimizer, "exit_backward"):  # ZeRO: it may have been cut short
            self.engine.optimizer.exit_backward()

    def update(self) -> float:
        """Share the gradients, clip, update the weights. Returns the gradient's norm before
        clipping.
        """
        from deepspeed.utils import safe_get_full_grad

        norm = None
        if self.can_forget:
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
        if self.zero == 0:  # DeepSpeed keeps no norm there
            grads = [safe_get_full_grad(p) for _, p in self._trained()]
            norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None])
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return float(norm)

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer below DeepSpeed's wrappers."""
        return self.engine.optimizer.optimizer if self.zero else self.engine.optimizer

    def weights(self) -> dict[str, torch.Tensor]:
        """Full fp32 weights that are trained by name, on the CPU, on every rank. All ranks must
        call it.
        """
        if self.zero == 0:
            return {n: p.detach().cpu().clone() for n, p in self._trained()}
        from deepspeed.utils import safe_get_full_fp32_param

        return {n: safe_get_full_fp32_param(p).cpu().clone() for n, p in self._trained()}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """`name/key` -> full tensor, on the CPU. All ranks must call it, after at least one
        step.
        """
        out, inner = {}, self._inner()
        for name, p in self._trained():
            if self.zero == 0:
                for key, value in inner.state[p].items():
                    out[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().clone()
                continue
            from deepspeed.utils import safe_get_full_optimizer_state

            for key in ("exp_avg", "exp_avg_sq"):
                out[f"{name}/{key}"] = safe_get_full_optimizer_state(p, key).cpu().clone()
            out[f"{name}/{STEP}"] = torch.tensor(float(self._steps_done()))
        return out

    def _steps_done(self) -> float:
        return max(float(state[STEP]) for state in self._inner().state.values() if STEP in state)

    def load_optimizer_state(
        self, state: dict[str, torch.Tensor], prime: Callable[[], None]
    ) -> None:
        """Put `optimizer_state()` back. The weights must already be in the head when the engine is
        made.

        ZeRO makes its partitioned state at the first update: `prime` runs one, at learning rate 0,
        which leaves the weights as they are.
        """
        inner = self._inner()
        if self.zero == 0:
            for name, p in self._trained():
                keys = {
                    k.rsplit("/", 1)[1]: v for k, v in state.items() if k.rsplit("/", 1)[0] == name
                }
                if not keys:
                    raise EagleError(
                        f"the checkpoint has no optimizer state for {name}; start a new run"
                    )
                inner.state[p] = {
                    key: value.clone() if key == STEP else value.to(p.device, copy=True)
                    for key, value in keys.items()
                }
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self.set_lr(0.0)
        prime()
        steps = 0.0
        for name, p in self._trained():
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{name}/{key}" not in state:
                    raise EagleError(
                        f"the checkpoint has no {key} for {name}: it was written by another "
                        "optimizer; start a new run"
                    )
                safe_set_full_optimizer_state(p, state[f"{name}/{key}"].to(self.world.device), key)
            steps = float(state[f"{name}/{STEP}"])
        for kept in inner.state.values():
            if torch.is_tensor(kept.get(STEP)):
                kept[STEP].fill_(steps)
            elif STEP in kept:
                kept[STEP] = steps
