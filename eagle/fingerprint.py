"""Which weights a target has: what decides whether features, heads and adapters are of it.

A fingerprint is "2:" and a SHA-256; 2 is the number of the rule below. Earlier ones, without a
number, saw rows of three tensors: with them nothing is compared (`is_earlier`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from .errors import EagleError

RULE = "2:"
BLOCKS, WIDTH = 32, 128
# what peft wraps around a layer of the base, and what it brings
PEFT_MODEL = "base_model.model."
WRAPPERS = ("base_layer", "original_module", "token_adapter")
BROUGHT = ("lora_", "modules_to_save", "trainable_tokens_")
# of the text config
ARCHITECTURE = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads vocab_size"
).split()


@torch.no_grad()
def target_fingerprint(model: nn.Module) -> str:
    """Of the architecture and of every tensor, parameters and persistent buffers, packed weights
    and their scales where they are quantized: its name, shape and kind, which of its names are tied
    to one tensor, and up to 4,096 of its values. An adapter on the model does not count.

    A tensor of more values is cut into 32 equal parts, and 128 neighbours count of each, from a
    place that depends on its size alone. So a tensor that is zeroed, scaled or exchanged is seen;
    one that differs in a few values, or by less than bf16 tells, may not be. Values of 16 to 64 bits
    count as bf16: a checkpoint has one fingerprint, loaded as fp32 or as bf16."""
    config = model.config.get_text_config()
    facts = [(name, getattr(config, name, None)) for name in ARCHITECTURE]
    digest = hashlib.sha256(repr(facts).encode())
    tensors: dict[int | str, torch.Tensor] = {}
    names: dict[int | str, list[str]] = {}
    for name, value in of_the_base(model.state_dict(keep_vars=True)):
        if value.is_meta or hasattr(value, "ds_id"):
            raise EagleError(
                f"the weights of {name} are not in memory whole (offloaded by device_map, or split "
                "by ZeRO 3), so they cannot be told from another model's; load the model whole"
            )
        key = id(value) if isinstance(value, nn.Parameter) else name  # parameters may be tied
        tensors[key] = value
        names.setdefault(key, []).append(name)
    order = sorted(tensors, key=lambda key: sorted(names[key]))
    for key, values in zip(order, samples([tensors[key] for key in order]), strict=True):
        floats = values.dtype == torch.bfloat16
        if floats and values.isnan().any():
            said = f"{names[key][0]} of this model holds NaN"
            raise EagleError(f"{said}; restore its checkpoint, or train it anew")
        kind = "float" if floats else str(tensors[key].dtype)
        digest.update(repr((sorted(names[key]), tuple(tensors[key].shape), kind)).encode())
        digest.update(values.view(torch.uint8).numpy())
    return RULE + digest.hexdigest()


def of_the_base(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that no adapter brought, under the names that they have without one."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and not of_an_adapter(name):
            parts = name.removeprefix(PEFT_MODEL).split(".")
            yield ".".join(part for part in parts if part not in WRAPPERS), value


def of_an_adapter(name: str) -> bool:
    return any(part.startswith(BROUGHT) for part in name.split("."))


def is_earlier(fingerprint: str | None) -> bool:
    """Was it recorded by a version with another rule, so that it tells nothing here?"""
    return fingerprint is not None and not fingerprint.startswith(RULE)


def samples(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The values [n] that count of each, on the CPU: floats as bf16, what has one byte as uint8.
    One transfer a device and kind."""
    places: dict[tuple, torch.Tensor] = {}
    groups: dict[tuple, dict[int, torch.Tensor]] = {}
    for number, tensor in enumerate(tensors):
        n, device = tensor.numel(), tensor.device
        if tensor.dtype.itemsize == 1:
            tensor = tensor.view(torch.uint8)
        if n > BLOCKS * WIDTH:
            # of experts that are kept as one tensor, each counts
            parts = max(BLOCKS, 4 * len(tensor) if tensor.ndim > 2 else 0)
            size = n, min(parts, n // WIDTH), device
            if size not in places:
                places[size] = blocks(*size)
            tensor = tensor.take(places[size])
        taken = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        groups.setdefault((device, taken.dtype), {})[number] = taken.reshape(-1)
    found = {}
    for group in groups.values():
        whole = torch.cat(list(group.values())).cpu()
        found |= zip(group, whole.split([len(taken) for taken in group.values()]), strict=True)
    return (found[number] for number in range(len(tensors)))


def blocks(n: int, parts: int, device: torch.device) -> torch.Tensor:
    """Places [parts * WIDTH] in a tensor of n values: a block in each of equal parts."""
    part = torch.arange(parts, device=device)
    first, end = part * n // parts, (part + 1) * n // parts
    # multiples of the golden ratio: no column of a matrix is met in every part
    start = first + (end - first - WIDTH) * (part * 40503 % 65536) // 65536
    return (start[:, None] + torch.arange(WIDTH, device=device)).flatten()
