"""Compiled passes give the tokens of eager ones, are kept on disk, and fail with a remedy.

Packages are built once for the whole file, in an empty cache: most of its time. Gemma 2's alternate
windows and soft caps under a two-layer EAGLE-1 head, which goes through the target's LM head; one
test has an EAGLE-3 head."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_helpers import make_head, make_prompts, make_target, new_tokens, plain, stock_greedy

from eagle.attention import TreeContext
from eagle.cache import StaticKVCache
from eagle.compile import Pass, head_pass, key, load, package, target_pass
from eagle.draft import HeadDrafter
from eagle.errors import EagleError
from eagle.heads.head import Eagle3Head, HeadConfig
from eagle.heads.head import make_head as build_head
from eagle.model import EaModel
from eagle.target import CHUNK
from eagle.tree import TreeShape
from kernels import cpu_extension
from kernels.cpu_extension import keep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") and shutil.which("ninja")), reason="needs a C++ compiler and ninja"
    ),
]
NEW = 20
PROMPTS = make_prompts((9, 3, 14, 1, 60))
SAMPLED = {"temperature": 1.2, "top_p": 0.95, "seed": 30}
TREES = ("16,4,4", "6,4,1", "40,5,8")


def packages(folder):
    """Name -> time of change, of every file that a compilation keeps."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in Path(folder).rglob("*")
        if p.suffix in (".pt2", ".so")
    }


@pytest.fixture(scope="module", autouse=True)
def quick_builds():
    """The packages' wrappers are not optimised: a third of the time."""
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        yield


def gemma():
    """Both kinds of soft cap, and a window shorter than the contexts."""
    target = make_target("gemma2", num_hidden_layers=2)
    assert {"sliding_attention", "full_attention"} == set(target.config.layer_types)
    return target


def head_of(target):
    """Drafts well enough that trees are accepted to some depth: it mostly hands the target's features
    on."""
    config = HeadConfig.for_target(target.config, method="eagle1", num_layers=2, qkv_bias=True)
    torch.manual_seed(1)
    head = build_head(config).eval()
    for weight in head.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.02)
    with torch.no_grad():
        head.fc.weight[:, : config.hidden_size] += torch.eye(config.hidden_size)
    return head


@pytest.fixture(scope="module")
def compile_cache(compile_cache, tmp_path_factory):
    """One of this file's own, with nothing but the C++ extension in it."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "compiled").mkdir()
    for library in (compile_cache / "compiled").glob("*.so"):
        os.link(library, folder / "compiled" / library.name)  # a copy would be loaded once more
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EAGLE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def target():
    return gemma()


@pytest.fixture(scope="module")
def model(compile_cache, target):
    model = EaModel(target, head_of(target), "16,4,4")
    before = packages(compile_cache)
    seconds = model.prepare("max")
    assert set(seconds) == {"target", "head", "ingest"}
    new = packages(compile_cache).keys() - before.keys()
    assert len([p for p in new if p.endswith(".pt2")]) == 3
    return model


def runs(model, monkeypatch):
    """Counts the packages' runs from now on: [target, head]."""
    counts = [0, 0]

    def counted(place, call):
        def run(*args):
            counts[place] += 1
            return call(*args)

        return run

    (version, target), (_, head) = (model._compiled[name] for name in ("target", "head"))
    monkeypatch.setitem(model._compiled, "target", (version, counted(0, target)))
    monkeypatch.setattr(head, "step", counted(1, head.step))
    return counts


# greedy batches: test_drafts_are_the_same_too
RUNS = [(1, {}, TREES[0]), (1, SAMPLED, TREES[0]), *((5, SAMPLED, tree) for tree in TREES)]


