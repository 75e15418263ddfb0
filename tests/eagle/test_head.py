"""Heads of every published kind: their tensors, what they compute, and that they change no
token."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from engine_helpers import make_prompts, paths_of, prefilled, stock_greedy
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle.draft import HeadDrafter
from eagle.errors import EagleError
from eagle.heads.head import FINAL, HeadConfig, causal, make_head
from eagle.model import EaModel
from eagle.tree import TreeShape

H, HD, I, V, D = 32, 8, 40, 128, 48
KINDS = yaml.safe_load(Path(__file__).with_name("kinds.yaml").read_text("utf-8"))["kinds"]
kinds = pytest.mark.parametrize("kind", KINDS)


def head_of(target, kind, seed=0, scale=0.3):
    """A random head of that kind, norms included; it proposes varied tokens."""
    torch.manual_seed(seed)
    options = {"draft_vocab_size": V if "eagle1" in kind else D, "intermediate_size": I}
    config = HeadConfig.for_target(target.config, **options | KINDS[kind])
    head = make_head(config)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=scale)
        if p.ndim == 1:
            p.data.add_(1.0)
    head.set_draft_vocab(torch.randperm(V)[: config.draft_vocab_size])
    return head.eval()


def written_out(head, features, embeds):
    """What the papers and the projects that published these heads compute, from tensors by their
    names. features [T, F], embeds [T, H] of the tokens that follow -> (what is fed back, what the
    output layer reads), [T, H] each."""
    w, c, read = head.state_dict(), head.config, set()
    T, heads, kv = len(features), c.num_attention_heads, c.num_key_value_heads

    def norm(x, name):
        read.add(f"{name}.weight")
        return x * (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt() * w[f"{name}.weight"]

    def linear(x, name):
        read.update({f"{name}.weight", f"{name}.bias"} & w.keys())
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1))

    def turned(x, cos, sin):
        half = c.head_dim // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    cos, sin = (x[0, :, None] for x in head.rotary(torch.arange(T)[None], torch.float32))
    if c.method == "eagle1":
        hidden = linear(torch.cat([embeds, features], -1), "fc")
    else:
        if c.norm_before_fc:
            features = norm(features, "input_norm")
        if c.fc_norm:
            parts = features.chunk(3, -1)
            features = torch.cat([norm(x, f"fc_norm.{i}") for i, x in enumerate(parts)], -1)
        hidden = linear(features, "fc")
    for n in range(c.num_layers):
        layer = "midlayer" if c.method == "eagle3" and c.num_layers == 1 else f"layers.{n}"
        x = hidden
        if n == 0 and c.method == "eagle3":
            normed = norm(hidden, f"{layer}.hidden_norm")
            x = torch.cat([norm(embeds, f"{layer}.input_layernorm"), normed], -1)
            hidden = normed if c.norm_before_residual else hidden
        elif n > 0:
            x = norm(hidden, f"{layer}.input_layernorm")
        q = linear(x, f"{layer}.self_attn.q_proj").view(T, heads, c.head_dim)
        k = linear(x, f"{layer}.self_attn.k_proj").view(T, kv, c.head_dim)
        v = linear(x, f"{layer}.self_attn.v_proj").view(T, kv, c.head_dim)
        if c.qk_norm:
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * c.head_dim**-0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        seen = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        hidden = hidden + linear(seen, f"{layer}.self_attn.o_proj")
        x = norm(hidden, f"{layer}.post_attention_layernorm")
        gate, up = linear(x, f"{layer}.mlp.gate_proj"), linear(x, f"{layer}.mlp.up_proj")
        hidden = hidden + linear(F.silu(gate) * up, f"{layer}.mlp.down_proj")
    normed = hidden if c.method == "eagle1" else norm(hidden, "norm")
    others = {"lm_head.weight", "embed_tokens.weight", "d2t", "t2d"}
    assert read == w.keys() - others  # each name as published, and no other
    return normed if c.norm_output else hidden, normed


def embedding(head, target):
    return head.embed_tokens if head.config.own_embedding else target.embed


@kinds
@torch.inference_mode()
def test_a_head_computes_what_is_written(llama, kind):
    head, T = head_of(llama, kind), 11
    features, ids = torch.randn(T, head.config.feature_size), torch.randint(0, V, (T,))
    embeds = embedding(head, llama)(ids)
    fed, read = written_out(head, features, embeds)
    inputs = head.fuse(features[None]), embeds[None], torch.arange(T)[None]
    out = head(*inputs, causal)
    torch.testing.assert_close(out[0], fed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.last_norm(out)[0], read, rtol=1e-4, atol=1e-4)

    def behind(layer, q, k, v):  # the kept queries alone
        if q.shape[2] == T:
            return causal(layer, q, k, v)
        whole = q.new_zeros(1, q.shape[1], T, q.shape[3])
        whole[:, :, keep] = q
        return causal(layer, whole, k, v)[:, keep]

    keep = torch.tensor([2, 5, 10])
    kept = head(*inputs, behind, keep=keep)
    torch.testing.assert_close(kept, out[:, keep], rtol=1e-5, atol=1e-5)


class Reference:
    """The head without a cache: every path is run whole, from the first position."""

    def __init__(self, head, target, features, tokens):
        self.head, self.features, self.tokens = head, features, tokens
        self.embed = embedding(head, target)
        self.logits = head.logits if head.has_output else target.head_logits

    def log_probs(self, path):
        """Draft-vocabulary log-probabilities after the row's tokens and `path` (target ids)."""
        head = self.head
        hidden = head.fuse(self.features[None])
        out = None
        for step in range(len(path) + 1):
            ids = torch.tensor([self.tokens + path[:step]])
            T = ids.shape[1]
            out = head(hidden, self.embed(ids), torch.arange(T)[None], causal)
            hidden = torch.cat([hidden, out[:, -1:]], dim=1)
        return self.logits(out[0, -1]).log_softmax(-1)

    def tree(self, root, shape):
        """EAGLE-2 by hand: {path: score} of all candidates, and the kept ones."""
        head, k = self.head, shape.top_k
        target_ids = head.draft_token_ids()

        def children(path, score):
            best = self.log_probs(list(path)).topk(k)
            tokens, scores = target_ids[best.indices].tolist(), best.values.tolist()
            return {(*path, t): score + s for t, s in zip(tokens, scores, strict=True)}

        every = children((), 0.0)
        beams = dict(every)
        for _ in range(shape.depth):
            level = {}
            for path, score in beams.items():
                level.update(children(path, score))
            every.update(level)
            beams = dict(sorted(level.items(), key=lambda item: -item[1])[:k])
        return dict(sorted(every.items(), key=lambda item: -item[1])[: shape.num_nodes - 1])


