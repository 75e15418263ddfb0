"""Tiny random models, prompts, and drafters that are always right or always wrong."""

import copy
import random
import re
import string

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eagle.heads.head import Eagle3Head, HeadConfig
from eagle.model import EaModel
from eagle.target import Target
from eagle.tree import DraftTree, TreeShape, ancestors

VOCAB = 128
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.3,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)


OWN = {"llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 7}}
OWN["gemma2"] = {"sliding_window": 6, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}
OWN["gemma2"] |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
FAMILIES = tuple(OWN)


def make_config(name, **changes):
    values = {**OWN[name], **BASE, **changes}
    if name == "qwen2":
        del values["head_dim"]
    return AutoConfig.for_model(name, **values)


def make_model(config, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_target(name, seed=0, **changes):
    return Target(make_model(make_config(name, **changes), seed), name=f"tiny-{name}")


def make_head(target, draft_vocab=48, seed=0, scale=0.3):
    """A random head; a wide initialisation makes it propose varied tokens."""
    torch.manual_seed(seed)
    config = HeadConfig.for_target(
        target.config,
        draft_vocab_size=min(draft_vocab, target.vocab_size),
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    head = Eagle3Head(config)
    for weight in head.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=scale)
    head.set_draft_vocab(torch.randperm(target.vocab_size)[:draft_vocab])
    return head.eval()


def make_tokenizer(kind="letters", vocab=VOCAB):
    """A real tokenizer of `vocab` tokens. letters: a letter each, the first ASCII; pairs: every
    fifth is two. llama2: pieces that begin with a space, which is stripped at the start of a text,
    and single bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if kind == "llama2":
        pieces = ["<unk>", *(f"<0x{b:02X}>" for b in "é€".encode()), *string.ascii_lowercase, "▁"]
        pairs = [f"▁{a}{b}" for a in "abcdefghijkl" for b in "xyzuvwst"]
        pieces += pairs[: vocab - len(pieces)]
        known = {p: i for i, p in enumerate(pieces)}
        made = Tokenizer(models.BPE(known, [], unk_token="<unk>", byte_fallback=True))
        made.normalizer = normalizers.Replace(" ", "▁")
        whole = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), *whole])
        assert len(pieces) == vocab
    else:
        letters = [chr(33 + i) if i < 94 else chr(0x100 + i) for i in range(vocab)]
        if kind == "pairs":
            letters = [c + "+" * (i % 5 == 0 and c not in "abcdef") for i, c in enumerate(letters)]
        known = {c: i for i, c in enumerate(letters)}
        made = Tokenizer(models.WordLevel(known, unk_token=letters[0]))
        made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def head_model(target, tree="16,4,4", **head):
    return EaModel(target, make_head(target, **head), tree)


def make_prompts(lengths=(9, 3, 14, 1, 6), vocab=VOCAB, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


def padded(prompts, side, pad=0):
    """prompts -> ids and mask [B, T], padded on one side (or on "both")."""
    width = max(map(len, prompts)) + (2 if side == "both" else 0)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = {"left": width - len(prompt), "right": 0, "both": 1}[side]
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


def prefilled(target, prompts, spare=0):
    """-> the cache after the prompts' pass, with room for `spare` tokens more, and the features
    [B, T, F] of the prompts' tokens."""
    lengths = [len(prompt) for prompt in prompts]
    cache, ids = target.new_cache(len(prompts), max(lengths) + spare), padded(prompts, "right")[0]
    return cache, target.prefill(ids, torch.tensor(lengths), lengths, cache, features=True)[1]


# a tree of depth 4: tokens and parents
NODES = [(9, 0), (4, 0), (7, 0), (5, 1), (6, 1), (4, 2), (8, 3), (1, 5), (2, 6)]


def make_tree(rows, levels):
    """rows: one list of (token, parent) a row, node 0 first -> a DraftTree."""
    tokens = torch.tensor([[t for t, _ in row] for row in rows])
    parents = torch.tensor([[p for _, p in row] for row in rows])
    depth = torch.zeros_like(parents)
    for n in range(1, parents.shape[1]):
        depth[:, n] = depth.gather(1, parents[:, n : n + 1])[:, 0] + 1
    return DraftTree(tokens, parents, depth, ancestors(parents, levels), -depth.float())


def paths_of(tree, b):
    """{path of tokens: score} of row b."""
    paths = [()]
    for n in range(1, tree.tokens.shape[1]):
        paths.append((*paths[tree.parents[b, n]], tree.tokens[b, n].item()))
    return {p: tree.scores[b, n].item() for n, p in enumerate(paths) if n}


class ScriptedDrafter:
    """Knows every row's plain output. right: the tree holds it as far as it reaches, among
    distractors that come before it; otherwise no child of the root is the target's choice."""

    def __init__(self, answers, right, shape, vocab=VOCAB):
        self.answers, self.right, self.vocab = answers, right, vocab
        self.shape = TreeShape.parse(shape)

    def begin(self, rows, capacity):
        assert rows == len(self.answers)
        self.script = self.answers  # one a slot, so every row must have its own

    def empty_rows(self, order):
        other = copy.copy(self)
        other.answers, other.known = [self.script[i] for i in order], None if order else []
        return other

    def select(self, keep):
        self.answers = [self.answers[i] for i in keep]
        self.known = [self.known[i] for i in keep]

    def join(self, other):
        self.answers, self.known = self.answers + other.answers, self.known + other.known

    def ingest(self, features, tokens, counts, host_counts):
        assert counts.tolist() == host_counts and features.shape[:2] == tokens.shape
        if self.known is None:
            self.known = [1] * len(host_counts)  # the prompt's pass decided one token
        else:
            self.known = [k + c for k, c in zip(self.known, host_counts, strict=True)]

    def wrong(self, nodes, parent, *right):
        taken = {t for t, p in nodes[1:] if p == parent} | {*right}
        return next(t for t in range(self.vocab) if t not in taken), parent

    def expand(self, root):
        rows = []
        for answer, known, first in zip(self.answers, self.known, root.tolist(), strict=True):
            truth = answer[known:] + [0] * self.shape.levels
            nodes, tip, reach = [(first, 0)], 0, 0
            spare = self.shape.num_nodes - 1 - self.shape.levels
            while len(nodes) < self.shape.num_nodes:
                on_path = reach < self.shape.levels
                if spare > 0:  # a wrong sibling in front of the right one
                    spare -= 1
                    parent = tip if self.right and on_path else 0
                    nodes.append(self.wrong(nodes, parent, truth[0], *truth[reach : reach + 1]))
                if on_path:
                    on = self.right or tip
                    nodes.append((truth[reach], tip) if on else self.wrong(nodes, 0, truth[0]))
                    tip, reach = len(nodes) - 1, reach + 1
            rows.append(nodes)
        return make_tree(rows, self.shape.levels)


def engines(target, answers, tree="16,4,4"):
    """Without drafts, with a random head, and with drafts that are always and never right."""
    yield EaModel(target)
    yield head_model(target, tree, draft_vocab=128)
    yield EaModel(target, drafter=ScriptedDrafter(answers, True, tree))
    yield EaModel(target, drafter=ScriptedDrafter(answers, False, tree))


def poison(cache, drafter):
    """What lies past a slot's length must never be read."""
    for each in (cache, getattr(drafter, "cache", cache)):
        for row, length in zip(each.order, each.host_lengths, strict=True):
            each.buffer[:, :, row, :, length:] = float("nan")


def new_tokens(result):
    return [row.tokens for row in result.rows]


def plain(target, prompts, **options):
    """The rows' tokens by our own plain decoding."""
    return new_tokens(EaModel(target).generate(prompts, draft=False, **options))


def stock_greedy(target, prompt, max_new_tokens, **options):
    """transformers' own greedy continuation of one prompt."""
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, **options)
    with target.stock() as model, torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def assert_quiet(done):
    """A finished process: neither Python's warnings nor those of a logger, torch's included, on its
    streams."""
    lines = (done.stdout + done.stderr).splitlines()
    noise = r"Warning|warning:|WARN|(?i:deprecat)|^\[?W\d{4} "
    assert not [line for line in lines if re.search(noise, line)]