@pytest.mark.parametrize("batch, sampling, tree", RUNS)
def test_compiled_equals_eager(model, target, monkeypatch, batch, sampling, tree):
    prompts = PROMPTS[:batch]
    options = dict(max_new_tokens=NEW, **sampling)
    expected = plain(target, prompts, compile="off", **options)
    assert len({tuple(t) for t in expected}) == batch and len(set(expected[0])) > 5
    count = runs(model, monkeypatch)
    assert new_tokens(model.generate(prompts, compile="max", tree=tree, **options)) == expected
    assert min(count) > 0
    count[:] = 0, 0
    slow = model.generate(prompts, compile="max", draft=False, **options)
    assert new_tokens(slow) == expected
    assert NEW <= count[0] <= NEW + 2 and count[1] == 0  # the prompts in chunks, then one a token
    count[:] = 0, 0
    eager = model.generate(prompts, compile="off", tree=tree, **options)
    assert new_tokens(eager) == expected and count == [0, 0]
    if not sampling:
        assert expected == [stock_greedy(target, p, NEW) for p in prompts]


def test_drafts_are_the_same_too(model):
    """Compiled drafting is as good as eager: the same trees are accepted, node for node. Compiled
    passes take a prompt in pieces: rows that end before, at and after a piece's end."""
    width = CHUNK // 5
    chunks = make_prompts((width - 1, width, width + 1, 2 * width + 1, 1), seed=5)
    for prompts, trees in ((PROMPTS, TREES), (chunks, TREES[:1])):
        slow = model.generate(prompts, max_new_tokens=40, compile="max", draft=False)
        assert new_tokens(slow) == [stock_greedy(model.target, p, 40) for p in prompts]
        for tree in trees:
            eager, compiled = (
                model.generate(prompts, max_new_tokens=40, tree=tree, compile=mode)
                for mode in ("off", "max")
            )
            assert new_tokens(compiled) == new_tokens(slow)
            assert [r.accepted for r in compiled.rows] == [r.accepted for r in eager.rows]
            assert sum(sum(r.accepted[1:]) for r in eager.rows) > 10


def test_an_eagle3_head(compile_cache):
    target = make_target("llama", num_hidden_layers=2)
    model = EaModel(target, make_head(target), "16,4,4")
    expected = plain(target, PROMPTS, max_new_tokens=NEW, compile="off", **SAMPLED)
    eager, compiled = (
        model.generate(PROMPTS, max_new_tokens=NEW, compile=mode, **SAMPLED)
        for mode in ("off", "max")
    )
    assert new_tokens(compiled) == new_tokens(eager) == expected
    assert [r.accepted for r in compiled.rows] == [r.accepted for r in eager.rows]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_many_requests(model, target, sampling):
    prompts = make_prompts((9, 3, 14, 1, 6, 22, 2, 90, 5), seed=3)
    options = dict(max_new_tokens=NEW, **sampling)
    expected = plain(target, prompts, compile="off", **options)
    for draft in (True, False):
        rows = model.generate_many(prompts, slots=3, compile="max", draft=draft, **options)
        assert [row.tokens for row in rows] == expected


def test_nothing_is_compiled_anew(model, compile_cache):
    """Batch, capacity, tree, context and options are no part of a package, and another model object
    loads what is there."""
    before, target = packages(compile_cache), gemma()
    again = EaModel(target, head_of(target), "16,4,4", compile="max")
    assert set(again.prepare()) == {"target", "head", "ingest"}
    assert again.prepare() == {}  # it is ready
    loaded = dict(again._compiled)
    for prompts, options in (
        (make_prompts((200,)), {"tree": "60,7,10"}),
        (make_prompts((30,) * 7), {"capacity": 200}),
        (make_prompts((4, 2)), {"tree": "3,1,2", "temperature": 0.9, "repetition_penalty": 1.2}),
        (make_prompts((2,)), {"draft": False, "logprobs": True}),
    ):
        again.generate(prompts, max_new_tokens=6, **options)
    assert again._compiled == loaded and packages(compile_cache) == before


def test_threads_take_turns_in_compiled_passes(model, target):
    """On one model, and on another whose target is another object."""
    other = gemma()
    models = [model, EaModel(other, head_of(other), "8,4,2"), model, model]
    expected = [plain(target, [p], max_new_tokens=NEW, compile="off") for p in PROMPTS]

    def compiled(n):
        result = models[n % 4].generate([PROMPTS[n % 5]], max_new_tokens=NEW, compile="max")
        return new_tokens(result)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(compiled, range(12))) == [expected[n % 5] for n in range(12)]


