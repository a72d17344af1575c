"""Self-speculation: a diffusion model with an `ar` model in it drafts a block, and the `ar` model checks it.

One pass reads the draft of a block as clean tokens, which gives the `ar` model's distribution of each of them and of
the next, and the masked block after it, which gives the next draft. What is accepted and drawn anew is distributed
as the `ar` model's own samples (Leviathan et al. 2023, Chen et al. 2023); at temperature 0 it is its own text.
"""

from functools import partial

import torch

from lm.caches import BlockCache


def speculate(model, prompt, max_new_tokens, sampler):
    """Continue a list of token ids by max_new_tokens tokens, or to a stop token, as a list."""
    config, block = model.config, sampler.block_length
    device, start = model.embedding.weight.device, 0
    size = len(prompt) + max_new_tokens
    new_cache = partial(BlockCache, min(size, config.block_size) + 2 * block, device)
    tokens, draft, q, cache = list(prompt), [], [], new_cache()
    while len(tokens) < size and (len(tokens) == len(prompt) or tokens[-1] not in sampler.stop_tokens):
        if len(tokens) - start > config.block_size:  # the last half is the context, as of an `ar` model
            start = len(tokens) - max(1, config.block_size // 2)
            draft, q, cache = [], [], new_cache()
        known = [*tokens[start:], *draft]
        begin, clean = len(known) // block * block, known[cache.length :]
        fits = begin + block <= config.block_size
        noisy = known[begin:] + [config.mask_id] * (block - len(known[begin:])) if fits else []
        cache.plan(len(clean), begin, len(noisy))
        hidden = model.hidden(torch.tensor([clean + noisy], device=device), cache=cache)[0]
        checked = len(draft) + 1  # positions of which the `ar` model gives the distribution
        logits = model.head(hidden[len(clean) - checked : len(clean)])
        if config.ignore_id is not None:
            logits[:, config.ignore_id] = -torch.inf  # padding, which an `ar` model never writes
        p = sampler.probabilities(logits)
        accepted, token = check_draft(draft, q, p, sampler.rng)
        cache.length += len(clean) - len(draft) + accepted
        whole = accepted == len(draft)
        new = sampler.truncate([*draft[:accepted], token][: size - len(tokens)])
        sampler.tell(len(tokens), torch.tensor([new]), p.cpu()[torch.arange(len(new)), new])
        tokens += new
        # What was drafted behind a rejected token was drawn apart from it, so it is still as q says.
        draft, q = draft[accepted + 1 :], q[accepted + 1 :]
        if whole and len(known) + 1 < begin + len(noisy):  # what follows the token that was just drawn
            q = sampler.probabilities(model.head(hidden[len(clean) + len(known) + 1 - begin :]))
            draft = torch.multinomial(q.cpu(), 1, generator=sampler.rng).squeeze(1).tolist()
    return tokens


def check_draft(draft, q, p, rng):
    """Return how many tokens drawn with q (N, V) are accepted as of p (1 + N, V), and the token after these."""
    for i, token in enumerate(draft):
        uniform = torch.rand((), dtype=torch.float64, generator=rng)
        if uniform * q[i, token].cpu() >= p[i, token].cpu():
            rest = (p[i] - q[i]).clamp(min=0)
            return i, int(torch.multinomial(rest.cpu(), 1, generator=rng))
    return len(draft), int(torch.multinomial(p[-1].cpu(), 1, generator=rng))
