"""The draft tree: shape, ancestors, reranking and verification, each against a slow reference; the
C++ too."""

import random

import pytest
import torch
from engine_helpers import make_tree

from eagle.errors import EagleError
from eagle.loading import compiled_folder
from eagle.tree import TreeShape, ancestors, rerank
from eagle.verify import verify
from kernels import cpu_extension


@pytest.fixture(params=["reference", "c++"])
def implementation(request, monkeypatch, compile_cache):
    cpu_extension.load(compiled_folder())
    monkeypatch.setattr(cpu_extension, "loaded", request.param == "c++")


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


def test_verify_against_a_walk(implementation):
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


def candidates(b, k, depth, seed, ties):
    """Arguments of `rerank` as a drafter makes them, tokens 1000, 1001, …: levels of k beams, whose
    scores fall from parent to child, or with ties may stay."""
    g = torch.Generator().manual_seed(seed)

    def drops(*shape):
        drop = torch.rand(b, *shape, generator=g)
        return (2 * drop).floor() / 2 if ties else drop

    parents, scores, levels = [torch.zeros(b, k, dtype=torch.int64)], [-drops(k)], [1] * k
    base, width = 1, k
    for step in range(depth):
        beams = torch.stack([torch.randperm(width, generator=g)[:k] for _ in range(b)])
        parents.append((base + beams).repeat_interleave(k, 1))
        scores.append((scores[-1].gather(1, beams)[..., None] - drops(k, k)).flatten(1))
        levels += [step + 2] * (k * k)
        base, width = base + width, k * k
    tokens = torch.arange(1000, 1000 + len(levels)).expand(b, -1)
    roots = torch.arange(1, b + 1)
    return roots, tokens, torch.cat(parents, 1), torch.cat(scores, 1), torch.tensor(levels)


@pytest.mark.parametrize("ties", [False, True])
def test_rerank_keeps_the_best_with_their_parents(implementation, ties):
    rng = random.Random(2)
    for seed in range(30):
        k, depth = rng.choice([1, 2, 4, 10]), rng.randint(0, 6)
        made = candidates(3, k, depth, seed, ties)
        _, _, parents, scores, level = (x.tolist() for x in made)
        shape = TreeShape(rng.randint(2, min(len(level) + 3, 70)), depth, k)
        N = shape.num_nodes
        tree = rerank(*made, N, shape.levels)
        assert tree.tokens.shape == tree.parents.shape == tree.depth.shape == (3, N)
        for b in range(3):
            kept = [t - 1000 for t in tree.tokens[b, 1:].tolist()]
            best = sorted(scores[b], reverse=True)[: N - 1]
            assert sorted((scores[b][i] for i in kept), reverse=True) == best
            assert tree.tokens[b, 0] == b + 1 and kept == sorted(kept)
            for node, i in enumerate(kept, 1):
                parent = tree.parents[b, node].item()
                assert parent < node
                assert parents[b][i] == (1 + kept[parent - 1] if parent else 0)
                assert tree.depth[b, node] == level[i] == tree.depth[b, parent] + 1
                assert tree.scores[b, node] == scores[b][i]
        assert tree.depth.max() <= shape.levels
        assert torch.equal(tree.mask, ancestors(tree.parents, N))
        assert torch.equal(tree.mask.sum(-1), tree.depth + 1)
