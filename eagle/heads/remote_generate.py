"""Speculative `generate` with the draft head of this folder; the text stays the model's own.

    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)

head: another folder or hub id of a head; tree: "total_token,depth,top_k" or "auto"."""

import copy
import inspect


def generate(model, head=None, tree=None, tokenizer=None, stop_strings=None, **kwargs):
    try:
        from eagle.model import engine_for
    except ImportError as error:
        raise ImportError("this draft head needs its engine: pip install eagle-heads") from error

    config = kwargs.get("generation_config")
    stop_strings = stop_strings or getattr(config, "stop_strings", None)
    # a function given as custom_generate is not handed the tokenizer that they need
    if stop_strings:
        from transformers import StopStringCriteria

        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
        if config is not None:
            kwargs["generation_config"] = config = copy.deepcopy(config)
            config.stop_strings = None
        criteria = StopStringCriteria(tokenizer, stop_strings)
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), criteria]
    engine = engine_for(model, head or _folder(), tree)
    return model.generate(custom_generate=engine.custom_generate, **kwargs)


def _folder():
    """What the caller gave `generate` as custom_generate: transformers copies this file elsewhere
    and does not say where it comes from."""
    frame = inspect.currentframe()
    while frame is not None:
        folder = frame.f_locals.get("custom_generate")
        if isinstance(folder, str):
            return folder
        frame = frame.f_back
    raise ValueError("give head=FOLDER, the folder or hub id that holds the head")
