"""The kernels compute what PyTorch's plain operations compute."""

import math
import runpy
import statistics
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lm import kernels
from lm.configurator import ROOT


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# ---------------------------------------------------------------------------- linear layers


@pytest.mark.skipif(kernels.ONEDNN is None, reason='this PyTorch has no oneDNN')
@pytest.mark.parametrize('bias', [True, False])
def test_float32_linear_layers_agree_with_pytorchs(bias, monkeypatch):
    monkeypatch.setattr(kernels, 'MIN_ONEDNN_SIZE', 1 << 16)  # as where there is AVX-512
    x, weight, b = random(3, 70, 64), random(96, 64, seed=1), random(96, seed=2) if bias else None
    inputs = [x, weight] + [b] * bias
    y, expected = kernels.linear(x, weight, b), F.linear(x, weight, b)
    assert 'OneDNN' in type(y.grad_fn).__name__
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    upstream = random(3, 70, 96, seed=3).detach()
    for got, wanted in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (y, expected))):
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize(
    'name, avx, uses_onednn',
    [('AMD EPYC', 'AVX512', True), ('Intel Xeon', 'AVX512', False), ('AMD EPYC', 'AVX2', False)],
)
def test_onednn_multiplies_only_where_pytorchs_own_leaves_avx512_unused(name, avx, uses_onednn, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'cpu_name': name}, raising=False)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: avx)
    found = runpy.run_path(kernels.__file__)  # a copy: what other tests use stays
    assert (found['MIN_ONEDNN_SIZE'] < math.inf) == uses_onednn


@pytest.mark.skipif(kernels.ONEDNN is None, reason='this PyTorch has no oneDNN')
def test_what_needs_no_gradient_gets_none_and_other_types_go_to_pytorch(monkeypatch):
    monkeypatch.setattr(kernels, 'MIN_ONEDNN_SIZE', 1 << 16)
    x, weight = random(3, 70, 64), random(96, 64, seed=1)
    kernels.linear(x, weight.detach(), None).sum().backward()
    assert x.grad is not None and weight.grad is None
    small = kernels.linear(x[0, :2], weight)  # too small to be worth a call
    assert 'OneDNN' not in type(small.grad_fn).__name__
    with torch.autocast('cpu', torch.bfloat16):
        assert kernels.linear(x, weight).dtype == torch.bfloat16
    assert kernels.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


# ---------------------------------------------------------------------------- attention


def heads_and_mask(kv_heads, masking):
    q, k, v = random(2, 4, 9, 8), random(2, kv_heads, 9, 8, seed=1), random(2, kv_heads, 9, 8, seed=2)
    doc_ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    mask = (doc_ids[:, None, :, None] == doc_ids[:, None, None, :]) if masking == 'documents' else None
    return q, k, v, mask


@pytest.mark.parametrize('kv_heads', [4, 2], ids=['full', 'grouped'])
@pytest.mark.parametrize('masking', ['none', 'causal', 'documents'])
def test_attention_and_its_gradients_are_those_of_the_formula(kv_heads, masking):
    q, k, v, mask = heads_and_mask(kv_heads, masking)
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if masking == 'causal' else mask
    k_all, v_all = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    scores = q @ k_all.mT * 8**-0.5  # (2, 4, 9, 9)
    scores = scores if seen is None else scores.masked_fill(~seen, float('-inf'))
    results = kernels.attend(q, k, v, mask, masking == 'causal', 0.0), scores.softmax(-1) @ v_all
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    upstream = random(2, 4, 9, 8, seed=3).detach()
    for one, other in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in results)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('masking', ['none', 'causal', 'documents'])
def test_attention_in_bfloat16_on_a_cpu_rounds_its_inputs_and_its_output_alone(masking):
    *inputs, mask = heads_and_mask(2, masking)
    low = [x.detach().bfloat16() for x in inputs]
    with torch.autocast('cpu', torch.bfloat16):
        y = kernels.attend(*low, mask, masking == 'causal', 0.0)
    exact = kernels.attend(*(x.float() for x in low), mask, masking == 'causal', 0.0)
    torch.testing.assert_close(y, exact.bfloat16(), atol=0, rtol=0)


