"""An adapter merged into its base in full precision, and what that changes.

Training ran on a base that was quantized; what ships is the base in full precision with the adapter
  in it. Two
things differ: the base's weights (no longer rounded to 4 bit), and the sum of weight and update,
  rounded to the
base's dtype. The report keeps them apart, on held-out rows:

    trained   quantized base + adapter, as it was trained
    adapted   full-precision base + adapter
    merged    what is written
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from configs.errors import ConfigError
from configs.finetune_schema import MergeConfig
from eagle.checkpoint import atomic_dir, write_json
from eagle.errors import EagleError
from eagle.loading import find_adapter, read_record, require_base
from records import load_dataset_for, load_tokenizer
from train.finetune.policy import base_fingerprint, base_path, load_base
from train.finetune.sft import LabelCollator, pad_id


def merge(cfg: MergeConfig) -> int:
    if cfg.adapter is None or cfg.output is None:
        raise ConfigError("merge needs --adapter FOLDER and --output FOLDER")
    output = Path(cfg.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise EagleError(f"{output} is not empty; choose another --output")
    folder = find_adapter(cfg.adapter)
    record = read_record(folder)
    base = cfg.base or (record.get("base") or {}).get("id") or declared_base(folder)
    found = base_fingerprint(base)
    require_base(folder, record, base_path(base), found)
    tokenizer = load_tokenizer(base)
    batches = comparison_batches(cfg, tokenizer)
    quantization = record.get("quantization") or "none"

    trained = adapted_model(base, folder, quantization, cfg.dtype)
    logits = {"trained": logits_of(trained, batches)}
    del trained
    model = adapted_model(base, folder, "none", cfg.dtype)
    logits["adapted"] = logits_of(model, batches)
    merged = model.merge_and_unload(safe_merge=True)
    logits["merged"] = logits_of(merged, batches)
    report = {
        "rows": cfg.rows,
        "tokens": int(sum(len(part) for part in logits["merged"])),
        "quantization_of_trained": quantization,
        "heldout_loss": {name: heldout_loss(part, batches) for name, part in logits.items()},
        "merged_vs_adapted": difference(logits["merged"], logits["adapted"]),
        "merged_vs_trained": difference(logits["merged"], logits["trained"]),
    }
    provenance = {
        "kind": "merged",
        "base": {"id": base, "fingerprint": found},
        "adapter": {"path": str(folder), "fingerprint": record.get("fingerprint")},
        "dtype": str(merged.dtype).removeprefix("torch."),
        "report": report,
    }
    with atomic_dir(output) as staged:
        merged.save_pretrained(str(staged))
        tokenizer.save_pretrained(str(staged))
        write_json(staged / "eagle.json", provenance)
    tell(report, output)
    return 0


def adapted_model(base: str, folder: Path, quantization: str, dtype: str) -> nn.Module:
    from peft import PeftModel

    model = load_base(base, quantization=quantization, dtype=dtype)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def declared_base(folder: Path) -> str | None:
    """The base in an adapter's own config, for adapters of other programs."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config.get("base_model_name_or_path")


def comparison_batches(cfg: MergeConfig, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """One batch a row: padding would change what is compared."""
    rows = load_dataset_for(cfg.data, tokenizer, split="eval")
    collate = LabelCollator(pad_id(tokenizer))
    return [collate([rows[n]]) for n in range(min(cfg.rows, len(rows)))]


@torch.no_grad()
def logits_of(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """[T, V] fp32 for the tokens of each row that predict."""
    device = next(model.parameters()).device
    out = []
    for batch in batches:
        inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}
        length = int(batch["attention_mask"].sum())
        out.append(model(**inputs, use_cache=False).logits[0, : length - 1].float().cpu())
    return out


def heldout_loss(logits: list[torch.Tensor], batches: list[dict[str, torch.Tensor]]) -> float:
    """Nats a supervised token."""
    total, tokens = 0.0, 0
    for part, batch in zip(logits, batches, strict=True):
        labels = batch["labels"][0, 1 : len(part) + 1]
        total += float(F.cross_entropy(part, labels, ignore_index=-100, reduction="sum"))
        tokens += int((labels != -100).sum())
    return total / max(tokens, 1)


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> dict[str, float]:
    """How far the first distribution is from the second, over all tokens of all rows."""
    a, b = torch.cat(ours), torch.cat(theirs)
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    return {
        "mean_abs_logit": float((a - b).abs().mean()),
        "max_abs_logit": float((a - b).abs().max()),
        "kl": float((log_b.exp() * (log_b - log_a)).sum(-1).mean()),
        "same_top_token": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
    }


def tell(report: dict, output: Path) -> None:
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in report["heldout_loss"].items())
    print(f"held-out loss: {losses} ({report['quantization_of_trained']} base while training)")
    for name, text in (
        ("adapted", "rounding of the merge"),
        ("trained", "quantized base left behind"),
    ):
        found = report[f"merged_vs_{name}"]
        print(
            f"merged against {name} ({text}): logits differ by {found['mean_abs_logit']:.3g} on average and "
            f"{found['max_abs_logit']:.3g} at most, KL {found['kl']:.3g}, same top token "
            f"{found['same_top_token']:.2%}"
        )
    print(f"merged model: {output}")
