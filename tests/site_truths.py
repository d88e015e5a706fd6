"""A layer's statistics against autograd, row by row."""

import torch

from hvpfast.capture.layers import rule_of
from hvpfast.capture.sites import site_of


def assert_statistics(module, x):
    """Every statistic of every parameter against autograd, row by row, with two gradient rows a sample (M = 2 N)."""
    module, x = module.double(), x.double() if x.dtype.is_floating_point else x
    normal = rule_of(module)(module, x)
    output = module(x)
    g = torch.randn(2 * x.shape[0], *output.shape[1:], dtype=torch.float64)
    a, rows = normal.inputs(), normal.grads(g)
    n, m = x.shape[0], g.shape[0]
    assert a.shape[:2] == (rows.shape[0], n) and rows.shape[1] == m and a.shape[2] == rows.shape[2]
    params = list(module.parameters())
    truths = [torch.autograd.grad(module(x[r % n : r % n + 1]), params, g[r : r + 1]) for r in range(m)]
    stacked = [torch.stack(parts) for parts in zip(*truths, strict=True)]
    v = torch.randn(2, *params[0].shape, dtype=torch.float64)
    c = torch.randn(m, 2, dtype=torch.float64)
    for p, truth in zip(params, stacked, strict=True):
        use = [(normal, g)]
        site = site_of(tuple(p.shape), *((use, []) if p is module._parameters.get("weight") else ([], use)), n)
        w = v if p is params[0] else torch.randn(2, *p.shape, dtype=torch.float64)
        flat = truth.reshape(m, -1)
        assert site.rows == m
        near(site.sample_grads(), truth)
        near(site.norms_squared(), flat.square().sum(1))
        near(site.second_moment(), truth.square().sum(0))
        near(site.gram(), flat @ flat.T)
        near(site.dots(w), flat @ w.reshape(2, -1).T)
        near(site.weighted(c), (c.T @ flat).reshape(2, *p.shape))


def near(got, truth):
    assert got.shape == truth.shape
    assert float((got - truth).abs().max()) <= 1e-12 * (1 + float(truth.abs().max()))
