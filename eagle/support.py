"""Which stock models can be served: what is read of their code and configuration, and refusals."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface

from .attention import NAME, tree_attention_forward
from .errors import EagleError

INSTEAD = "use a decoder-only causal language model such as Llama, Qwen, Mistral or Gemma"
# layer types that see all of the context, or a sliding window of it ("attention" is an older name
# for the first)
ATTENDING = {"full_attention", "sliding_attention", "attention"}
RECURRENT = ("mamba", "linear_attention", "recurrent", "conv", "rwkv", "ssm")
# whose decoder layers take keyword arguments and do not hand them to their attention (transformers
# 5.23)
DROP_ARGUMENTS = ("nemotron", "stablelm")
# what models that do not fit raise, whose code is not made for our arguments
MISFITS = (TypeError, AttributeError, LookupError, RuntimeError, ValueError)


def relay_context(config, layers: nn.ModuleList) -> list:
    """Hooks that carry the `tree` argument from a layer to its attention where the family's layers
    drop it."""
    if getattr(config, "model_type", None) not in DROP_ARGUMENTS:
        return []
    current: list = [None]

    def take(module, args, kwargs):
        current[0] = kwargs.get("tree")

    def give(module, args, kwargs):
        tree, current[0] = current[0], None
        return args, {**kwargs, "tree": tree}

    pairs = [(m, h) for layer in layers for m, h in ((layer, take), (layer.self_attn, give))]
    return [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in pairs]


@contextmanager
def short_windows(model: nn.Module, config, window: int, below: int) -> Iterator[None]:
    """Every sliding window that is shorter than `below` is `window` tokens, for masks (the config)
    and layers."""
    owners = [
        owner
        for owner in (config, *model.modules())
        if type(width := getattr(owner, "sliding_window", None)) is int and 0 < width < below
    ]
    before = [owner.sliding_window for owner in owners]
    try:
        for owner in owners:
            owner.sliding_window = window
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.sliding_window = value


@contextmanager
def unread_arguments() -> Iterator[set[str]]:
    """Collects what the layers give to our attention and it does not read: tensors by name, and a
    mask other than the positions that `run` hands in."""
    read = {*inspect.signature(tree_attention_forward).parameters, "position_ids"}
    unread: set[str] = set()

    def watch(module, query, key, value, attention_mask, *args, **kwargs):
        unread.update(k for k, v in kwargs.items() if k not in read and isinstance(v, torch.Tensor))
        if attention_mask is not None and attention_mask.dtype != torch.int64:
            unread.add("a mask of its own")
        return tree_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)

    AttentionInterface.register(NAME, watch)
    try:
        yield unread
    finally:
        AttentionInterface.register(NAME, tree_attention_forward)


def unsupported(config, why: str, remedy: str = INSTEAD) -> EagleError:
    kind = getattr(config, "model_type", "?")
    return EagleError(f"models of type {kind!r} {why}; {remedy}")


def refuse_encoder_decoder(model: nn.Module) -> None:
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(model.config, name, False):
            raise unsupported(model.config, "attend to an encoder (cross-attention)")


def refuse_shapes(config, found: list[tuple[int, int, int]]) -> None:
    """found: (key/value heads, key dim, value dim) of each layer that reached the cache."""
    if len(set(found)) > 1 or any(key != value for _, key, value in found):
        latent = ", of multi-head latent attention" if hasattr(config, "kv_lora_rank") else ""
        raise unsupported(
            config,
            "are not supported: their key and value shapes differ, (heads, key dim, value dim) "
            f"{sorted(set(found))}{latent}",
            "use a model whose layers all cache keys and values of one shape",
        )


def refuse_unsupported(model: nn.Module, config, backbone: nn.Module, layers) -> None:
    """Models that cannot be served are refused with the reason, where the configuration or the code
    shows it."""
    types = {str(t) for t in getattr(config, "layer_types", None) or []}
    recurrent = sorted(t for t in types if any(r in t for r in RECURRENT))
    if getattr(model, "_is_stateful", False) or recurrent:
        raise unsupported(
            config,
            f"keep a recurrent state {', '.join(recurrent)} that cannot be rolled back to an "
            "accepted token",
            "use a model of attention layers only",
        )
    if "chunked_attention" in types:
        raise unsupported(config, "use chunked attention, which is not supported")
    if unknown := sorted(types - ATTENDING):
        said = f"have layers of type {', '.join(unknown)}, which tree attention does not know"
        raise unsupported(config, said)
    if getattr(config, "num_kv_shared_layers", None):
        said = "share keys and values between layers, and the cache holds one pair a layer"
        raise unsupported(config, said)
    biased = (config, getattr(config, "attn_config", None))
    if any(getattr(c, "alibi", False) for c in biased) or config.model_type == "bloom":
        raise unsupported(
            config,
            "add a bias to the attention scores by distance (ALiBi), which tree attention does not "
            "know",
            "use a model with rotary or learned positions",
        )
    if layers is None and getattr(config, "is_decoder", None) is False:
        raise unsupported(config, "attend in both directions")
    if layers is None or model.get_output_embeddings() is None:
        said = "are not supported: their decoder shows no list of `layers` and an output embedding"
        raise unsupported(config, said)
    interface = getattr(type(model), "_can_set_attn_implementation", None)
    if interface is not None and not interface():
        raise unsupported(
            config,
            "do not take our attention: they compute attention in code of their own, not through "
            "transformers' attention interface",
        )
    if "position_ids" not in inspect.signature(type(backbone).forward).parameters:
        raise unsupported(
            config,
            "do not take position_ids: they number tokens by their place in the cache, and the "
            "nodes of a tree need positions of their own",
        )
