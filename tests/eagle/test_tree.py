"""The draft tree: shape, growth, reranking, ancestors and verification, each against a slow
reference."""

import random

import pytest
import torch
from engine_helpers import make_head, make_prompts, make_tree

from eagle.draft import HeadDrafter
from eagle.errors import EagleError
from eagle.tree import DraftTree, TreeShape, ancestors, rerank
from eagle.verify import verify


@pytest.mark.parametrize(
    "text",
    [
        "",
        "16",
        "16,4",
        "16,4,4,4",
        "a,b,c",
        "16;4;4",
        "1.5,4,4",
        "1,4,4",
        "0,4,4",
        "16,-1,4",
        "16,4,0",
        "16,,4",
    ],
)
def test_bad_shapes_are_refused(text):
    with pytest.raises(EagleError):
        TreeShape.parse(text)


@pytest.mark.parametrize("values", [(16.0, 4, 4), (True, 4, 4), ("16", 4, 4), (16, None, 4)])
def test_shape_fields_must_be_whole_numbers(values):
    with pytest.raises(EagleError, match="whole number"):
        TreeShape(*values)


@pytest.mark.parametrize(
    "text, nodes, levels",
    [
        ("6,4,1", 6, 5),
        ("60,7,10", 60, 8),
        ("16,4,4", 16, 5),
        ("3,7,10", 3, 2),
        ("100,2,2", 11, 3),
        ("9,0,4", 5, 1),
        ("100,3,1", 5, 4),
        (" 8, 4, 2 ", 8, 5),
    ],
)
def test_shape_counts(text, nodes, levels):
    shape = TreeShape.parse(text)
    assert (shape.num_nodes, shape.levels) == (nodes, levels)
    assert TreeShape.parse(str(shape)) == shape == TreeShape.parse(shape)
    assert TreeShape.parse([shape.total_token, shape.depth, shape.top_k]) == shape


def random_parents(rng, nodes, levels):
    depth, parents = [0], [0]
    for n in range(1, nodes):
        parent = rng.choice([m for m in range(n) if depth[m] < levels])
        parents.append(parent)
        depth.append(depth[parent] + 1)
    return parents, depth


def test_ancestors_against_a_walk():
    rng = random.Random(0)
    for levels in (1, 2, 3, 4, 7, 8, 9):
        rows = [random_parents(rng, 20, levels)[0] for _ in range(6)]
        rows.append([0] + [min(n, levels - 1) for n in range(19)])  # a chain as long as allowed
        seen = ancestors(torch.tensor(rows), levels)
        for row, parents in enumerate(rows):
            for n in range(20):
                chain, m = {n, 0}, n
                while m:
                    m = parents[m]
                    chain.add(m)
                assert set(seen[row, n].nonzero()[:, 0].tolist()) == chain


def test_verify_against_a_walk():
    rng = random.Random(1)
    for trial in range(60):
        levels, nodes, rows = rng.randint(1, 6), rng.randint(2, 24), 4
        made, choices = [], []
        for _ in range(rows):
            parents, _ = random_parents(rng, nodes, levels)
            used, row = {}, [(rng.randrange(9), 0)]
            for parent in parents[1:]:  # children of one node are distinct
                row.append(
                    (rng.choice([t for t in range(40) if t not in used.get(parent, ())]), parent)
                )
                used.setdefault(parent, set()).add(row[-1][0])
            made.append(row)
            # often right: the token of one of the node's children
            choice = []
            for n in range(nodes):
                children = [t for t, p in row[1:] if p == n]
                choice.append(
                    rng.choice(children) if children and rng.random() < 0.8 else rng.randrange(40)
                )
            choices.append(choice)
        tree = make_tree(made, levels)
        verdict = verify(tree, torch.tensor(choices), levels)
        for b in range(rows):
            path = [0]
            while True:
                step = [
                    n
                    for n in range(1, nodes)
                    if made[b][n][1] == path[-1] and made[b][n][0] == choices[b][path[-1]]
                ]
                if not step:
                    break
                path.append(step[0])
            accepted = verdict.num_accepted[b].item()
            assert accepted == len(path) - 1, trial
            assert verdict.path[b].tolist()[: accepted + 1] == path
            assert verdict.tokens[b].tolist()[: accepted + 1] == [choices[b][n] for n in path]
            assert verdict.path.shape == verdict.tokens.shape == (rows, levels + 1)
            assert verdict.path.max() < nodes


