"""Features on disk: the same losses as online, resumable writing, refusals."""

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import Command
from head_helpers import (
    config,
    losses_of,
    require_same_tensors,
    save_tiny_model,
    trained,
    write_fim,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from eagle.errors import EagleError
from eagle.target import Target
from records import load_dataset_for, load_tokenizer
from train.head.features import Belongs, FeatureStore, Index, row_key
from train.head.loop import Trainer
from train.main import run
from train.prepare import features as writing
from train.prepare.features import write_features

TINY = 0.05  # megabytes a shard


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "fim.jsonl"
    write_fim(path, rows=30)
    return path


def prepare(cfg, output, **options):
    command = "python -m train.prepare features"
    return write_features(cfg, output, command, TINY, quiet=True, **options)


@pytest.fixture(scope="module")
def stores(base, data, tmp_path_factory):
    """stores(dtype) -> a folder of features of that dtype, made once."""
    made = {}

    def get(dtype):
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp("features") / dtype
            prepare(config(base, data, Path("unused"), model={"dtype": dtype}), made[dtype])
        return made[dtype]

    return get


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_from_features_has_the_online_losses_and_runs_no_target_layer(
    stores, base, data, tmp_path, monkeypatch, dtype
):
    """Bit for bit, losses and weights, over more than an epoch of shuffled rows: on one thread the
    numbers of a row do not depend on the rows beside it."""
    fit = Trainer.fit

    def without_layers(self):
        with monkeypatch.context() as patch:
            patch.setattr(LlamaDecoderLayer, "forward", None)
            return fit(self)

    options = {"max_steps": 8, "model": {"dtype": dtype}}
    online = trained(base, data, tmp_path / "online", **options)
    monkeypatch.setattr(Trainer, "fit", without_layers)
    with pytest.raises(TypeError, match="NoneType"):
        trained(base, data, tmp_path / "again", **options)
    options["data_more"] = {"features": str(stores(dtype))}
    offline = trained(base, data, tmp_path / "offline", **options)
    assert losses_of(online) == losses_of(offline) and len(losses_of(online)) == 8
    require_same_tensors(online / "head/model.safetensors", offline / "head/model.safetensors")


def test_features_are_stored_once_and_found_by_their_tokens(base, tmp_path):
    record = {"prefix": "def ", "middle": "add", "suffix": "(a, b):\n"}
    other = record | {"middle": "subtract"}
    path = tmp_path / "fim.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (record, other, record, record)))
    cfg = config(base, path, tmp_path / "run", data_more={"heldout_fraction": 0})
    index = prepare(cfg, tmp_path / "features", batch_size=2)
    assert len(index.rows) == 2 and sum(s["rows"] for s in index.shards) == 2
    store = FeatureStore(tmp_path / "features")
    ids = torch.tensor([[5, 6, 7, 8, 0, 0, 0, 0]])
    with pytest.raises(EagleError, match=r"lack a row of this batch \(4 tokens\)"):
        store.hidden_and_features(ids, [4])
    assert row_key([5, 6, 7]) == row_key(torch.tensor([5, 6, 7])) != row_key([5, 6, 8])
    row = load_dataset_for(cfg.data, load_tokenizer(str(base)))[1]["input_ids"]
    ids = torch.tensor([row + [0] * 5])
    hidden, features = store.hidden_and_features(ids, [len(row)])
    target = Target.from_pretrained(base, dtype="float32")
    expected = target.hidden_and_features(torch.tensor([row]))
    # stock passes of other shapes: how they round is the library's choice
    torch.testing.assert_close(hidden, expected[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features, expected[1][0], rtol=1e-4, atol=1e-4)


def command(base, data, output):
    given = f"--data_format fim --base {base} --data {data} --output {output} --shard_mb {TINY}"
    given += f" data.max_length=96 data.cache_dir={data.parent / 'cache'} model.dtype=float32"
    return ["train.prepare", "features", *given.split(), "data.heldout_fraction=0.1"]


@pytest.mark.slow
def test_killed_writing_goes_on_and_ends_the_same(stores, base, data, tmp_path):
    """kill -9 between shards: what was whole stays, the rest follows, all bytes as undisturbed."""
    output, whole = tmp_path / "features", stores("float32")
    names = {p.name for p in whole.iterdir()}
    process, deadline = Command(*command(base, data, output)), time.monotonic() + 100
    while len(list(output.glob("shard-*"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert process.kill() == -signal.SIGKILL, "all was written before the kill"
    kept = {p: p.stat().st_mtime_ns for p in output.glob("shard-*")}
    assert 3 <= len(kept) < len(names) - 1
    assert {p.name for p in kept} | {"index.json"} <= names
    (output / ".shard-00009.safetensors.tmp").write_bytes(b"half a shard")
    done = Command(*command(base, data, output)).output()
    assert done.returncode == 0, done.stderr
    for text in (f"{len(kept)} are there", "GB free", "ETA"):
        assert text in done.stderr
    assert {p.name for p in output.iterdir()} == names
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    for name in names - {"index.json"}:
        require_same_tensors(output / name, whole / name)


@pytest.mark.parametrize("harm", ["cut", "gone", "foreign"])
def test_a_damaged_shard_is_named_with_its_repair(stores, base, data, tmp_path, harm):
    folder = tmp_path / "features"
    shutil.copytree(stores("float32"), folder)
    shard = folder / "shard-00002.safetensors"
    whole = shard.read_bytes()
    if harm == "cut":
        shard.write_bytes(whole[: len(whole) // 2])
    elif harm == "gone":
        shard.unlink()
    else:
        shutil.copy(stores("bfloat16") / shard.name, shard)
    cfg = config(base, data, tmp_path / "run", data_more={"features": str(folder)})
    with pytest.raises(EagleError, match="shard-00002.safetensors") as caught:
        run(cfg, quiet=True)
    assert f"python -m train.prepare features --output {folder}" in str(caught.value)
    assert not (tmp_path / "run").exists()
    prepare(cfg, folder)
    assert shard.read_bytes() == whole
    FeatureStore(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base": 1}, "another target: fingerprint"),
        ({"model": {"feature_layers": [0, 1, 2]}}, r"feature layers \[1, 2, 4\].*has \[0, 1, 2\]"),
        ({"model": {"dtype": "bfloat16"}}, "dtype float32, this run has bfloat16; set model.dtype"),
        ({"data": 1}, r"lack \d+ of the \d+ rows.*files=\['fim.jsonl'\], this run has \['other"),
        ({"data_more": {"max_length": 48}}, "lack .*max_length=96, this run has 48"),
        ({"data_more": {"heldout_fraction": 0}}, "lack .*heldout_fraction=0.1, this run has 0"),
    ],
    ids=["target", "layers", "dtype", "data", "max-length", "held-out"],
)
def test_features_of_something_else_are_refused(
    stores, base, data, tmp_path, tokenizer_dir, change, message
):
    change = dict(change)
    if change.pop("base", None):
        base = tmp_path / "base"
        save_tiny_model(base, tokenizer_dir, seed=1)
    if change.pop("data", None):
        data = tmp_path / "other.jsonl"
        write_fim(data, rows=20, seed=5)
    change["data_more"] = {"features": str(stores("float32")), **change.get("data_more", {})}
    with pytest.raises(EagleError, match=message):
        run(config(base, data, tmp_path / "run", **change), quiet=True)


def test_a_part_of_the_data_is_enough(stores, base, data, tmp_path):
    """Rows are known by their tokens: in another order, or some of them."""
    part = tmp_path / "part.jsonl"
    part.write_text("".join(data.read_text().splitlines(keepends=True)[::2]))
    more = {"seed": 3, "heldout_fraction": 0.2}
    online = trained(base, part, tmp_path / "online", seed=7, data_more=more)
    more["features"] = str(stores("float32"))
    stored = trained(base, part, tmp_path / "stored", seed=7, data_more=more)
    assert losses_of(stored) == losses_of(online)


def test_other_features_are_not_overwritten(stores, base, data, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(stores("float32"), folder)
    with pytest.raises(EagleError, match=r"holds other features \(another dtype"):
        prepare(config(base, data, tmp_path / "run", model={"dtype": "bfloat16"}), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(EagleError, match="not empty"):
        prepare(config(base, data, tmp_path / "run"), tmp_path / "mine")
    with pytest.raises(EagleError, match="no features in"):
        FeatureStore(tmp_path / "nothing")
    (folder / "index.json").write_text((folder / "index.json").read_text()[:-9])
    with pytest.raises(EagleError, match="index.json is unusable"):
        FeatureStore(folder)


def test_too_little_disk_is_refused_before_work(base, data, tmp_path, monkeypatch, capsys):
    usage = SimpleNamespace(free=1_500_000)
    monkeypatch.setattr("train.prepare.features.shutil.disk_usage", lambda path: usage)
    with pytest.raises(EagleError, match=r"need .* GB and .* has 0.0015 GB free: choose an --o"):
        write_features(config(base, data, tmp_path), tmp_path / "features", "again", TINY)
    assert "x 512 bytes = " in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


def test_a_disk_that_fills_up_leaves_whole_shards(base, data, tmp_path, monkeypatch):
    written, save = [], writing.save_file

    def full(tensors, path, metadata):
        if len(written) == 2:
            Path(path).write_bytes(b"as far as it went")
            raise OSError(28, "No space left on device")
        written.append(path)
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(writing, "save_file", full)
    cfg = config(base, data, tmp_path / "run")
    with pytest.raises(EagleError, match="No space left on device; what is there stays whole"):
        prepare(cfg, tmp_path / "features")
    assert len(list((tmp_path / "features").iterdir())) == 3
    monkeypatch.setattr(writing, "save_file", save)
    prepare(cfg, tmp_path / "features")
    FeatureStore(tmp_path / "features")


def test_an_adapter_is_part_of_the_target(base):
    target = Target.from_pretrained(base, dtype="float32")
    bare = Belongs.to(target)
    target._identity["adapter"] = "a" * 64
    with_adapter = Belongs.to(target)
    assert Index(bare, {}, "").id != Index(with_adapter, {}, "").id
