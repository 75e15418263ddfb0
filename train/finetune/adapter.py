"""An adapter on disk: what `train.finetune` writes.

    adapter_config.json, adapter_model.safetensors   peft's layout, fp32, the adapter alone
    task_heads.safetensors, tasks.json               heads of a multi-task run
    tokenizer.json, ...                              the tokenizer it was trained with
    eagle.json                                       what it belongs to and was made of
    README.md                                        the same for people: the data card

Finding an adapter and whether it fits a base: `eagle.loading`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eagle.checkpoint import require_equal, write_json
from eagle.errors import EagleError
from eagle.loading import RECORD, WEIGHTS, read_tensors, weights_hash
from train.finetune.policy import ADAPTER

HEADS, TASKS = "task_heads.safetensors", "tasks.json"


def write_adapter(
    folder: Path,
    model: nn.Module,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    record: dict,
    tasks: list[dict] | None = None,
) -> None:
    """Fill `folder` (the caller makes it appear whole). `state`: `trainable_state(model)`."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    lora = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=ADAPTER, save_embedding_layers=False
    )
    files = {WEIGHTS: {k: v.contiguous() for k, v in lora.items()}}
    if (heads := getattr(model.get_base_model(), "task_heads", None)) is not None:
        files[HEADS] = {k: v.cpu() for k, v in heads.state_dict().items()}
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
        require_equal(load_file(folder / name), tensors, folder)
    config = model.peft_config[ADAPTER]
    trains, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = trains
    if tasks is not None:
        (folder / TASKS).write_text(json.dumps(tasks, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(str(folder))
    record = {"kind": "adapter", **record, "fingerprint": weights_hash(files[WEIGHTS])}
    write_json(folder / RECORD, record)
    (folder / "README.md").write_text(card(record), encoding="utf-8")


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Put an adapter, and the task heads beside it, into a model that has their shapes."""
    from peft import set_peft_model_state_dict

    found = set_peft_model_state_dict(model, read_tensors(folder / WEIGHTS), adapter_name=ADAPTER)
    missing = [k for k in found.missing_keys if f".{ADAPTER}." in k and "lora_" in k]
    if missing or found.unexpected_keys:
        raise EagleError(
            f"the adapter {folder} does not fit the model: missing {missing[:3]}, left over "
            f"{found.unexpected_keys[:3]}; resume with the settings it was trained with"
        )
    heads = getattr(model.get_base_model(), "task_heads", None)
    if heads is not None:
        heads.load_state_dict(read_tensors(folder / HEADS))


def adapter_bytes(folder: Path) -> int:
    """Bytes of the weights an adapter folder holds."""
    return sum((folder / n).stat().st_size for n in (WEIGHTS, HEADS) if (folder / n).exists())


def card(record: dict) -> str:
    """The record as a page: what the adapter belongs to, what it saw, what it reached."""
    rows = {
        f"{k}: {n}": v for k in ("base", "data", "training") for n, v in record.get(k, {}).items()
    }
    rows |= {k: record.get(k) for k in ("quantization", "method", "trainable_parameters")}
    lines = [f"| {key} | {_short(value)} |" for key, value in rows.items()]
    return "\n".join(["# Adapter", "", "| | |", "|---|---|", *lines, ""])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