def test_plain_decoding_is_a_tree_of_one_node():
    tree = DraftTree.root_only(torch.tensor([5, 6]))
    verdict = verify(tree, torch.tensor([[8], [9]]), 0)
    assert verdict.num_accepted.tolist() == [0, 0]
    assert verdict.path.tolist() == [[0], [0]] and verdict.tokens.tolist() == [[8], [9]]


def candidates(rng, k, depth, ties):
    """Random candidates in the layout of `HeadDrafter.expand`."""
    parents, scores, level, beams = [], [], [], []
    for j in range(k):
        scores.append(-rng.choice([0.0, 0.5, 1.0]) if ties else -rng.random())
        parents.append(0)
        beams.append(1 + j)
        level.append(1)
    for d in range(depth):
        start = len(parents)
        for beam in beams:
            for _ in range(k):
                drop = rng.choice([0.0, 0.0, 0.5]) if ties else rng.random()
                scores.append(scores[beam - 1] - drop)
                parents.append(beam)
                level.append(d + 2)
        order = sorted(range(start, len(parents)), key=lambda i: -scores[i])[:k]
        beams = [1 + i for i in order]
    tokens = list(range(1000, 1000 + len(parents)))
    return tokens, parents, scores, level


@pytest.mark.parametrize("ties", [False, True])
def test_rerank_keeps_the_best_with_their_parents(ties):
    rng = random.Random(2)
    for _ in range(30):
        k, depth = rng.randint(1, 4), rng.randint(0, 4)
        both = [candidates(rng, k, depth, ties) for _ in range(3)]
        total = len(both[0][0])
        shape = TreeShape(rng.randint(2, total + 3), depth, k)
        tree = rerank(
            torch.tensor([1, 2, 3]),
            *(torch.tensor([c[i] for c in both]) for i in range(3)),
            torch.tensor(both[0][3]),
            shape.num_nodes,
            shape.levels,
        )
        N = shape.num_nodes
        assert tree.tokens.shape == tree.parents.shape == tree.depth.shape == (3, N)
        for b, (_, parents, scores, level) in enumerate(both):
            kept = [t - 1000 for t in tree.tokens[b, 1:].tolist()]
            best = sorted(scores, reverse=True)[: N - 1]
            assert torch.allclose(
                torch.tensor([scores[i] for i in kept]).sort().values,
                torch.tensor(best).sort().values,
            )
            assert tree.tokens[b, 0] == b + 1 and kept == sorted(kept)
            for node, i in enumerate(kept, 1):
                parent = tree.parents[b, node].item()
                assert parent < node
                assert (parents[i] - 1 == kept[parent - 1]) if parent else parents[i] == 0
                assert tree.depth[b, node] == level[i] == tree.depth[b, parent] + 1
                assert tree.scores[b, node] == pytest.approx(scores[i])
        assert tree.depth.max() <= shape.levels
        assert torch.equal(tree.mask, ancestors(tree.parents, N))
        assert torch.equal(tree.mask.sum(-1), tree.depth + 1)


