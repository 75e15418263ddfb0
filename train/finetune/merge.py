"""An adapter merged into its base in full precision, and what that changes.

Training ran on a base that was quantized; what ships is the base in full precision with the adapter
in it. Two things differ: the base's weights (no longer rounded to 4 bit), and the sum of weight and
update, rounded to the base's dtype. The report keeps them apart, on held-out rows:

    trained   quantized base + adapter, as it was trained
    adapted   full-precision base + adapter
    merged    what is written
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from configs.errors import ConfigError
from configs.finetune_schema import MergeConfig
from eagle import loading
from eagle.checkpoint import atomic_dir, target_fingerprint, write_json
from eagle.errors import EagleError
from records import load_dataset_for, load_tokenizer
from train.finetune.policy import base_name, read_checkpoint

WHY = {"adapted": "rounding of the merge", "trained": "quantized base left behind"}


def merge(cfg: MergeConfig) -> int:
    if cfg.adapter is None or cfg.output is None:
        raise ConfigError("merge needs --adapter FOLDER and --output FOLDER")
    output = Path(cfg.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise EagleError(f"{output} is not empty; choose another --output")
    folder = loading.find_adapter(cfg.adapter)
    record = loading.read_record(folder)
    declared = json.loads((folder / loading.CONFIG).read_text(encoding="utf-8"))
    named = (record.get("base") or {}).get("id") or declared.get("base_model_name_or_path")
    base = cfg.base or named
    full = read_checkpoint(base)
    found = target_fingerprint(full)
    loading.require_base(folder, record, base_name(base), found)
    tokenizer = load_tokenizer(base)
    held = load_dataset_for(cfg.data, tokenizer, split="eval")
    rows = [held[n] for n in range(min(cfg.rows, len(held)))]

    quantization, dtype = record.get("quantization") or "none", record.get("dtype", "auto")
    as_trained = {"dtype": dtype, "quantization": quantization, "adapter_path": folder}
    logits = {"trained": logits_of(loading.load_model(base, **as_trained)[0].eval(), rows)}
    dtype = full.dtype if cfg.dtype == "auto" else loading.resolve_dtype(cfg.dtype)
    full = full.to(loading.resolve_device(None), dtype)
    model = PeftModel.from_pretrained(full, str(folder)).eval()
    logits["adapted"] = logits_of(model, rows)
    merged = model.merge_and_unload(safe_merge=True)
    logits["merged"] = logits_of(merged, rows)
    labels = torch.cat([torch.tensor(row["input_ids"][1:]) for row in rows])
    kept = torch.cat([torch.tensor(row["loss_mask"][1:]) for row in rows]).bool()
    # nats a supervised token
    losses = {k: float(F.cross_entropy(v[kept], labels[kept])) for k, v in logits.items()}
    report = {
        "rows": cfg.rows,
        "tokens": len(labels),
        "quantization_of_trained": quantization,
        "heldout_loss": losses,
        **{f"merged_vs_{name}": difference(logits["merged"], logits[name]) for name in WHY},
    }
    with atomic_dir(output) as staged:
        merged.save_pretrained(str(staged))
        tokenizer.save_pretrained(str(staged))
        provenance = {
            "kind": "merged",
            "base": {"id": base, "fingerprint": found},
            "adapter": {"path": str(folder), "fingerprint": record.get("fingerprint")},
            "dtype": str(merged.dtype).removeprefix("torch."),
            "report": report,
        }
        write_json(staged / loading.RECORD, provenance)
    said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    print(f"held-out loss: {said} ({quantization} base while training)")
    for name, text in WHY.items():
        found = report[f"merged_vs_{name}"]
        print(
            f"merged against {name} ({text}): logits differ by {found['mean_abs_logit']:.3g} on "
            f"average and {found['max_abs_logit']:.3g} at most, KL {found['kl']:.3g}, same top "
            f"token {found['same_top_token']:.2%}"
        )
    print(f"merged model: {output}")
    return 0


@torch.no_grad()
def logits_of(model: nn.Module, rows: list[dict]) -> torch.Tensor:
    """[tokens, V] fp32 of all rows, but for their last tokens; one pass a row, as padding would
    change them."""
    passes = (torch.tensor([row["input_ids"]], device=model.device) for row in rows)
    made = (model(input_ids=ids, use_cache=False).logits[0, :-1] for ids in passes)
    return torch.cat([logits.float().cpu() for logits in made])


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """How far the distributions of logits `a` are from those of `b`."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    return {
        "mean_abs_logit": float((a - b).abs().mean()),
        "max_abs_logit": float((a - b).abs().max()),
        "kl": float((log_b.exp() * (log_b - log_a)).sum(-1).mean()),
        "same_top_token": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
    }
