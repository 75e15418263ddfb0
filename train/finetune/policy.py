"""The model that learns: a frozen, quantized base and a trainable adapter; and the adapter on disk:

    adapter_config.json, adapter_model.safetensors   peft's layout, fp32, the adapter alone
    task_heads.safetensors, tasks.json               heads of a multi-task run
    tokenizer.json, ...                              the tokenizer it was trained with
    eagle.json                                       what it belongs to and was made of
    README.md                                        the same for people: the data card

Finding an adapter and whether it fits a base: `eagle.loading`.
"""

from __future__ import annotations

import copy
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from configs.finetune_schema import LoraSection, PolicyConfig
from eagle import loading
from eagle.checkpoint import require_equal, write_json
from eagle.errors import EagleError

ADAPTER = "default"  # peft's name of the adapter that learns
HEADS, TASKS = "task_heads.safetensors", "tasks.json"
CARD = ("base", "data", "training")


def base_name(base: str | None) -> str:
    """What an adapter records as its base: a folder is absolute, so that it is found anywhere."""
    if base in (None, "embedded"):
        return "embedded"
    return str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base


def read_checkpoint(base: str | None) -> nn.Module:
    """The base as its checkpoint has it, whatever it is quantized to in a run; weights are mapped,
    not read."""
    folder = loading.find_folder(base)
    model = loading.read_model(folder, "auto", {}, "base")
    if getattr(model.config, "quantization_config", None) is not None:
        raise EagleError(
            f"the base {str(folder)!r} is stored quantized; give the checkpoint in full precision, "
            "so that an adapter can be merged into it, and choose model.quantization"
        )
    return model


def build_policy(cfg: PolicyConfig, lora: LoraSection, seed: int) -> nn.Module:
    """A peft model on this rank's device: the base, its linear layers quantized while it is loaded,
    and its adapter or a new one, in fp32. The frozen weights have the dtype in which they are
    served: an adapter learns on what it will run on."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import set_seed

    dtype, device, source = cfg.dtype, loading.resolve_device(None), loading.find_folder(cfg.base)
    if dtype == "auto" and not loading.fast_bf16(device):  # as `eagle.loading.load_model`
        dtype = read_checkpoint(cfg.base).dtype
        dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    options: dict[str, Any] = {}
    if cfg.attn_implementation is not None:
        options["attn_implementation"] = cfg.attn_implementation
    if cfg.quantization != "none":
        arithmetic = loading.resolve_dtype(loading.resolve_compute(cfg.compute, device))
        options["quantization_config"] = loading.quantization_config(cfg.quantization, arithmetic)
    if torch.cuda.is_available():
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    model = loading.read_model(source, loading.resolve_dtype(dtype), options, "base")
    # bitsandbytes repacks 4-bit weights for inference in the first pass without gradients, on a CPU
    # with AVX512-BF16, and no gradient flows through repacked layers: a run that evaluates before
    # it trains would train on wrong gradients without a word
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    set_seed(seed)
    if cfg.adapter is not None:
        folder = str(loading.find_adapter(cfg.adapter))
        return PeftModel.from_pretrained(model, folder, ADAPTER, is_trainable=True)
    settings = lora.model_dump(exclude={"alpha", "dropout", "rslora"})
    settings |= {"lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora}
    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    except ValueError as error:
        raise EagleError(
            f"lora.target_modules={lora.target_modules!r} fits no layer of {base_name(cfg.base)}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> full fp32 copy on the CPU of every trainable weight. All ranks must call it."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    whole = nullcontext()
    if any(hasattr(p, "ds_id") for p in named.values()):  # ZeRO 3 keeps a part on each rank
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(named.values()))
    with whole:
        return {n: p.detach().float().cpu().clone() for n, p in named.items()}


def write_adapter(
    folder: Path, model: nn.Module, state: dict, tokenizer: Any, record: dict, tasks: list | None
) -> None:
    """Fill `folder` (the caller makes it appear whole). `state`: `trainable_state(model)`."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    saved = {"adapter_name": ADAPTER, "save_embedding_layers": False}
    lora = get_peft_model_state_dict(model, state_dict=state, **saved)
    files = {loading.WEIGHTS: {k: v.contiguous() for k, v in lora.items()}}
    if (heads := getattr(model.get_base_model(), "task_heads", None)) is not None:
        files[HEADS] = {k: v.cpu() for k, v in heads.state_dict().items()}
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
        require_equal(load_file(folder / name), tensors, folder)
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    if tasks is not None:
        (folder / TASKS).write_text(json.dumps(tasks, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(str(folder))
    found = loading.weights_hash(files[loading.WEIGHTS])
    record = {"kind": "adapter", **record, "fingerprint": found}
    write_json(folder / loading.RECORD, record)
    rows = {key: record.get(key) for key in ("method", "quantization", "trainable_parameters")}
    rows |= {f"{k}: {n}": v for k in CARD for n, v in record.get(k, {}).items()}
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    (folder / "README.md").write_text(f"# Adapter\n\n| | |\n|---|---|\n{table}", encoding="utf-8")
