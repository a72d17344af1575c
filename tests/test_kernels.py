"""What is written out for speed gives what PyTorch's plain way gives."""

import pytest
import torch
import torch.nn.functional as F

import model
from lm import kernels, optim


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.skipif(kernels.MULTIPLY is None, reason='this PyTorch has no oneDNN')
@pytest.mark.parametrize('bias', [True, False])
def test_float32_linear_layers_use_onednn_and_agree_with_pytorchs(bias, monkeypatch):
    x, weight, b = random(3, 70, 64), random(96, 64, seed=1), random(96, seed=2) if bias else None
    inputs = [x, weight] + [b] * bias
    expected = F.linear(x, weight, b)
    gradient = random(3, 70, 96, seed=3).detach()
    used, multiply = [], kernels.MULTIPLY
    monkeypatch.setattr(kernels, 'MULTIPLY', lambda *given: used.append(1) or multiply(*given))
    y = kernels.linear(x, weight, b)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, gradient), torch.autograd.grad(expected, inputs, gradient)
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-5)
    assert len(used) == 3
    kernels.linear(x, weight.detach(), None).sum().backward()
    assert len(used) == 5  # what needs no gradient costs no product
    kernels.linear(x[0, :2], weight, b)
    with torch.autocast('cpu', torch.bfloat16):
        assert kernels.linear(x, weight, b).dtype == torch.bfloat16
    assert len(used) == 5


@pytest.mark.parametrize('cap', [0.0, 15.0])
@pytest.mark.parametrize('rows', [7, 64])
def test_the_head_loss_has_the_gradients_of_autograd(cap, rows):
    hidden, weight, never = random(20, 16), random(64, 16, seed=1), torch.zeros(64)
    never[[3, 60, 61, 62, 63]] = -torch.inf
    targets = torch.arange(20) + 10
    shares = torch.rand(20, generator=torch.Generator().manual_seed(2)) + 0.1
    shares[-2:] = torch.inf  # of no account
    logits = hidden @ weight.t()
    logits = cap * torch.tanh(logits / cap) if cap else logits
    plain = F.cross_entropy(logits + never, targets, reduction='none') / shares
    expected = torch.autograd.grad(3 * plain.sum(), (hidden, weight))
    nats, guess = model.HeadLoss.apply(hidden, weight, never, targets, shares, cap, rows, torch.float32)
    torch.testing.assert_close(nats, plain)
    assert torch.equal(guess, (logits + never).argmax(-1))
    for ours, theirs in zip(
        torch.autograd.grad(3 * nats.sum(), (hidden, weight), retain_graph=True), expected
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match='summed'):
        (nats * torch.arange(20)).sum().backward()
    empty = model.HeadLoss.apply(hidden[:0], weight, never, targets[:0], shares[:0], cap, rows, torch.float32)
    assert len(empty[0]) == len(empty[1]) == 0


def test_batched_muon_steps_and_resumes_as_pytorchs():
    shapes = [(16, 16), (16, 64), (16, 16), (64, 16), (24, 16)]
    ours, theirs = (
        [random(*shape, seed=i).detach().requires_grad_() for i, shape in enumerate(shapes)] for _ in range(2)
    )
    options = dict(lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn='match_rms_adamw')
    optimizers = optim.BatchedMuon(ours, **options), torch.optim.Muon(theirs, **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = random(*p.shape, seed=10 * step + i + 100).detach()
            q.grad = p.grad.clone()
        if step == 2:  # a matrix that a step does not touch
            ours[0].grad = theirs[0].grad = None
            states = [optimizer.state_dict() for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states)):
                optimizer.load_state_dict(state)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)
