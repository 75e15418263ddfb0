"""One DeepSpeed training step of a tiny layer, in this process alone; the last line printed is
JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from configs.deepspeed_presets import deepspeed_config
from configs.schema import HeadTrainConfig
from train.head.distributed import import_deepspeed, join_world


def probe(zero: int) -> dict:
    """Steps once with the ZeRO preset `zero`; raises what DeepSpeed raises."""
    began = time.monotonic()
    world = join_world()
    deepspeed = import_deepspeed()
    cfg = HeadTrainConfig.model_validate({"train": {"zero": zero, "batch_size": 1}})
    config = deepspeed_config(cfg)
    layer = torch.nn.Linear(8, 8)
    engine, *_ = deepspeed.initialize(
        model=layer, model_parameters=list(layer.parameters()), config=config
    )
    engine.backward(engine(torch.ones(1, 8, device=world.device)).square().sum())
    engine.step()
    ops = {name: bool(fits) for name, fits in deepspeed.ops.__compatible_ops__.items()}
    return {"ops": ops, "device": str(world.device), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]) if len(sys.argv) > 1 else 0)))