def test_the_mode_is_for_a_model_or_a_call(model, target, compile_cache, monkeypatch):
    before = packages(compile_cache)
    eager = EaModel(target, model.head, "8,4,2")
    for mode in ("off", "auto"):  # off on a CPU
        eager.generate(PROMPTS, max_new_tokens=4, compile=mode)
    assert eager._compiled == {}
    eager.generate(PROMPTS, max_new_tokens=4, compile="max")
    count = runs(eager, monkeypatch)
    eager.generate(PROMPTS, max_new_tokens=4)
    assert count == [0, 0] and eager.drafter.compiled is None and target.compiled is None
    eager.generate(PROMPTS, max_new_tokens=4, compile="max")
    assert min(count) > 0 and packages(compile_cache) == before


def test_a_key_names_all_that_a_package_depends_on(llama):
    ids = torch.zeros(1, 8, dtype=torch.int64)

    def target_key(target):
        return key(target_pass(target), (ids, ids))

    def head_key(target, head, run="step"):
        drafter = HeadDrafter(head, target.embed, TreeShape())
        return key(head_pass(drafter, getattr(drafter, run)), (torch.zeros(1, 8, 32), ids))

    first = target_key(llama)
    assert target_key(make_target("llama")) == first

    def changed(change):
        other = make_target("llama")
        change(other)
        return target_key(other)

    def last_bit(other):
        weight = other.model.get_input_embeddings().weight.data
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))

    # linear layers are no part of a package
    assert (
        changed(lambda other: other.model.model.layers[2].mlp.up_proj.weight.data.add_(1)) == first
    )

    targets = [
        changed(last_bit),
        changed(lambda other: other.set_feature_layers((0, 1, 4))),
        # no weight says so
        changed(lambda other: other.config.rope_parameters.update(rope_theta=5e5)),
        changed(lambda other: other.model.bfloat16()),
    ]
    head = make_head(llama)
    heads = [head_key(llama, head), head_key(llama, head, "read")]
    assert heads[0] == head_key(llama, make_head(llama))
    head.norm.weight.data[0] += 1e-6
    heads.append(head_key(llama, head))
    heads.append(head_key(llama, make_head(llama, seed=1)))
    for change in ({"rms_norm_eps": 1e-3}, {"rope_theta": 5e5}):  # no weight says so
        head = make_head(llama)
        other = Eagle3Head(HeadConfig(**{**dict(head.config), **change}))
        other.load_state_dict(head.state_dict())
        heads.append(head_key(llama, other))
    torch.set_num_threads(2)
    try:
        threads = target_key(llama)
    finally:
        torch.set_num_threads(1)
    everything = [first, *targets, threads, *heads]
    assert len(set(everything)) == len(everything)


def test_a_model_too_large_to_copy_is_refused(target, monkeypatch):
    monkeypatch.setattr("eagle.compile.LARGEST", 1000)
    with pytest.raises(EagleError, match="too much for that; use compile='off'"):
        EaModel(target, compile="max").generate(PROMPTS, draft=False)


