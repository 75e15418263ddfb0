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
from pathlib import Path
from typing import Any

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
    require_positive(shard_mb=shard_mb, batch_size=batch_size)
    flags = {"data.format": data_format, "model.base": base, "data.path": data}
    cfg = load_config(HeadTrainConfig, config, overrides, flags)
    from transformers.utils.logging import disable_progress_bar

    from train.prepare.features import write_features
    from train.runs import LOCK, locked

    disable_progress_bar()
    given = dict(data_format=data_format, base=base, data=data, config=config)
    given |= dict(shard_mb=shard_mb, batch_size=batch_size)
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    command = shlex.join(["python", "-m", "train.prepare", "features", *words, *overrides])
    folder = Path(output).expanduser()
    with locked(folder / LOCK, folder):
        index = write_features(cfg, folder, command, shard_mb, batch_size)
    size = index.tokens * index.belongs.bytes_per_token / 1e9
    print(f"{size:.3g} GB of features in {output}; train with: --features {output}")


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
    endpoint_body: str = "{}",
    api_key_env: str | None = None,
    concurrency: int = 8,
    timeout: float = 600.0,
) -> None:
    """Let the target write the answers of a data set: assistant turns, responses or FIM middles.

    --data FILE --data_format chat|instruction|fim|tokenized --output ANSWERS.jsonl. Turns of a chat
    are written in order, each after the new ones. Answers go to ANSWERS.journal as they come; the
    same command goes on after an interruption. Beside the output: ANSWERS.card.json, which training
    reads to record that the answers are the target's own, and ANSWERS.quarantine.jsonl with the
    records that got no answer. --limit N takes the first N records.

    --base (default: the embedded one) writes with --slots rows at a time; --adapter and
    --quantization are the target's. --head drafts, which changes no answer and is faster with few
    slots only. --temperature 0,0.8 takes turns by record. --compile max, --dtype and --device are
    as in generation.

    --endpoint URL --endpoint_model NAME asks an OpenAI-compatible server instead (vLLM, SGLang,
    ...), with --concurrency requests at a time; --api_key_env names the environment variable that
    holds the key, and --endpoint_body JSON adds fields to each request. --base then names the
    tokenizer of the target, which FIM, tokenized and Alpaca prompts need.
    """
    require_positive(limit=limit, slots=slots, concurrency=concurrency)
    require_positive(max_new_tokens=max_new_tokens)
    flags = {"data.format": data_format, "data.path": data}
    cfg = load_config(HeadTrainConfig, config, overrides, flags).data
    from train.prepare import regenerate as work
    from train.prepare.answering import Endpoint, Local, Sampling
    from train.runs import LOCK, locked

    sampling = Sampling(_temperatures(temperature), top_p, top_k, max_new_tokens, seed)
    files = work.find_files(cfg)
    target = Path(output).expanduser()
    if endpoint is not None and endpoint_model is not None:
        body = _json_object(endpoint_body)
        asking = dict(base=base, body=body, api_key_env=api_key_env, concurrency=concurrency)
        engine = Endpoint(endpoint, endpoint_model, sampling, timeout=timeout, **asking)
    elif endpoint or endpoint_model or endpoint_body != "{}" or api_key_env:
        also = "--endpoint_body and --api_key_env with them"
        raise ConfigError(f"--endpoint URL and --endpoint_model NAME go together, and {also}")
    else:
        loading = dict(adapter_path=adapter, quantization=quantization, compile=compile)
        engine = Local(sampling, base, head, slots, dtype=dtype, device=device, **loading)
    with locked(target.with_name(f".{target.name}{LOCK}"), target):
        counts = work.regenerate(cfg, files, target, engine, limit)["counts"]
    records, failed, most = counts["records"], counts["failed"], cfg.max_bad_fraction
    cut = f"{counts['cut_at_max_new_tokens']} cut at {max_new_tokens} tokens"
    told = f"{counts['answers']} answers, {cut}, {failed} failed"
    print(f"{counts['written']} of {records} records in {output}: {told}")
    if failed > most * records:
        told = (
            f"{failed} of {records} records got no answer, more than data.max_bad_fraction={most:g}"
        )
        raise ConfigError(f"{told}; the reasons are in {work.quarantine_path(target)}")


def require_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"--{name}={value}: must be above 0")


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value < float("inf") for value in values):
        raise ConfigError(f"--temperature={text}: give a number from 0 on, or several: 0,0.8")
    return values


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    raise ConfigError(f'--endpoint_body={text}: must be a JSON object, as {{"top_k": 20}}')


COMMANDS = {"features": features, "regenerate": regenerate}

if __name__ == "__main__":
    cli.choose(COMMANDS, __doc__, "python -m train.prepare")
