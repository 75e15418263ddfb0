"""An adapter merged into its base in full precision, and what that changes.

Training ran on a base that was quantized; what ships is the base in full precision with the adapter
in it. Two things differ: the base's weights (no longer rounded to 4 bit), and the sum of weight and
update, rounded to the base's dtype. The report keeps them apart, on held-out rows:

    trained   quantized base + adapter, as it was trained
    adapted   full-precision base + adapter
    merged    what is written, read back

Merged may differ from adapted by rounding alone: above `BOUND` nothing is written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from configs.errors import ConfigError
from configs.finetune_schema import MergeConfig
from eagle import loading
from eagle.checkpoint import atomic_dir, target_fingerprint, write_json
from eagle.errors import EagleError
from eagle.files import read_tensors, same_bits
from records import load_dataset_for, load_tokenizer
from train.finetune.policy import base_name, read_checkpoint

# KL of merged from adapted, nats a token; adapters show 1e-8 in fp32, 4e-4 in bf16
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
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
    quantized = loading.load_model(base, dtype=dtype, quantization=quantization)[0]
    logits = {"trained": logits_of(adapted(quantized, folder), rows)}
    del quantized
    dtype = full.dtype if cfg.dtype == "auto" else loading.resolve_dtype(cfg.dtype)
    full = full.to(loading.resolve_device(None), dtype)
    model = adapted(full, folder)
    logits["adapted"] = logits_of(model, rows)
    tied = full.config.tie_word_embeddings
    merged = merge_apart(model)
    with atomic_dir(output) as staged:
        merged.save_pretrained(str(staged))
        tokenizer.save_pretrained(str(staged))
        del full, model, merged
        read = loading.read_model(staged, "auto", {}, "merged").eval()
        logits["merged"] = logits_of(read.to(loading.resolve_device(None)), rows)
        report = compare(rows, logits) | {"quantization_of_trained": quantization}
        worst, bound = report["merged_vs_adapted"]["kl"], BOUND[dtype]
        if not worst <= bound:
            raise EagleError(
                f"merged, {folder} says something else than on its base: KL {worst:.3g} nats a "
                f"token, and rounding to {dtype} explains at most {bound}; nothing is written: use "
                "the adapter as it is, or dtype=float32"
            )
        provenance = {
            "kind": "merged",
            "base": {"id": base, "fingerprint": found},
            "adapter": {"path": str(folder), "fingerprint": record.get("fingerprint")},
            "dtype": str(dtype).removeprefix("torch."),
            "report": report,
        }
        write_json(staged / loading.RECORD, provenance)
    said = ", ".join(f"{name} {loss:.4f}" for name, loss in report["heldout_loss"].items())
    print(f"held-out loss: {said} ({quantization} base while training)")
    for name, text in WHY.items():
        found = report[f"merged_vs_{name}"]
        print(
            f"merged against {name} ({text}): logits differ by {found['mean_abs_logit']:.3g} on "
            f"average and {found['max_abs_logit']:.3g} at most, KL {found['kl']:.3g}, same top "
            f"token {found['same_top_token']:.2%}"
        )
    if tied and not read.config.tie_word_embeddings:
        print("the output layer is no longer tied to the input embedding: they differ now")
    print(f"merged model: {output}")
    return 0


def adapted(model: nn.Module, folder: Path) -> PeftModel:
    """With the adapter on it, of any kind that peft knows."""
    misfit = f"the adapter {folder} does not fit its base"
    try:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    except (ValueError, RuntimeError) as error:
        raise EagleError(f"{misfit}: {' '.join(str(error).split())[:300]}") from error
    # peft only warns of names that it does not find
    given = read_tensors(folder / loading.WEIGHTS).keys()
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if strange := sorted((wanted - given) | (given - wanted - model.state_dict().keys())):
        raise EagleError(f"{misfit}: {len(strange)} weights do not match, {strange[0]} first")
    return model


def merge_apart(model: PeftModel) -> nn.Module:
    """The base with the adapter in it. An output layer that is tied to the input embedding gets
    rows of its own where the adapter makes the two differ."""
    ends = [model.get_output_embeddings(), model.get_input_embeddings()]
    output, embedding = (getattr(layer, "base_layer", layer) for layer in ends)
    apart = output.weight is embedding.weight and [output, embedding] != ends
    if apart:
        # an update merged into one tensor would change both
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of ends that are tied, or no longer
            merged = model.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise EagleError(f"peft cannot merge this adapter: {error}; use it as it is") from error
    output, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if apart and same_bits(output.weight, embedding.weight):
        output.weight = embedding.weight
    tied = output.weight is embedding.weight
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = tied
    return merged


def compare(rows: list[dict], logits: dict[str, torch.Tensor]) -> dict:
    """Held-out losses, nats a supervised token, and how far the merged model is from the others."""
    labels = torch.cat([torch.tensor(row["input_ids"][1:]) for row in rows])
    kept = torch.cat([torch.tensor(row["loss_mask"][1:]) for row in rows]).bool()
    losses = {k: float(F.cross_entropy(v[kept], labels[kept])) for k, v in logits.items()}
    away = {f"merged_vs_{name}": difference(logits["merged"], logits[name]) for name in WHY}
    return {"rows": len(rows), "tokens": len(labels), "heldout_loss": losses, **away}


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
