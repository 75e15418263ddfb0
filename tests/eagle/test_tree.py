"""The draft tree: shape, growth, reranking, ancestors and verification, each against a slow
reference."""

import random

import pytest
import torch
from engine_helpers import make_tree

from eagle.errors import EagleError
from eagle.tree import TreeShape, ancestors, rerank
from eagle.verify import verify

BAD_SHAPES = "|16|16,4|16,4,4,4|a,b,c|16;4;4|1.5,4,4|1,4,4|0,4,4|16,-1,4|16,4,0|16,,4"


@pytest.mark.parametrize("text", BAD_SHAPES.split("|"))
def test_bad_shapes_are_refused(text):
    with pytest.raises(EagleError):
        TreeShape.parse(text)


@pytest.mark.parametrize("values", [(16.0, 4, 4), (True, 4, 4), ("16", 4, 4), (16, None, 4)])
def test_shape_fields_must_be_whole_numbers(values):
    with pytest.raises(EagleError, match="whole number"):
        TreeShape(*values)


COUNTS = [("6,4,1", 6, 5), ("60,7,10", 60, 8), ("16,4,4", 16, 5), ("3,7,10", 3, 2)]
COUNTS += [("100,2,2", 11, 3), ("9,0,4", 5, 1), ("100,3,1", 5, 4), (" 8, 4, 2 ", 8, 5)]


@pytest.mark.parametrize("text, nodes, levels", COUNTS)
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
                taken = used.setdefault(parent, set())
                row.append((rng.choice([t for t in range(40) if t not in taken]), parent))
                taken.add(row[-1][0])
            made.append(row)
            # often right: the token of one of the node's children
            children = [[t for t, p in row[1:] if p == n] for n in range(nodes)]
            often = [c if c and rng.random() < 0.8 else range(40) for c in children]
            choices.append([rng.choice(c) for c in often])
        tree = make_tree(made, levels)
        verdict = verify(tree, torch.tensor(choices), levels)
        for b in range(rows):
            path, step = [0], [0]
            while step:
                edge = (choices[b][path[-1]], path[-1])
                step = [n for n in range(1, nodes) if made[b][n] == edge]
                path += step
            accepted = verdict.num_accepted[b].item()
            assert accepted == len(path) - 1, trial
            assert verdict.path[b].tolist()[: accepted + 1] == path
            assert verdict.tokens[b].tolist()[: accepted + 1] == [choices[b][n] for n in path]
            assert verdict.path.shape == verdict.tokens.shape == (rows, levels + 1)
            assert verdict.path.max() < nodes


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
            assert sorted((scores[i] for i in kept), reverse=True) == pytest.approx(best)
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
