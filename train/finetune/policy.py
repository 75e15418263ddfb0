"""The model that learns: a frozen, quantized base and a trainable adapter, for all trainers."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.finetune_schema import LoraSection, PolicyConfig
from eagle.checkpoint import target_fingerprint
from eagle.errors import EagleError
from eagle.loading import (
    fast_bf16,
    find_folder,
    quantization_config,
    read_model,
    resolve_compute,
    resolve_device,
    resolve_dtype,
)

ADAPTER = "default"  # peft's name of the adapter that learns


def base_name(base: str | None) -> str:
    """What an adapter records as its base: a folder is absolute, so that it is found anywhere."""
    if base in (None, "embedded"):
        return "embedded"
    return str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base


def read_checkpoint(base: str | None) -> nn.Module:
    """The base as its checkpoint has it; weights are mapped, not read."""
    folder = find_folder(base)
    model = read_model(folder, "auto", {}, "base")
    if getattr(model.config, "quantization_config", None) is not None:
        raise EagleError(
            f"the base {str(folder)!r} is stored quantized; give the checkpoint in full precision, "
            "so that an adapter can be merged into it, and choose model.quantization"
        )
    return model


def base_fingerprint(base: str | None) -> str:
    """`target_fingerprint` of the checkpoint, whatever it is quantized to in a run."""
    return target_fingerprint(read_checkpoint(base))


def load_base(
    base: str | None,
    *,
    quantization: str = "nf4",
    dtype: str | torch.dtype = "auto",
    compute: str = "auto",
    attn_implementation: str | None = None,
) -> nn.Module:
    """The base on this rank's device, its linear layers quantized while it is loaded."""
    options: dict[str, Any] = {}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization != "none":
        arithmetic = resolve_dtype(resolve_compute(compute, resolve_device(None)))
        options["quantization_config"] = quantization_config(quantization, arithmetic)
    if torch.cuda.is_available():
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    model = read_model(find_folder(base), resolve_dtype(dtype), options, "base")
    # bitsandbytes repacks 4-bit weights for inference in the first pass without gradients, on a CPU
    # with AVX512-BF16, and no gradient flows through repacked layers: a run that evaluates before
    # it trains would train on wrong gradients without a word
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def build_policy(
    cfg: PolicyConfig, lora: LoraSection, seed: int, adapter: Path | None
) -> nn.Module:
    """A peft model: the quantized base, and the adapter in folder `adapter` or a new one, in fp32.

    The frozen weights have the dtype in which they are served: an adapter learns on what it will
    run on.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import set_seed

    dtype = cfg.dtype
    if dtype == "auto" and not fast_bf16(resolve_device(None)):  # as `eagle.loading.load_model`
        dtype = read_checkpoint(cfg.base).dtype
        dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    kept = cfg.model_dump(include={"base", "quantization", "compute", "attn_implementation"})
    model = load_base(**kept, dtype=dtype)
    set_seed(seed)
    if adapter is not None:
        return PeftModel.from_pretrained(model, str(adapter), ADAPTER, is_trainable=True)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
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
