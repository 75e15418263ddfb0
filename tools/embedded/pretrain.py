"""Train the embedded target model from scratch on the standard library.

Mixture (by tokens): plain code, FIM-transformed code, docstring -> code, question/answer chats.
Matrices are trained with Muon (Jordan et al. 2024), the rest with AdamW; the learning rate warms
up, stays, and decays linearly over the last 40% of the wall-clock budget, so that a run finishes
properly however slow the machine is. The state is saved every few minutes; a killed run continues
from it.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from configs.schema import DataConfig
from eagle.errors import EagleError
from eagle.files import write_json
from eagle.loading import resolve_compute
from records.render import make_renderer

from .corpus import SourceFile, records, split, stdlib_files
from .tokenizer import IM_END, train_tokenizer

FORMATS = {"code": "plain", "fim": "fim", "instruction": "instruction", "chat": "chat"}
WEIGHTS = {"code": 0.45, "fim": 0.25, "instruction": 0.15, "chat": 0.15}
LR_MUON, LR_ADAM = 0.02, 3e-3
WARMUP_STEPS, DECAY_SHARE = 50, 0.4
SAVE_EVERY = 180  # seconds


def documents(files: list[SourceFile], tokenizer, kind: str, rng: random.Random) -> Iterator[list]:
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
    """Nats per token and bits per byte on the plain text of held-out files: every token is
    predicted once, from at most seq_len tokens of context."""
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
    rates = {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / size}
    return {**rates, "tokens": tokens, "bytes": size}


def make_model(tokenizer, layers: int, hidden: int):
    """Heads of 64, two to a kv head; the MLP is three times as wide as `hidden`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def fit(
    model,
    data: Callable[[int], Iterator],
    path: Path,
    batch_size: int,
    budget: float,
    compile: bool,
) -> dict:
    """Train for `budget` seconds, those of earlier starts included: what `path` holds, whole or not
    at all. data: from the step reached on, batches of rows. Returns how far it came."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    kept, far = {"model": model, "muon": muon, "adam": adam}, {"steps": 0, "seconds": 0.0}
    if path.exists():
        state = torch.load(path, map_location=model.device, weights_only=True)
        far = state.pop("far")
        for name, part in kept.items():
            part.load_state_dict(state[name])
        print(f"continuing at step {far['steps']}", flush=True)
    rows, forward = data(far["steps"]), torch.compile(model) if compile else model
    fast = resolve_compute("auto", model.device) == "bf16"
    started, saved = time.monotonic() - far["seconds"], far["seconds"]
    while far["seconds"] < budget:
        left = 1 - far["seconds"] / budget
        scale = max(min(1.0, (far["steps"] + 1) / WARMUP_STEPS, left / DECAY_SHARE), 0.005)
        batch = torch.tensor([next(rows) for _ in range(batch_size)]).to(model.device)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=fast):
            logits = forward(input_ids=batch[:, :-1]).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in ((muon, LR_MUON), (adam, LR_ADAM)):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        far["loss"] = 0.95 * far.get("loss", loss.item()) + 0.05 * loss.item()
        far["steps"] += 1
        far["seconds"] = time.monotonic() - started
        if far["steps"] % 20 == 0:
            minutes = (budget - far["seconds"]) / 60
            print(
                f"step {far['steps']}  loss {far['loss']:.3f}  {minutes:.1f} min left", flush=True
            )
        if far["seconds"] - saved > SAVE_EVERY:
            state = {name: part.state_dict() for name, part in kept.items()}
            torch.save({**state, "far": far}, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            saved = far["seconds"]
    return far


def pretrain(
    *,
    out: str,
    minutes: float = 60.0,
    root: str | None = None,
    layers: int = 16,
    hidden: int = 256,
    vocab_size: int = 4096,
    seq_len: int = 512,
    batch_size: int = 12,
    compile: bool = True,
    seed: int = 0,
) -> None:
    """Train tokenizer and target from scratch on the standard library into --out, on a GPU where
    there is one; OUT/report.json says what came of it, and the held-out loss is printed."""
    from transformers import AutoTokenizer

    asked = {k: v for k, v in locals().items() if k not in ("out", "root", "AutoTokenizer")}
    if hidden % 64 or hidden < 64 or layers < 4 or minutes <= 0:
        raise EagleError("hidden must be a multiple of 64, layers at least 4 and minutes above 0")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    train_files, heldout_files = split(stdlib_files(root))
    if not (folder / "tokenizer.json").exists():
        train_tokenizer((f.text for f in train_files), vocab_size, folder)
        (folder / "heldout.txt").write_text("".join(f.path + "\n" for f in heldout_files))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(tokenizer, layers, hidden).to(device)
    state = folder / "pretrain_state.pt"

    def data(step: int) -> Iterator[list[int]]:
        return sequences(train_files, tokenizer, seq_len, seed + step)

    far = fit(model, data, state, batch_size, 60 * minutes, compile)
    model.eval()
    # a turn's end is an end of generation too
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    report = {
        "config": asked,
        "parameters": sum(p.numel() for p in model.parameters()),
        **far,
        "heldout": heldout_loss(model, tokenizer, heldout_files, seq_len),
    }
    write_json(folder / "report.json", report)
    state.unlink(missing_ok=True)
    print(json.dumps(report["heldout"]))
