"""Fine-tune a base model with a quantized low-rank adapter.

python -m train.finetune sft --data_format instruction --data FILE.jsonl
python -m train.finetune multitask --config writing_assistant
python -m train.finetune dpo --adapter RUN --data PREFERENCES.jsonl
python -m train.finetune merge --adapter RUN --output DIR
python -m train.finetune pairs --data SCORED.jsonl --output PREFERENCES.jsonl
python -m train.finetune data --output DIR
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import cli
from configs.finetune_schema import DpoConfig, MergeConfig, MultitaskConfig, SftConfig
from configs.load import load_config
from eagle.errors import EagleError

LIBRARIES = ("peft", "trl", "bitsandbytes", "accelerate")
HELP = {
    "sft": """Supervised fine-tuning; without arguments, of the embedded model on shipped instructions.

    --data_format chat|instruction|fim|mixed|plain|tokenized; --base and --data name the base model
    and the data file(s); --adapter goes on from an adapter; --config takes a YAML file or a preset;
    --resume continues the run in --output (or a checkpoint folder). Any setting is an override:
    train.max_steps=20 model.quantization=none lora.r=32.""",
    "multitask": """Several tasks in one adapter; without arguments, those of a writing assistant.

    The tasks stand in --config, a YAML file or a preset (docs/finetune.md); other flags as for sft.
    """,
    "dpo": """Preference optimisation (DPO) from an SFT adapter, which is also the reference.

    --adapter names the SFT adapter or its run; without one the base is the reference. --data holds
    {prompt, chosen, rejected}, chat pairs, or {query, retrieval_result, chosen, rejected}; without
    it, pairs are made of the shipped docstrings. Other flags as for sft.""",
}


def trainer(method: str, schema: type, preset: str | None = None) -> Callable[..., int]:
    def command(
        *overrides: str,
        data_format: str | None = None,
        base: str | None = None,
        adapter: str | None = None,
        data: str | None = None,
        output: str | None = None,
        config: str | None = preset,
        resume: bool | str | None = None,
        local_rank: int | None = None,
    ) -> int:
        if local_rank is not None:  # the deepspeed launcher's way
            os.environ.setdefault("LOCAL_RANK", str(local_rank))
        flags = {"model.base": base, "model.adapter": adapter, "data.path": data}
        flags |= {"data.format": data_format, "train.output": output, "train.resume": resume}
        return run(method, load_config(schema, config, overrides, flags, "finetune"))

    command.__doc__, command.config = HELP[method], schema
    return command


def run(method: str, cfg: Any, quiet: bool = False) -> int:
    """Train as `cfg` says; returns the exit code."""
    # its import takes a second, and only tasks are measured by it
    require_libraries(*(["torchmetrics"] if method == "multitask" else []))
    from train.finetune.run import execute

    body = getattr(importlib.import_module(f"train.finetune.{method}"), method)
    return execute(cfg, method, body, quiet)


def merge(
    *overrides: str,
    adapter: str | None = None,
    base: str | None = None,
    output: str | None = None,
    config: str | None = None,
) -> int:
    """Merge an adapter into its base in full precision, and report how far the result differs."""
    flags = {"adapter": adapter, "base": base, "output": output}
    cfg = load_config(MergeConfig, config, overrides, flags, "finetune")
    require_libraries()
    return importlib.import_module("train.finetune.merge").merge(cfg)


def pairs(*, data: str, output: str, margin: float = 0.0, per_prompt: int = 1) -> int:
    """Preferences out of scored samples: {prompt, samples: [{text, score}]} or a line a sample: the
    best against the worst, then the next two, up to --per_prompt pairs; scores that differ by no
    more than --margin are ties and give none."""
    from train.finetune.preference import build_pairs

    return build_pairs(data, output, margin, per_prompt)


def data(*, output: str) -> int:
    """Write the example data to --output: task records, chats about functions and preferences, made
    of the docstrings that ship with the package, and the same held out."""
    from train.finetune.assistant import MAKERS, write_example

    for kind, split in itertools.product(MAKERS, ("train", "eval")):
        path, count = write_example(kind, split, Path(output).expanduser())
        print(f"{count:6d} {path}")
    return 0


def require_libraries(*more: str) -> None:
    """Import the trainers without their chatter: it is about options that the user cannot set."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # accelerate's: that the trainer, and not it, counts the steps of an accumulation
    for name in ("bitsandbytes", "DeepSpeed", "trl", "torch.distributed", "accelerate.accelerator"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # peft and TRL still ask by the old name
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
    try:
        for name in (*LIBRARIES, *more):
            importlib.import_module(name)
    except ImportError as error:
        need = f"fine-tuning needs {name}: pip install 'eagle-heads[finetune]'"
        raise EagleError(f"{need} ({error})") from error
    disable_progress_bar()


COMMANDS = {
    "sft": trainer("sft", SftConfig),
    "multitask": trainer("multitask", MultitaskConfig, "writing_assistant"),
    "dpo": trainer("dpo", DpoConfig),
    "merge": merge,
    "pairs": pairs,
    "data": data,
}

if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] and given[0].startswith("--local_rank"):  # the deepspeed launcher puts it first
        given = [*given[1:], given[0]]
    cli.choose(COMMANDS, __doc__, "python -m train.finetune", given)