class Reference:
    """The head without a cache: every path is run whole, from the first position."""

    def __init__(self, head, embed, features, tokens):
        self.head, self.embed, self.features, self.tokens = head, embed, features, tokens

    def log_probs(self, path):
        """Draft-vocabulary log-probabilities after the row's tokens and `path` (target ids)."""
        head = self.head
        hidden = head.fc(self.features)[None]
        out = None
        for step in range(len(path) + 1):
            ids = torch.tensor([self.tokens + path[:step]])
            T = ids.shape[1]
            out = head(hidden, self.embed(ids), torch.arange(T)[None], self.attend)
            hidden = torch.cat([hidden, out[:, -1:]], dim=1)
        return head.logits(out[0, -1]).log_softmax(-1)

    @staticmethod
    def attend(layer, q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)

    def tree(self, root, shape):
        """EAGLE-2 by hand: {path: score} of all candidates, and the kept ones."""
        head, k = self.head, shape.top_k
        target_ids = head.draft_token_ids()

        def children(path, score):
            best = self.log_probs(list(path)).topk(k)
            return {
                (*path, target_ids[i].item()): score + s.item()
                for s, i in zip(best.values, best.indices, strict=True)
            }

        every = children((), 0.0)
        beams = dict(every)
        for _ in range(shape.depth):
            level = {}
            for path, score in beams.items():
                level.update(children(path, score))
            every.update(level)
            beams = dict(sorted(level.items(), key=lambda item: -item[1])[:k])
        return dict(sorted(every.items(), key=lambda item: -item[1])[: shape.num_nodes - 1])


def paths_of(tree, b):
    """{path of tokens: score} of row b."""
    paths = [()]
    for n in range(1, tree.tokens.shape[1]):
        paths.append((*paths[tree.parents[b, n]], tree.tokens[b, n].item()))
    return {p: tree.scores[b, n].item() for n, p in enumerate(paths) if n}


@pytest.mark.parametrize("shape", ["6,4,1", "8,4,2", "16,3,4", "40,2,5"])
@torch.inference_mode()
def test_expand_equals_the_slow_reference(llama, shape):
    """Ragged rows, after an ingest of the prompt and two of accepted tokens."""
    head = make_head(llama, 40, seed=3)
    drafter = HeadDrafter(head, llama.embed, TreeShape.parse(shape))
    lengths, steps = [7, 3, 10], [[2, 1, 4], [1, 0, 3]]
    totals = [n + a + b for n, a, b in zip(lengths, *steps, strict=True)]
    torch.manual_seed(5)
    features = torch.randn(3, max(totals), 96)
    tokens = torch.tensor([p + [0] * (max(totals) - len(p)) for p in make_prompts(totals, seed=4)])
    drafter.begin(3, max(totals))
    drafter.ingest(features[:, :10], tokens[:, :10], torch.tensor(lengths), lengths)
    done = lengths
    for counts in steps:
        drafter.expand(tokens[:, 0])  # what a tree leaves behind must not be seen later
        width = max(counts)
        at = torch.tensor(done)[:, None] + torch.arange(width)
        at = at.clamp_max(max(totals) - 1)
        drafter.ingest(
            features.gather(1, at[..., None].expand(-1, -1, 96)),
            tokens.gather(1, at),
            torch.tensor(counts),
            counts,
        )
        done = [a + b for a, b in zip(done, counts, strict=True)]
    tree = drafter.expand(torch.tensor([1, 2, 3]))
    assert drafter.cache.host_lengths == totals == drafter.cache.lengths.tolist()
    for b in range(3):
        T = totals[b]
        reference = Reference(head, llama.embed, features[b, :T], tokens[b, :T].tolist())
        expected = reference.tree(b + 1, drafter.shape)
        got = paths_of(tree, b)
        assert got.keys() == expected.keys()
        for path, score in expected.items():
            assert got[path] == pytest.approx(score, abs=1e-3)


@torch.inference_mode()
def test_trees_have_distinct_children_and_falling_scores(llama):
    drafter = HeadDrafter(make_head(llama, 30), llama.embed, TreeShape(40, 5, 6))
    drafter.begin(2, 20)
    drafter.ingest(
        torch.randn(2, 9, 96), torch.randint(0, 128, (2, 9)), torch.tensor([9, 4]), [9, 4]
    )
    tree = drafter.expand(torch.tensor([3, 4]))
    allowed = set(drafter.head.draft_token_ids().tolist())
    for b in range(2):
        assert len(paths_of(tree, b)) == 39
        assert set(tree.tokens[b, 1:].tolist()) <= allowed
    assert (tree.scores <= tree.scores.gather(1, tree.parents)).all()
    assert (
        tree.tokens[:, 0].tolist() == [3, 4] and (tree.parents[:, 1:] < torch.arange(1, 40)).all()
    )
