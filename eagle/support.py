"""Which stock models can be served: what their code and configuration say, and a probe."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface

from .attention import NAME, TreeContext, tree_attention_forward
from .cache import StaticKVCache
from .errors import EagleError
from .linears import Int8Linear, has_products
from .loading import decoder_layers

INSTEAD = "use a decoder-only causal language model such as Llama, Qwen, Mistral or Gemma"
# layer types that see all of the context ("attention" is an older name), or a sliding window of it
ATTENDING = {"full_attention", "sliding_attention", "attention"}
RECURRENT = ("mamba", "linear_attention", "recurrent", "conv", "rwkv", "ssm")
# whose decoder layers do not hand keyword arguments to their attention (transformers 5.23)
DROP_ARGUMENTS = ("nemotron", "stablelm")
# what models that do not fit raise, whose code is not made for our arguments
MISFITS = (TypeError, AttributeError, LookupError, RuntimeError, ValueError)


def relay_context(config, layers: nn.ModuleList) -> list:
    """Hooks that carry the `tree` argument to the attention where the family's layers drop it."""
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
    widths = [(each, getattr(each, "sliding_window", None)) for each in (config, *model.modules())]
    widths = [(owner, x) for owner, x in widths if type(x) is int and 0 < x < below]
    try:
        for owner, _ in widths:
            owner.sliding_window = window
        yield
    finally:
        for owner, value in widths:
            owner.sliding_window = value


@contextmanager
def unread_arguments() -> Iterator[set[str]]:
    """Collects what our attention is given and does not read: tensors by name, and a mask other
    than the positions that `run` hands in."""
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


def unsupported(config, why: str) -> EagleError:
    return EagleError(f"models of type {getattr(config, 'model_type', '?')!r} {why}; {INSTEAD}")


def refuse_shapes(config, found: list[tuple[int, int, int]]) -> None:
    """found: (key/value heads, key dim, value dim) of each layer that reached the cache."""
    if len(set(found)) > 1 or any(key != value for _, key, value in found):
        latent = ", of multi-head latent attention" if hasattr(config, "kv_lora_rank") else ""
        said = "are not supported: their key and value shapes differ, (heads, key dim, value dim)"
        raise unsupported(config, f"{said} {sorted(set(found))}{latent}")


def supported_parts(model: nn.Module) -> tuple:
    """The model's text config, its decoder and the decoder's layers; refuses models that cannot be
    served, where the configuration or the code shows it."""
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(model.config, name, False):
            raise unsupported(model.config, "attend to an encoder (cross-attention)")
    config, backbone = model.config.get_text_config(), model.get_decoder()
    layers = decoder_layers(backbone)
    types = {str(t) for t in getattr(config, "layer_types", None) or []}
    recurrent = sorted(t for t in types if any(r in t for r in RECURRENT))
    unknown = sorted(types - ATTENDING)
    biased = any(getattr(c, "alibi", 0) for c in (config, getattr(config, "attn_config", None)))
    takes_ours = getattr(type(model), "_can_set_attn_implementation", lambda: True)
    numbered = "position_ids" in inspect.signature(type(backbone).forward).parameters
    for refused, why in (
        (
            recurrent or getattr(model, "_is_stateful", False),
            f"keep a recurrent state {', '.join(recurrent)} that cannot be rolled back to an "
            "accepted token",
        ),
        ("chunked_attention" in types, "use chunked attention, which is not supported"),
        (unknown, f"have layers of type {', '.join(unknown)}, which tree attention does not know"),
        (
            getattr(config, "num_kv_shared_layers", None),
            "share keys and values between layers, and the cache holds one pair a layer",
        ),
        (
            biased or config.model_type == "bloom",
            "add a bias to the attention scores by distance (ALiBi), unknown to tree attention",
        ),
        (
            layers is None and getattr(config, "is_decoder", None) is False,
            "attend in both directions",
        ),
        (
            layers is None or model.get_output_embeddings() is None,
            "are not supported: their decoder shows no list of `layers` and an output embedding",
        ),
        (
            not takes_ours(),
            "compute attention in code of their own, not through transformers' attention interface",
        ),
        (
            not numbered,
            "do not take position_ids: they number tokens by their place in the cache, and the "
            "nodes of a tree need positions of their own",
        ),
    ):
        if refused:
            raise unsupported(config, why)
    return config, backbone, layers