EXPANDED = [("eagle3", shape) for shape in ("6,4,1", "8,4,2", "16,3,4", "40,2,5")]
# the base of "dynamic" depends on how long a pass is
EXPANDED += [(kind, "14,3,3") for kind in KINDS if kind != "dynamic"]


@pytest.mark.parametrize("kind, shape", EXPANDED)
@torch.inference_mode()
def test_expand_equals_the_slow_reference(llama, kind, shape):
    """Ragged rows, after an ingest of the prompt and two of accepted tokens."""
    head = head_of(llama, kind, seed=3)
    F = head.config.feature_size
    drafter = HeadDrafter(head, llama.embed, TreeShape.parse(shape), llama.head_logits)
    lengths, steps = [7, 3, 10], [[2, 1, 4], [1, 0, 3]]
    totals = [n + a + b for n, a, b in zip(lengths, *steps, strict=True)]
    torch.manual_seed(5)
    features = torch.randn(3, max(totals), F)
    tokens = torch.tensor([p + [0] * (max(totals) - len(p)) for p in make_prompts(totals, seed=4)])
    drafter.begin(3, max(totals))
    drafter.ingest(features[:, :10], tokens[:, :10], torch.tensor(lengths), lengths)
    done = lengths
    for counts in steps:
        drafter.expand(tokens[:, 0])  # what a tree leaves behind must not be seen later
        at = torch.tensor(done)[:, None] + torch.arange(max(counts))
        at = at.clamp_max(max(totals) - 1)
        given = features.gather(1, at[..., None].expand(-1, -1, F)), tokens.gather(1, at)
        drafter.ingest(*given, torch.tensor(counts), counts)
        done = [a + b for a, b in zip(done, counts, strict=True)]
    tree = drafter.expand(torch.tensor([1, 2, 3]))
    assert drafter.cache.host_lengths == totals == drafter.cache.lengths.tolist()
    for b in range(3):
        T = totals[b]
        reference = Reference(head, llama, features[b, :T], tokens[b, :T].tolist())
        expected = reference.tree(b + 1, drafter.shape)
        got = paths_of(tree, b)
        assert got.keys() == expected.keys()
        for path, score in expected.items():
            assert got[path] == pytest.approx(score, abs=2e-3)


@kinds
def test_every_kind_is_lossless(llama, kind):
    prompts = make_prompts((9, 3, 14))
    model = EaModel(llama, head_of(llama, kind, seed=1), "8,3,2")
    assert model.target.feature_layers == ((FINAL,) if "eagle1" in kind else (1, 2, 4))
    out = model.generate(prompts, max_new_tokens=16, temperature=0.0)
    assert [row.tokens for row in out.rows] == [stock_greedy(llama, p, 16) for p in prompts]
    assert sum(row.cycles for row in out.rows) > 0


