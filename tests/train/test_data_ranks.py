"""Several processes may tokenise the same data at once."""

import json
import subprocess
import sys
from pathlib import Path

from data_helpers import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import json, sys
from configs.schema import DataConfig
from train.data import load_dataset_for, load_tokenizer
folder, path, cache = sys.argv[1:]
cfg = DataConfig(format="plain", path=path, cache_dir=cache)
data = load_dataset_for(cfg, load_tokenizer(folder))
print(json.dumps([data[i] for i in range(len(data))]))
"""


def test_two_processes_build_the_same_entry(tmp_path, tokenizer_dir):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"word {n}"} for n in range(3000)])
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", LOAD, str(tokenizer_dir), str(path), str(cache)]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    assert first == second and len(first) > 2900
    assert len(list((cache / "tokenised").iterdir())) == 1