@torch.inference_mode()
def probe(target) -> None:
    """Run six tokens through our attention and cache, as a prompt and as a tree, and through stock
    ones: same logits, or refuse. This finds models whose layers drop the context, see the future,
    keep state of their own, or give the attention what ours does not read. Sets the target's
    kv_heads and head_dim."""
    ids = some_ids(target)
    found: list[tuple[int, int, int]] = []
    try:
        _record_shapes(target, ids, found)
        refuse_shapes(target.config, found)
        target.kv_heads, target.head_dim, _ = found[0]
        logits, expected = _both_ways(target, ids)
    except EagleError:
        raise
    except MISFITS as error:
        refuse_shapes(target.config, found)  # the better reason, where it is the reason
        said = f"do not take our attention and cache: {error}"
        raise unsupported(target.config, said) from error
    tolerance = {torch.float32: 1e-3, torch.float16: 5e-2}.get(target.dtype, 2e-1)
    if any(isinstance(m, Int8Linear) for m in target.model.modules()):
        tolerance = 0.6  # rows that round to another int8 magnify what differs in the last bit
    error = (logits.float() - expected).abs().max().item() / max(expected.std().item(), 1e-6)
    if not expected.isfinite().all():
        raise _not_finite(target)
    if not error < tolerance:
        said = "are not supported: logits through our attention differ from transformers' by"
        raise unsupported(target.config, f"{said} {error:.3g} standard deviations")
    same = torch.equal(logits[:, 3:6], logits[:, 6:])  # in a prompt, and in a tree
    target.inexact = why_inexact(target, same)


def why_inexact(target, same: bool) -> str | None:
    """Why a token's bits may depend on what is run beside it; None where they do not. same: in a
    sample they did not."""
    if target.device.type != "cpu":
        return "only the kernels of a CPU are exact"
    if target.no_kernels:
        return f"the CPU's kernels do not compile: {target.no_kernels}"
    exact = target.exact_linears
    others = exact.others if target.compiled is None else []  # packages compute them in their way
    known = {id(m) for m in (*exact.linears, *others)}
    kinds = exact.elsewhere | {
        type(m).__name__ for m in target.model.modules() if id(m) not in known and has_products(m)
    }
    if kinds:
        return f"the products of {', '.join(sorted(kinds))} are computed elsewhere"
    return None if same else "its layers round a token differently alone and among others"


@torch.inference_mode()
def same_bits(target) -> bool:
    """Of three tokens in a prompt and in a tree."""
    logits, _ = _both_ways(target, some_ids(target))
    return torch.equal(logits[:, 3:6], logits[:, 6:])


def some_ids(target) -> torch.Tensor:
    """[1, 6], spread over the vocabulary: the first are often special, with degenerate
    embeddings."""
    return (torch.arange(1, 7, device=target.device) * (target.vocab_size // 7))[None]


def _not_finite(target) -> EagleError:
    weights = target.model.named_parameters()
    broken = [n for n, p in weights if p.is_floating_point() and not p.isfinite().all()]
    why = f"values overflow in {target.dtype}; load it with dtype=float32"
    if broken:
        why = f"{len(broken)} weights hold some, {broken[0]} first; restore the checkpoint"
    return EagleError(f"{target.name} computes NaN or infinity: {why}")


def _record_shapes(target, ids: torch.Tensor, found: list[tuple[int, int, int]]) -> None:
    """(heads, key dim, value dim) of what each layer hands to our attention; refuses models whose
    layers do not all do so, and those that hand in more than it reads."""
    updated: list[int] = []

    class Recorder(TreeContext):
        def attend(self, layer, q, k, v, *args):
            self.layers_seen += 1
            found.append((k.shape[1], k.shape[3], v.shape[3]))
            return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])

    class Passing(StaticKVCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            updated.append(layer_idx)
            return super().update(key_states, value_states, layer_idx)

    cache = Passing(0, 1, 1, 6, 1, target.dtype, target.device)
    context = Recorder(cache, torch.arange(6, device=target.device)[None])
    with unread_arguments() as unread:
        target.forward(ids, context, features=False)
    L = len(target.layers)
    if context.layers_seen != L or len(updated) != L:
        raise unsupported(
            target.config,
            f"are not supported: of {L} layers, {context.layers_seen} calls reach transformers' "
            f"attention interface with our arguments and {len(updated)} our cache",
        )
    if unread:
        said = f"are not supported: their attention also needs {', '.join(sorted(unread))}"
        raise unsupported(target.config, f"{said}, which tree attention does not honour")


def _both_ways(target, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, 9, V] of six tokens as a prompt and of the last three once more, as a chain of
    tree nodes behind a prefix with a branch between; and the stock model's own. Sliding windows
    are shortened meanwhile, so that they count."""
    with short_windows(target.model, target.config, 3, below=target.max_positions):
        positions = torch.arange(6, device=target.device)[None]
        causal = torch.ones(1, 6, 6, dtype=torch.bool, device=target.device).tril()
        context = TreeContext(target.new_cache(1, 6), positions, causal, positions)
        logits, _ = target.forward(ids, context, features=False)
        cache, three = target.new_cache(1, 7), torch.full((1,), 3, device=target.device)
        target.prefill(ids[:, :3], three, [3], cache, features=False)
        depth = torch.tensor([[0, 1, 1, 2]], device=target.device)
        mask = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
        mask = torch.tensor([mask], dtype=torch.bool, device=target.device)
        tree, _ = target.verify_tree(ids[:, [3, 0, 4, 5]], depth, mask, cache, features=False)
        with target.stock() as model:
            expected = model(input_ids=ids, use_cache=False).logits.float()
    logits = torch.cat([logits, tree[:, [0, 2, 3]]], dim=1)
    return logits, torch.cat([expected, expected[:, 3:]], dim=1)