@pytest.mark.faults
@pytest.mark.parametrize('masking, dtype', [('documents', torch.bfloat16), ('none', torch.float32)])
def test_shared_heads_are_repeated_where_a_gpu_would_keep_all_scores(masking, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(
        F, 'scaled_dot_product_attention', lambda q, k, v, *_, enable_gqa: asked.append((k, enable_gqa))
    )
    q, k = (torch.empty(2, heads, 5, 8, dtype=dtype, device='meta') for heads in (4, 2))
    kernels.attend(
        q, k, k, torch.empty(2, 1, 5, 5, device='meta') if masking == 'documents' else None, False, 0.0
    )
    assert asked[0][0].shape == q.shape and not asked[0][1]
    kernels.attend(q.bfloat16(), k.bfloat16(), k.bfloat16(), None, True, 0.0)
    assert asked[1][0].shape == k.shape and asked[1][1]  # the fused kernel takes these as they are


# ---------------------------------------------------------------------------- the sum of token losses


@pytest.mark.faults
def test_gradients_of_many_like_tokens_do_not_overflow_in_float16():
    hidden = 4 * torch.ones(2**14, 8)
    hidden += random(2**14, 8).detach() / 100
    weight, targets, weights = (
        random(32, 8).detach(),
        torch.zeros(2**14, dtype=torch.long),
        8 * torch.ones(2**14),
    )
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]

    def chunk_nll(h, y, w):
        logits = F.linear(h, w).float()
        return F.cross_entropy(logits, y, reduction='none'), logits.argmax(-1)

    def gradients(**half):
        with torch.autocast('cpu', torch.float16, enabled=bool(half)):
            loss, *_ = kernels.WeightedSum.apply(*inputs, weights, targets, chunk_nll, 2**14)
        return torch.autograd.grad(loss, inputs)

    for got, wanted in zip(gradients(half=True), gradients()):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.01 * wanted.abs().max().item())


def nll_and_pred(hidden, targets, head_weight):
    logits = 5 * torch.tanh(hidden @ head_weight.t() / 5)
    return F.cross_entropy(logits, targets, reduction='none'), logits.detach().argmax(-1)


@pytest.mark.parametrize('rows', [7, 64])
def test_the_weighted_sum_has_autograds_gradient_for_any_upstream_and_for_its_weights(rows):
    hidden, head, weights = random(20, 16), random(64, 16, seed=1), random(20, seed=2)
    targets, inputs = torch.arange(20) + 10, (hidden, head, weights)
    nll, pred = nll_and_pred(hidden, targets, head)
    expected = (weights * nll).sum()
    loss, got_nll, got_pred = kernels.WeightedSum.apply(hidden, head, weights, targets, nll_and_pred, rows)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got_nll, nll)
    assert torch.equal(got_pred, pred) and not got_nll.requires_grad
    for function in (lambda x: x, lambda x: -3 * x, lambda x: (x / 10).exp(), lambda x: 0 * x):
        gradients = [torch.autograd.grad(function(x), inputs, retain_graph=True) for x in (loss, expected)]
        for got, wanted in zip(*gradients):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_frozen_head_gets_no_gradient_and_no_token_costs_nothing():
    hidden, head, weights = random(20, 16), random(64, 16, seed=1).detach(), torch.ones(20)
    targets = torch.arange(20)
    loss, *_ = kernels.WeightedSum.apply(hidden, head, weights, targets, nll_and_pred, 8)
    (gradient,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(nll_and_pred(hidden, targets, head)[0].sum(), hidden)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    loss, nll, pred = kernels.WeightedSum.apply(
        hidden[:0], head.requires_grad_(), weights[:0], targets[:0], nll_and_pred, 8
    )
    loss.backward()
    assert loss == 0 and len(nll) == len(pred) == 0 and not head.grad.any()


def test_put_undoes_take():
    x = torch.arange(12).view(3, 4)
    index = torch.tensor([1, 6, 11])
    assert kernels.take(x, index).tolist() == [1, 6, 11]
    assert kernels.put(kernels.take(x, index), index, x, -1).tolist() == [
        [-1, 1, -1, -1],
        [-1, -1, 6, -1],
        [-1, -1, -1, 11],
    ]
    assert torch.equal(kernels.put(kernels.take(x, None), None, x, -1), x)


GROWTH = """
import torch
from lm import runtime
from lm.kernels import WeightedSum

runtime.keep_freed_memory()
peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) / 1e3
hidden, head = torch.randn(4096, 16, requires_grad=True), torch.randn(49152, 16)
targets, weights = torch.zeros(4096, dtype=torch.long), torch.ones(4096)


def chunk_nll(hidden, targets, head):
    logits = hidden @ head.t()
    return torch.nn.functional.cross_entropy(logits, targets, reduction='none'), logits.detach().argmax(-1)


before = peak()
WeightedSum.apply(hidden, head, weights, targets, chunk_nll, 149)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the peak is read from /proc')
def test_the_chunks_of_the_head_take_the_memory_of_a_few():
    """Of logits there are 29 MB at a time; what stays of each chunk must not part the heap between them.

    Where that lies is by chance: of 33 runs 31 took 154 to 383 MB, two 468 and 668; without huge pages 840 to 1,470.
    """
    command = [sys.executable, '-c', GROWTH]
    outputs = [subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout for _ in range(5)]
    assert statistics.median(map(float, outputs)) < 16 * 29