class Block(torch.nn.Module):
    """What a pass has beside attention, of widths that are no multiple of a vector's."""

    def __init__(self, act) -> None:
        super().__init__()
        self.norm, self.act = torch.nn.RMSNorm(36), act
        self.up, self.gate, self.down = (
            torch.nn.Linear(*s) for s in ((36, 53), (36, 53), (53, 36))
        )

    def forward(self, context, x, positions):
        angle = positions.float()[..., None] / 10 ** torch.linspace(0, 4, 18)
        cos, sin = (f(torch.cat([angle, angle], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        h = self.norm(x) * cos + self.norm(x).roll(18, -1) * sin
        h = x + self.down(self.act(self.gate(h)) * self.up(h))
        return h, (30 * torch.tanh(h / 30)).float().log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "act", [torch.nn.functional.silu, torch.nn.GELU("tanh")], ids=["silu", "gelu"]
)
def test_a_token_has_the_same_bits_in_any_company(compile_cache, act, dtype):
    """Compiled, attention aside: alone, and among 5, 16, 64 and 70."""
    torch.manual_seed(0)
    block = Block(act).to(dtype).requires_grad_(False)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    run = load(Pass(block.forward, [block]), (torch.zeros(1, 8, 36, dtype=dtype), ids), "block", {})
    x, places = torch.randn(1, 70, 36, dtype=dtype) * 3, torch.randint(0, 500, (1, 70))

    def outputs(some):
        n = places[:, some].shape[1]
        cache = StaticKVCache(1, 1, 1, 99, 4, dtype, "cpu")
        mask = torch.ones(1, n, n, dtype=torch.bool)
        return run(
            TreeContext(cache, places[:, some], mask, places[:, some]), x[:, some], places[:, some]
        )

    alone = [
        torch.cat(parts, 1)
        for parts in zip(*(outputs(slice(i, i + 1)) for i in range(70)), strict=True)
    ]
    for n in (5, 16, 64, 70):
        for part in (slice(0, n), slice(70 - n, 70)):
            for got, expected in zip(outputs(part), alone, strict=True):
                assert torch.equal(got, expected[:, part])
    expected = block(None, x, places)[0]
    assert torch.allclose(
        alone[0].float(), expected.float(), atol=0.1 if dtype.itemsize == 2 else 1e-5
    )


class Undecided(torch.nn.Module):
    """Its control flow depends on data, which export cannot follow."""

    def forward(self, x):
        return x + 1 if x.sum().item() > 3.5 else x


def test_what_cannot_be_compiled(compile_cache, monkeypatch, tmp_path):
    path = tmp_path / "folder" / "one.pt2"
    for module, said in (
        (Undecided(), "cannot compile this model.*use compile='off'"),
        (torch.nn.Linear(3, 5), r"use compile='off'.*needs a C\+\+ compiler"),
    ):
        with pytest.raises(EagleError, match=said):
            package(module, (torch.ones(1, 3),), path, [None])
        assert list(path.parent.iterdir()) == []
        monkeypatch.setenv("PATH", str(tmp_path))  # from here on without a compiler
    # the attention operator comes first, and needs the compiler as much
    monkeypatch.setattr(cpu_extension, "loaded", False)
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "empty"))
    with pytest.raises(EagleError, match="compile='off'"):
        EaModel(make_target("llama"), compile="max").generate(PROMPTS)


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from kernels.cpu_extension import keep

def wait(part, path):
    print("about to put it in its place", flush=True)
    time.sleep(600)

def make(scratch):
    (scratch / "one.pt2").write_bytes(b"a package")
    return scratch / "one.pt2"

os.replace = wait
keep(Path(sys.argv[2]), make)
"""


def test_a_process_that_is_killed_leaves_no_package(tmp_path):
    """kill -9 at the last moment: a whole file is there, but not under the package's name."""
    path, root = tmp_path / "linear" / "one.pt2", str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED, root, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert "in its place" in process.stdout.readline()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(path.parent.glob("*.pt2"))


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b + b"x"])
def test_what_is_kept_on_disk_is_whole(tmp_path, damage):
    """The C++ extension's library too; two processes that make one at once both have a whole
    one."""
    made = []

    def make(scratch, text=b"code"):
        if not made:  # another process is faster
            made.append(None)
            assert keep(path, lambda s: make(s, b"other code")).read_bytes() == b"other code"
        made.append(scratch)
        (scratch / "made").write_bytes(text)
        return scratch / "made"

    path = tmp_path / "lib.so"
    kept = keep(path, make)
    assert kept.read_bytes() == b"code" and len(made) == 3
    assert keep(path, make).exists() and len(made) == 3
    assert not list(tmp_path.glob(".building*"))
    for file in tmp_path.iterdir():
        file.write_bytes(damage(file.read_bytes()))
    assert keep(path, make).read_bytes() == b"code" and len(made) == 4
    assert len(list(tmp_path.iterdir())) == 1
