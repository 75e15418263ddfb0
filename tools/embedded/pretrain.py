"""Train the embedded target model from scratch on the standard library.

Mixture (by tokens): plain code, FIM-transformed code, docstring -> code, question/answer chats.
Matrices are trained with Muon (Jordan et al. 2024), the rest with AdamW; the learning rate warms
up, stays, and decays linearly over the last 40% of the wall-clock budget, so that a run finishes
properly however slow the machine is. The state is saved every few minutes; a killed run continues
from it.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from configs.schema import DataConfig
from eagle.checkpoint import write_json
from eagle.loading import resolve_compute
from records.render import make_renderer

from .build import FORMATS
from .corpus import SourceFile, records, split, stdlib_files
from .tokenizer import IM_END, train_tokenizer

WEIGHTS = {"code": 0.45, "fim": 0.25, "instruction": 0.15, "chat": 0.15}
SAVE_EVERY = 180  # seconds


@dataclass(frozen=True)
class PretrainConfig:
    layers: int = 16
    hidden: int = 256  # of heads of 64, two to a kv head; the MLP is three times as wide
    vocab_size: int = 4096
    seq_len: int = 512
    batch_size: int = 12
    minutes: float = 60.0
    lr_muon: float = 0.02
    lr_adam: float = 3e-3
    warmup_steps: int = 50
    decay_share: float = 0.4
    compile: bool = True
    seed: int = 0


def documents(
    files: list[SourceFile], tokenizer, kind: str, rng: random.Random
) -> Iterator[list[int]]:
    """Endless token sequences of one kind, as training renders them; each pass in another order."""
    cfg = DataConfig(max_length=1 << 20, fim_spm_rate=0.3)
    render = make_renderer(FORMATS[kind], cfg, tokenizer)
    while True:
        for record in records(files, kind, rng):
            for row in render(record):
                yield row.input_ids + [tokenizer.eos_token_id] * (kind in ("instruction", "chat"))


def sequences(files: list[SourceFile], tokenizer, seq_len: int, seed: int) -> Iterator[list[int]]:
    """Endless packed sequences of seq_len + 1 tokens; each sequence is of one kind."""
    rng = random.Random(seed)
    sources = {kind: documents(files, tokenizer, kind, rng) for kind in WEIGHTS}
    rest: dict[str, list[int]] = {kind: [] for kind in WEIGHTS}
    while True:
        kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        while len(rest[kind]) <= seq_len:
            rest[kind] += next(sources[kind])
        yield rest[kind][: seq_len + 1]
        rest[kind] = rest[kind][seq_len:]


def heldout_loss(model, tokenizer, files: list[SourceFile], seq_len: int) -> dict:
    """Nats per token and bits per byte on the plain text of held-out files.

    Every token of every file is predicted once, from at most seq_len tokens of context.
    """
    nats = tokens = 0
    for file in files:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(file.text, verbose=False).input_ids])
        for start in range(0, len(ids) - 1, seq_len):
            chunk = ids[start : start + seq_len + 1].to(model.device)
            with torch.inference_mode():
                logits = model(chunk[None, :-1]).logits[0].float()
            nats += cross_entropy(logits, chunk[1:], reduction="sum").item()
            tokens += len(chunk) - 1
    size = sum(len(file.text.encode()) for file in files)
    return {
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
    }


def make_model(cfg: PretrainConfig, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = cfg.hidden // 64
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden,
        intermediate_size=3 * cfg.hidden,
        num_hidden_layers=cfg.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Training:
    """The model, its optimizers and how far it is; saved in one file, whole or not at all."""

    def __init__(self, cfg: PretrainConfig, model, path: Path) -> None:
        self.cfg, self.model, self.path = cfg, model, path
        named = [(n, p) for n, p in model.named_parameters()]
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        known = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in known]
        self.optimizers = {
            cfg.lr_muon: torch.optim.Muon(matrices, weight_decay=0.01, momentum=0.95),
            cfg.lr_adam: torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
        }
        self.forward = torch.compile(model) if cfg.compile else model
        self.fast = resolve_compute("auto", model.device) == "bf16"
        self.step, self.spent, self.loss = 0, 0.0, 0.0
        if path.exists():
            state = torch.load(path, map_location=model.device, weights_only=True)
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers.values(), state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.spent = state["step"], state["spent"]
            print(f"continuing at step {self.step}", flush=True)

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers.values()],
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(state, part)
        os.replace(part, self.path)

    def run(self, data: Iterator[list[int]]) -> None:
        budget, last, saved = self.cfg.minutes * 60, time.monotonic(), self.spent
        while self.spent < budget:
            loss = self.one_step([next(data) for _ in range(self.cfg.batch_size)], budget)
            self.loss = loss if not self.step else 0.95 * self.loss + 0.05 * loss
            self.step += 1
            now = time.monotonic()
            self.spent, last = self.spent + now - last, now
            if self.step % 20 == 0:
                left = (budget - self.spent) / 60
                print(f"step {self.step}  loss {self.loss:.3f}  {left:.1f} min left", flush=True)
            if self.spent - saved > SAVE_EVERY:
                self.save()
                saved = self.spent

    def one_step(self, rows: list[list[int]], budget: float) -> float:
        cfg, left = self.cfg, 1 - self.spent / budget
        scale = min(1.0, (self.step + 1) / cfg.warmup_steps, left / cfg.decay_share)
        for lr, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * max(scale, 0.005)
        batch = torch.tensor(rows).to(self.model.device)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.fast):
            logits = self.forward(input_ids=batch[:, :-1]).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()


def pretrain(out: str | Path, cfg: PretrainConfig, root: str | None = None) -> dict:
    """Train tokenizer and model into `out`, on a GPU where there is one; returns the report that is
    also written to report.json."""
    from transformers import AutoTokenizer

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    train_files, heldout_files = split(stdlib_files(root))
    if not (out / "tokenizer.json").exists():
        train_tokenizer((f.text for f in train_files), cfg.vocab_size, out)
        (out / "heldout.txt").write_text("".join(f.path + "\n" for f in heldout_files))
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = make_model(cfg, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(cfg, model, out / "pretrain_state.pt")
    training.run(sequences(train_files, tokenizer, cfg.seq_len, cfg.seed + training.step))
    model.eval()
    # a turn's end is an end of generation too
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    report = {
        "config": asdict(cfg),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": training.step,
        "minutes": training.spent / 60,
        "train_loss": training.loss,
        "heldout": heldout_loss(model, tokenizer, heldout_files, cfg.seq_len),
    }
    write_json(out / "report.json", report)
    training.path.unlink(missing_ok=True)
    return report
