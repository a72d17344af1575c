"""Draw tokens from logits: temperature, top k and nucleus, the same for a seed on each device."""

import torch

from lm.layers import check


def sample_tokens(model, hidden, uniform, options, score=None):
    """Sample a token (N,) for each hidden state (N, C); return them and their score(logits, token) (N,) or None.

    uniform: (N,) numbers, None at temperature 0; options: temperature, top_k, top_p.
    """
    rows, tokens, scores = model.head_rows(hidden), [], []
    if uniform is not None and not hidden.is_cpu:
        rows = max(1, rows // 8)  # in float64, several times
    for i in range(0, max(1, len(hidden)), rows):
        logits = model.head(hidden[i : i + rows])  # (n, V)
        check_numbers(logits)
        token = choose(logits, None if uniform is None else uniform[i : i + rows], *options)
        if score:
            scores.append(score(logits, token))
        tokens.append(token)
    return torch.cat(tokens), torch.cat(scores) if score else None


def check_numbers(logits):
    """Raise a ValueError for nan; not on a GPU, which would have to wait for the answer."""
    if logits.is_cpu and not torch.compiler.is_compiling():
        check(not logits.isnan().any(), 'The model computes nan: its weights are damaged; take others.')


def confidence_of(logits, token):
    """Compute the probability (N,) of tokens (N,), given logits (N, V)."""
    return (logits.gather(1, token[:, None]) - logits.logsumexp(-1, keepdim=True)).exp().squeeze(1)


def certainty_of(logits, token):
    """Compute the negative entropy (N,) in nats of the distributions of logits (N, V)."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)


def uniform_numbers(shape, rng, device):
    """Draw numbers in [0, 1) in float64, on the CPU, so that a seed means the same on each device."""
    uniform = torch.rand(*shape, dtype=torch.float64, generator=rng)
    return uniform if device.type == 'mps' else uniform.to(device)  # mps has no float64


def choose(logits, uniform, temperature, top_k, top_p):
    """Sample a token (N,) per row of logits (N, V), by uniform numbers (N,); the likeliest at temperature 0.

    By inverting the distribution in float64: float32 cannot reach its tail, which would silently lower the temperature
    (Zheng et al. 2024).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = restrict(logits.to(uniform.device).double(), temperature, top_k, top_p)
    cumulative = probabilities.cumsum(-1)  # (N, V)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return drawn.squeeze(1).to(logits.device)


def restrict(logits, temperature, top_k, top_p):
    """Compute probabilities (N, V) at a temperature, within the top k and the nucleus p (Holtzman et al. 2020)."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        top = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(1, top.indices, top.values)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # those before are enough already
        probabilities = probabilities.masked_fill(outside.scatter(1, order, outside), 0.0)
    return probabilities