@torch.inference_mode()
def test_an_eagle1_head_that_knows_the_target_is_accepted(llama):
    """Features, LM head and the shift fit: what it predicts with the target's own next state is
    kept."""

    class Knowing(HeadDrafter):
        """Gives the target's final state at the next position in place of the head's."""

        def run(self, hidden, tokens, positions, context):
            super().run(hidden, tokens, positions, context)
            return true[positions[0] + 1][None]

    prompt = make_prompts((9,))[0]
    row = prompt + stock_greedy(llama, prompt, 24)
    head, llama = head_of(llama, "eagle1"), copy.copy(llama)
    llama.set_feature_layers((FINAL,))
    _, features = llama.hidden_and_features(torch.tensor([row]))
    true = torch.cat([features[0], features[0, -1:].expand(8, -1)])
    drafter = Knowing(head, llama.embed, TreeShape(5, 4, 1), llama.head_logits)
    out = EaModel(llama, head, "5,4,1", drafter=drafter).generate(
        [prompt], max_new_tokens=24, temperature=0.0
    )
    assert out.rows[0].tokens == row[9:]
    # all four, but at the row's end
    assert out.rows[0].accepted[4] >= 4 and out.rows[0].cycles <= 6


def test_final_features_are_what_the_lm_head_reads(llama):
    ids, llama = torch.tensor([make_prompts((12,))[0]]), copy.copy(llama)
    llama.set_feature_layers((FINAL,))
    hidden, features = llama.hidden_and_features(ids)
    assert torch.equal(hidden, features) and features.shape == (1, 12, H)
    _, again = prefilled(llama, ids.tolist())
    torch.testing.assert_close(again, features, rtol=1e-4, atol=1e-4)
    with pytest.raises(EagleError, match="three ids in 0 … 4"):
        llama.set_feature_layers((FINAL, 1, 2))


@pytest.mark.parametrize("kind", ["eagle3", "norm-before-residual", "eagle1"])
def test_under_autocast_the_residual_stream_is_not_rounded(llama, kind):
    head = head_of(llama, kind)
    features, embeds = torch.randn(1, 5, head.config.feature_size), torch.randn(1, 5, H)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = head.fuse(features).to(embeds.dtype)
        out = head(hidden, embeds, torch.arange(5)[None], causal)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama3", "linear", "dynamic", "yarn"])
def test_rope_scaling_is_transformers(llama, name):
    head = head_of(llama, name)
    rope = {"rope_theta": head.config.rope_theta, **head.config.rope_scaling}
    limit = head.config.max_position_embeddings
    sizes = dict(hidden_size=32, num_attention_heads=4, head_dim=HD)
    config = LlamaConfig(**sizes, max_position_embeddings=limit, rope_parameters=rope)
    positions = torch.arange(60)[None]
    cos, sin = head.rotary(positions, torch.float32)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])
    plain, _ = head_of(llama, "eagle3").rotary(positions, torch.float32)
    assert not torch.allclose(cos, plain, atol=1e-2)
    if name == "linear":
        torch.testing.assert_close(cos[:, ::2], plain[:, :30], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"method": "medusa"}, "method cannot be medusa: .*.eagle3. or .eagle1."),
        ({"num_layers": 0}, "num_layers cannot be 0: .*greater than 0"),
        ({"hidden_act": "sigmoidal"}, "no activation 'sigmoidal'"),
        ({"feature_layers": (1, 2)}, r"reads three layers, not \[1, 2\]"),
        ({"feature_layers": (-1, 1, 2)}, r"reads three layers"),
        ({"hidden_size": 24}, "set own_embedding"),
        ({"method": "eagle1", "fc_norm": True, "norm_output": True}, "no fc_norm, norm_output"),
        ({"method": "eagle1", "feature_layers": (1, 2, 3)}, "final hidden state"),
        ({"method": "eagle1", "draft_vocab_size": 40}, "target's hidden size and vocabulary"),
    ],
)
def test_what_no_head_is_is_refused(llama, options, match):
    with pytest.raises(EagleError, match=match):
        HeadConfig.for_target(llama.config, **options)


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "spiral"}, {"rope_type": "linear"}, {"rope_type": "llama3", "factor": 8.0}],
)
def test_bad_rope_scaling_is_refused(llama, scaling):
    with pytest.raises(EagleError, match="correct rope_scaling in the head's config"):
        make_head(HeadConfig.for_target(llama.config, rope_scaling=scaling))


def test_options_at_their_default_leave_a_config_as_it_was(llama):
    """Configs and resumed runs of before there were options."""
    plain = HeadConfig.for_target(llama.config).to_dict()
    assert "method" not in plain and "fc_bias" not in plain and plain["rope_scaling"] is None
    for kind in KINDS:
        config = head_of(llama, kind).config
        values = config.to_dict()
        assert HeadConfig(**{**values, "feature_layers": tuple(values["feature_layers"])}) == config
    assert HeadConfig.for_target(llama.config, method="eagle1").to_dict()["method"] == "eagle1"
