"""Prepare a training run.

    python -m train.prepare features --data_format chat --data FILE.jsonl --output DIR
    python -m train.prepare regenerate --data_format chat --data FILE.jsonl --output ANSWERS.jsonl

`features` writes what the target computes for each row, so that training (`--features DIR`) runs no
layer of the target. `regenerate` lets the target write the answers, so that the head learns what it
will draft.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from configs import cli
from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import HeadTrainConfig


def features(
    *overrides: str,
    output: str,
    data_format: str | None = None,
    base: str | None = None,
    data: str | None = None,
    config: str | None = None,
    shard_mb: float = 256.0,
    batch_size: int = 8,
) -> None:
    """Compute the target's features of every training row once, for `python -m train.main
    --features DIR`.

    Takes the data and model settings of train.main: --base, --data, --data_format, --config and
    overrides (data.max_length=1024 model.dtype=bfloat16). --output is the folder; the same command
    goes on with it after an interruption, and writes damaged shards again. --shard_mb is what a
    kill loses at the most.

    --batch_size rows go through the target together. On a CPU the numbers of a row do not depend on
    the rows beside it, and a run from features equals the online run bit for bit; on a GPU to
    rounding.
    """
    if shard_mb <= 0 or batch_size < 1:
        raise ConfigError("--shard_mb must be above 0 and --batch_size at least 1")
    flags = {"data.format": data_format, "model.base": base, "data.path": data}
    cfg = load_config(HeadTrainConfig, config, overrides, flags)
    from transformers.utils.logging import disable_progress_bar

    from train.prepare.features import gigabytes, write_features

    disable_progress_bar()
    given = {
        "data_format": data_format,
        "base": base,
        "data": data,
        "config": config,
        "shard_mb": f"{shard_mb:g}",
        "batch_size": str(batch_size),
    }
    words = [w for name, value in given.items() if value is not None for w in (f"--{name}", value)]
    command = shlex.join(["python", "-m", "train.prepare", "features", *words, *overrides])
    index = write_features(cfg, Path(output).expanduser(), command, shard_mb, batch_size)
    size = gigabytes(index.tokens * index.belongs.bytes_per_token)
    print(f"{size} of features in {output}; train with: --features {output}")


def regenerate(
    *overrides: str,
    output: str,
    data: str | None = None,
    data_format: str | None = None,
    config: str | None = None,
    base: str | None = None,
    head: str | None = None,
    adapter: str | None = None,
    quantization: str = "none",
    temperature: str = "0",
    top_p: float = 0.0,
    top_k: int = 0,
    max_new_tokens: int = 512,
    seed: int = 0,
    limit: int | None = None,
    slots: int = 8,
    compile: str = "auto",
    dtype: str = "auto",
    device: str | None = None,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    endpoint_body: str | None = None,
    api_key_env: str | None = None,
    concurrency: int = 8,
    timeout: float = 600.0,
) -> int:
    """Let the target write the answers of a data set: assistant turns, responses or FIM middles.

    --data FILE --data_format chat|instruction|fim|tokenized --output ANSWERS.jsonl. Turns of a chat
      are
    written in order, each after the new ones. The same command goes on after an interruption.
      Beside the
    output: ANSWERS.card.json, which training reads to record that the answers are the target's own,
      and
    ANSWERS.quarantine.jsonl with the records that got no answer. --limit N takes the first N
      records.

    --base (default: the embedded one) writes with --slots rows at a time; --adapter and
    --quantization are the target's. --head drafts, which changes no answer and is faster with few
    slots only. --temperature 0,0.8 takes turns by record. --compile max, --dtype and --device are
    as in generation.

    --endpoint URL --endpoint_model NAME asks an OpenAI-compatible server instead (vLLM, SGLang,
    ...), with --concurrency requests at a time; --api_key_env names the environment variable that
    holds the key, and --endpoint_body JSON adds fields to each request. --base then names the
    tokenizer of the target, which FIM, tokenized and Alpaca prompts need.
    """
    if (endpoint is None) != (endpoint_model is None):
        raise ConfigError("--endpoint URL and --endpoint_model NAME go together")
    for name, value in (
        ("limit", limit),
        ("slots", slots),
        ("concurrency", concurrency),
        ("max_new_tokens", max_new_tokens),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value}: must be at least 1")
    cfg = load_config(
        HeadTrainConfig, config, overrides, {"data.format": data_format, "data.path": data}
    ).data
    from train.prepare import regenerate as work
    from train.prepare.answering import Sampling

    sampling = Sampling(_temperatures(temperature), top_p, top_k, max_new_tokens)
    files = work.find_files(cfg)
    if endpoint is None:
        for name, value in (("endpoint_body", endpoint_body), ("api_key_env", api_key_env)):
            if value is not None:
                raise ConfigError(f"--{name} goes with --endpoint URL")
        loading = {
            "adapter": adapter,
            "quantization": quantization,
            "dtype": dtype,
            "device": device,
            "compile": compile,
        }
        rewriter, engine, who = work.open_local(cfg, sampling, base, head, slots, **loading)
        notes = {}
    else:
        rewriter, engine, who = work.open_endpoint(
            cfg,
            sampling,
            endpoint,
            endpoint_model,
            base,
            _json_object(endpoint_body),
            api_key_env,
            concurrency,
            timeout,
        )
        notes = {"url": endpoint.rpartition("@")[2]}  # without a password
    card = work.regenerate(
        files, Path(output).expanduser(), rewriter, engine, who, sampling, seed, limit, notes
    )
    counts = card["counts"]
    print(
        f"{counts['written']} of {counts['records']} records in {output}: {counts['answers']} answers, "
        f"{counts['cut_at_max_new_tokens']} cut at {max_new_tokens} tokens, {counts['failed']} failed"
    )
    if counts["failed"] > cfg.max_bad_fraction * counts["records"]:
        raise ConfigError(
            f"{counts['failed']} of {counts['records']} records got no answer, more than data.max_bad_fraction="
            f"{cfg.max_bad_fraction:g}; the reasons are in {work.Journal.beside(Path(output))}"
        )
    return 0


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value < float("inf") for value in values):
        raise ConfigError(f"--temperature={text}: give a number from 0 on, or several: 0,0.8")
    return values


def _json_object(text: str | None) -> dict:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(
            f'--endpoint_body={text}: must be a JSON object, for instance {{"top_k": 20}}'
        )
    return value


COMMANDS = {"features": features, "regenerate": regenerate}

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in COMMANDS:
        help_wanted = arguments[:1] in (["-h"], ["--help"])
        text = __doc__ if help_wanted else f"error: name a command: {', '.join(COMMANDS)}"
        print(text, file=sys.stderr)
        sys.exit(0 if help_wanted else 2)
    name = arguments[0]
    cli.main(COMMANDS[name], arguments[1:], name=f"python -m train.prepare {name}")
