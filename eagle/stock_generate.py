"""Behind stock `model.generate(..., custom_generate=...)`: what that call asks for, in
`EaModel.eagenerate`'s words.

B rows, T columns."""

from __future__ import annotations

import inspect

import torch

from .errors import EagleError
from .options import refuse, top_p_of

# no processor of such a call, or one that would have to come after the warpers
ELSEWHERE = (
    "num_beams guidance_scale typical_p epsilon_cutoff eta_cutoff top_h penalty_alpha dola_layers "
    "prompt_lookup_num_tokens"
).split()
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# what stock `generate` prepares for every model; what these may say beyond that is looked at
PREPARED = (
    "use_cache logits_to_keep attention_mask position_ids cache past_key_values cache_position"
).split()
OURS = ("logits_processor", "stopping_criteria")
# ours to apply, or to end by
WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper")
ENDS = ("MaxLengthCriteria", "EosTokenCriteria")


def arguments(model: torch.nn.Module, ids: torch.Tensor, config, kwargs: dict) -> dict:
    """ids [B, T], and what `generate` of `model` hands to a custom one -> `eagenerate`'s words."""
    refuse(config, ELSEWHERE)
    processors, criteria = (kwargs.pop(name, None) or [] for name in OURS)
    call = running_call(model)
    other = {name: getattr(config, name, None) for name in OUTPUTS}
    other["assistant_model"] = call.get("assistant_model")
    other |= {k: v for k, v in kwargs.items() if k not in PREPARED}
    past = kwargs.get("cache", kwargs.get("past_key_values"))
    other["cache (that holds tokens already)"] = past is not None and past.get_seq_length() > 0
    mask = kwargs.get("attention_mask")  # None: all ones, whatever the tokens are
    mask = torch.ones_like(ids) if mask is None else mask
    other["position_ids (other than the mask's)"] = not follows(kwargs.get("position_ids"), mask)
    if strange := [k for k, v in other.items() if v is not None and v is not False]:
        raise EagleError(f"custom_generate does not take {', '.join(strange)}; leave them out")
    asked = {
        "attention_mask": mask,
        "max_new_tokens": config.max_length - ids.shape[1],
        "eos_token_id": -1 if config.eos_token_id is None else config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "logits_processor": [p for p in processors if type(p).__name__ not in WARPERS],
        "stopping_criteria": [c for c in criteria if type(c).__name__ not in ENDS],
        "streamer": call.get("streamer"),
        "prompt_shown": True,
    }
    if config.do_sample:
        asked["temperature"] = 1.0 if config.temperature is None else config.temperature
        asked |= {"top_k": config.top_k, "top_p": top_p_of(config), "min_p": config.min_p}
    return asked


def running_call(model: torch.nn.Module) -> dict:
    """The arguments of the `generate` call that is running: transformers hands a function given as
    custom_generate neither the streamer nor the assistant."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model:
            return frame.f_locals
        frame = frame.f_back
    return {}


def follows(positions: torch.Tensor | None, mask: torch.Tensor) -> bool:
    """Are position_ids [B, T] those of the mask, where it counts?"""
    if positions is None:
        return True
    real = mask.bool()
    expected = (mask.long().cumsum(-1) - 1).expand(len(mask), -1)
    return positions.shape == mask.shape and torch.equal(positions[real], expected[real])
