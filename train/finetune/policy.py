"""The model that learns: a frozen, quantized base and a trainable adapter, in one place for all
trainers.

Knows peft and bitsandbytes; knows nothing of data or losses.
"""

from __future__ import annotations

import os
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


def base_path(base: str | None) -> str:
    """Its folder; None and "embedded" are the embedded model."""
    return str(find_folder(base))


def base_name(base: str | None) -> str:
    """What an adapter records as its base: absolute for a folder, so that it is found from
    anywhere.
    """
    if base in (None, "embedded"):
        return "embedded"
    return str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base


def require_finetune() -> None:
    """The libraries of the extra `finetune`, or how to get them."""
    missing = []
    for name in ("peft", "trl", "bitsandbytes", "accelerate", "torchmetrics"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise EagleError(
            f"fine-tuning needs {', '.join(missing)}: pip install 'eagle-heads[finetune]'"
        )


def base_fingerprint(base: str | None) -> str:
    """`target_fingerprint` of the base as its checkpoint has it, whatever it is quantized to in a
    run.

    Weights are mapped, not read: what is touched is what the fingerprint samples.
    """
    return target_fingerprint(load_base(base, quantization="none", place=False))


def load_base(
    base: str | None,
    *,
    quantization: str = "nf4",
    double_quant: bool = True,
    dtype: str = "auto",
    compute: str = "auto",
    attn_implementation: str | None = None,
    place: bool = True,
) -> nn.Module:
    """The base model, its linear layers quantized while it is loaded. `place`: on this rank's GPU,
    if any.
    """
    path = base_path(base)
    options: dict[str, Any] = {}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization != "none":
        arithmetic = resolve_dtype(resolve_compute(compute, resolve_device(None)))
        options["quantization_config"] = quantization_config(quantization, arithmetic, double_quant)
    if place and torch.cuda.is_available():
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    model = read_model(path, resolve_dtype(dtype), options, "base")
    if getattr(model.config, "quantization_config", None) is not None and quantization == "none":
        raise EagleError(
            f"the base {path!r} is stored quantized; give the checkpoint in full precision, so that an "
            "adapter can be merged into it, and choose model.quantization"
        )
    keep_differentiable(model)
    return model


def keep_differentiable(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for inference on a CPU with AVX512-BF16.

    It does so in the first pass without gradients, for good, and no gradient flows through repacked
    layers: a run that evaluates before it trains would train on wrong gradients without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def build_policy(
    cfg: PolicyConfig, lora: LoraSection, seed: int, adapter: Path | None
) -> nn.Module:
    """A peft model: the quantized base, and the adapter in folder `adapter` or a new one, in fp32.

    The frozen weights have the dtype in which they are served: an adapter learns on what it will
    run on.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import set_seed

    model = load_base(
        cfg.base,
        quantization=cfg.quantization,
        double_quant=cfg.double_quant,
        dtype=served_dtype(cfg.base, cfg.dtype),
        compute=cfg.compute,
        attn_implementation=cfg.attn_implementation,
    )
    set_seed(seed)
    if adapter is not None:
        return PeftModel.from_pretrained(model, str(adapter), ADAPTER, is_trainable=True)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=lora.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise EagleError(
            f"lora.target_modules={lora.target_modules!r} fits no layer of {base_path(cfg.base)}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def served_dtype(base: str | None, dtype: str) -> str:
    """What generation makes of "auto" here: `eagle.loading.load_model`."""
    if dtype != "auto" or fast_bf16(resolve_device(None)):
        return dtype
    stored = load_base(base, quantization="none", place=False).dtype  # mapped, not read
    return "float32" if stored == torch.bfloat16 else dtype


def parameter_counts(model: nn.Module) -> dict[str, Any]:
    """Trainable and all parameters; a packed 4-bit weight counts what it stands for, weights of the
    task heads count as trainable."""
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_share": trainable / total,
    }


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> full fp32 copy on the CPU of every trainable weight. All ranks must call it."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if any(hasattr(p, "ds_id") for p in named.values()):  # ZeRO 3 keeps a part on each rank
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {n: p.detach().float().cpu().clone() for n, p in named.items()}
    return {n: p.detach().float().cpu().clone() for n, p in named.items()}
