"""Train the embedded target model from scratch on the standard library.

    python -m tools.embedded pretrain --out DIR --minutes 60

Mixture (by tokens): plain code, FIM-transformed code, docstring -> code, question/answer chats.
Matrices are trained with Muon (Jordan et al. 2024), the rest with AdamW; the learning rate warms
up, stays, and decays linearly over the last 40% of the wall-clock budget, so that a run finishes
properly however slow the machine is. The state is saved every few minutes; a killed run continues
from it.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eagle.loading import resolve_compute

from .corpus import (
    SourceFile,
    chat_record,
    code_windows,
    fim_record,
    functions,
    instruction_record,
    split,
    stdlib_files,
)
from .tokenizer import EOS, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, IM_END, train_tokenizer


@dataclass(frozen=True)
class PretrainConfig:
    layers: int = 16
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 768
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


WEIGHTS = {"plain": 0.45, "fim": 0.25, "instruction": 0.15, "chat": 0.15}


def render_fim(record: dict, spm: bool) -> str:
    prefix, middle, suffix = record["prefix"], record["middle"], record["suffix"]
    if spm:
        return f"{FIM_PREFIX}{FIM_SUFFIX}{suffix}{FIM_MIDDLE}{prefix}{middle}{EOS}"
    return f"{FIM_PREFIX}{prefix}{FIM_SUFFIX}{suffix}{FIM_MIDDLE}{middle}{EOS}"


def documents(
    files: list[SourceFile], tokenizer, kind: str, rng: random.Random
) -> Iterator[list[int]]:
    """Endless token sequences of one kind, each closed by an end token. Interpreter tests count a
    third.
    """
    fns = [f for file in files for f in functions(file)] if kind in ("instruction", "chat") else []
    while True:
        order = [f for f in files if not f.path.startswith("test/") or rng.random() < 0.35]
        rng.shuffle(order)
        rng.shuffle(fns)
        if kind == "plain":
            texts = (file.text + EOS for file in order)
        elif kind == "fim":
            texts = (
                render_fim(fim_record(file, window, rng), spm=rng.random() < 0.3)
                for file in order
                for window in code_windows(file, rng)
            )
        else:
            texts = (
                tokenizer.apply_chat_template(
                    messages_of(instruction_record(fn, rng))
                    if kind == "instruction"
                    else chat_record(fn, rng)["messages"],
                    tokenize=False,
                )
                + EOS
                for fn in fns
            )
        for text in texts:
            yield tokenizer(text, verbose=False).input_ids


def messages_of(record: dict) -> list[dict]:
    return [
        {"role": "user", "content": record["instruction"]},
        {"role": "assistant", "content": record["output"]},
    ]


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


def optimizers(model, cfg: PretrainConfig) -> list[torch.optim.Optimizer]:
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=cfg.lr_muon, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=cfg.lr_adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def heldout_loss(model, tokenizer, files: list[SourceFile], seq_len: int) -> dict:
    """Nats per token and bits per byte on the plain text of held-out files.

    Every token of every file is predicted once, from at most seq_len tokens of context.
    """
    nats = tokens = size = 0
    with torch.inference_mode():
        for file in files:
            ids = torch.tensor(
                [tokenizer.eos_token_id] + tokenizer(file.text, verbose=False).input_ids
            )
            size += len(file.text.encode())
            for start in range(0, len(ids) - 1, seq_len):
                chunk = ids[start : start + seq_len + 1].unsqueeze(0).to(model.device)
                logits = model(chunk[:, :-1]).logits.float()
                nats += torch.nn.functional.cross_entropy(
                    logits[0], chunk[0, 1:], reduction="sum"
                ).item()
                tokens += chunk.shape[1] - 1
    return {
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
    }


def pretrain(out: str | Path, cfg: PretrainConfig, root: str | None = None) -> dict:
    """Train tokenizer and model into `out`, on a GPU where there is one; returns the report that is
    also written to report.json."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_files, heldout_files = split(stdlib_files(root))
    if not (out / "tokenizer.json").exists():
        train_tokenizer((f.text for f in train_files), cfg.vocab_size, out)
        (out / "heldout.txt").write_text("".join(f.path + "\n" for f in heldout_files))
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=cfg.hidden,
            intermediate_size=cfg.intermediate,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.kv_heads,
            max_position_embeddings=2048,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    opts = optimizers(model, cfg)
    state_file = out / "pretrain_state.pt"
    step, spent, tokens = 0, 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        step, spent, tokens = state["step"], state["spent"], state["tokens"]
        print(f"continuing at step {step}", flush=True)
    data = sequences(train_files, tokenizer, cfg.seq_len, cfg.seed + step)
    forward = torch.compile(model) if cfg.compile else model

    def save_state() -> None:
        part = state_file.with_suffix(".part")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in opts],
                "step": step,
                "spent": spent,
                "tokens": tokens,
            },
            part,
        )
        os.replace(part, state_file)

    budget, last, last_save, smooth = cfg.minutes * 60, time.monotonic(), time.monotonic(), None
    base_lrs = [cfg.lr_muon, cfg.lr_adam]
    fast = resolve_compute("auto", device) == "bf16"
    while spent < budget:
        left = 1 - spent / budget
        scale = min(1.0, (step + 1) / cfg.warmup_steps, left / cfg.decay_share)
        for opt, lr in zip(opts, base_lrs, strict=True):
            opt.param_groups[0]["lr"] = lr * max(scale, 0.005)
        batch = torch.tensor([next(data) for _ in range(cfg.batch_size)]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            logits = forward(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + batch[:, 1:].numel()
        now = time.monotonic()
        spent, last = spent + now - last, now
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if step % 20 == 0:
            print(
                f"step {step}  loss {smooth:.3f}  {tokens / spent:,.0f} tokens/s  lr x{scale:.2f}  "
                f"{(budget - spent) / 60:.1f} min left",
                flush=True,
            )
        if now - last_save > 180:
            save_state()
            last_save = now
    model.eval()
    # a turn's end is an end of generation too
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids(IM_END),
    ]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    report = {
        "config": asdict(cfg),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "tokens": tokens,
        "minutes": spent / 60,
        "train_loss": smooth,
        "heldout": heldout_loss(model, tokenizer, heldout_files, cfg.seq_len),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    state_file.unlink(missing_ok=True)
    return report
