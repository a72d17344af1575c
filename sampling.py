"""Generation: one generate() for all architectures.

`ar` writes from left to right with a KV cache. The diffusion architectures fill hidden positions, wherever
they are: a prompt is what is visible, so a continuation and an infilling are the same call.
"""
from contextlib import contextmanager

import torch

from configurator import UserError

SAMPLERS = ('ancestral', 'confidence', 'blocks', 'threshold', 'remdm')


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_tokens=(), seed=0,
             use_cache=True, steps=None, sampler='ancestral', block_length=32, threshold=0.9, eta=0.1, k=None,
             watch=None):
    """Continues each of `prompts` (lists of token ids, not empty) by max_new_tokens tokens.

    Returns lists of ids: the prompt, what follows, and the stop token if one ended it early. A prompt holds
    at most block_size tokens; a longer text goes on with the last half of the block as its context.

    temperature     0: always the likeliest token
    top_k, top_p    draw among the k likeliest tokens; among the fewest that have probability p together
    use_cache       ar: keep keys and values; the same tokens without, only slower
    steps           diffusion: forward passes, at most, for a window's hidden positions; None: as many as these
    sampler         diffusion: how positions are chosen, see `Sampler`
    block_length    of sampler='blocks'     threshold   of 'threshold'     eta   of 'remdm'
    k               sdd: candidates per hidden position; 0: none, as masked diffusion; None: the model's own number
    watch           diffusion: called as watch(step, canvas (B, L), belief or None) after each step of a window

    Diffusion also fills each <|mask|> within a prompt; with max_new_tokens=0 it does only that.
    """
    check_prompts(model, prompts)
    check_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, steps=steps,
                   sampler=sampler, block_length=block_length, threshold=threshold, eta=eta, k=k)
    generator = torch.Generator().manual_seed(seed)

    def draw(states):
        return draw_tokens(model, states, temperature, top_k, top_p, generator)

    with evaluating(model):
        if model.causal:
            return continue_left_to_right(model, prompts, max_new_tokens, draw, set(stop_tokens), use_cache)
        choice = Sampler(sampler, block_length, threshold, eta, generator, [*stop_tokens, model.config.ignore_id],
                         model.config.k if k is None else k, watch)
        rows = [None] * len(prompts)
        for length in sorted(set(map(len, prompts))):  # rows of one length share their forward passes
            same = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            filled = continue_by_filling(model, [prompts[i] for i in same], max_new_tokens, draw, set(stop_tokens),
                                         steps, choice)
            for i, row in zip(same, filled):
                rows[i] = row
        return rows


@contextmanager
def evaluating(model):
    """Dropout is off while the context lasts."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_prompts(model, prompts):
    for prompt in prompts:
        if len(prompt) == 0:
            raise UserError('A prompt is empty; start it with <|endoftext|> for a new text.')
        if len(prompt) > model.config.block_size:
            raise UserError(f'The prompt has {len(prompt)} tokens, but the model sees at most '
                             f'block_size={model.config.block_size}; shorten the prompt.')
        if model.causal and model.config.mask_id in prompt:
            raise UserError('The prompt holds <|mask|>, which an autoregressive model cannot fill; infill with a '
                             'diffusion model.')


def check_settings(**settings):
    for name, wanted, is_right in (
            ('max_new_tokens', 'at least 0', lambda x: x >= 0),
            ('temperature', 'at least 0', lambda x: x >= 0),
            ('top_k', 'at least 1, or None', lambda x: x is None or x >= 1),
            ('top_p', 'above 0 and at most 1, or None', lambda x: x is None or 0 < x <= 1),
            ('steps', 'at least 1, or None', lambda x: x is None or x >= 1),
            ('sampler', 'one of ' + ', '.join(SAMPLERS), lambda x: x in SAMPLERS),
            ('block_length', 'at least 1', lambda x: x >= 1),
            ('threshold', 'between 0 and 1', lambda x: 0 <= x <= 1),
            ('eta', 'between 0 and 1', lambda x: 0 <= x <= 1),
            ('k', 'at least 0, or None', lambda x: x is None or x >= 0)):
        if not is_right(settings[name]):
            raise UserError(f'{name} is {settings[name]!r}; it has to be {wanted}.')


# ---------------------------------------------------------------------------- drawing

def draw_tokens(model, states, temperature, top_k, top_p, generator):
    """A token for each state (N, C), and the probability that the model gives it: (N,), (N,).

    Drawn in float64: Gumbel noise in float32 cannot reach the tail, which lowers the temperature unnoticed
    (Zheng et al. 2024). The uniform numbers come from the CPU, so that a seed means the same on each device.
    """
    tokens, confidences = [], []
    for part in states.split(model.head_rows(states)):
        logits = model.head(part)  # (n, V)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            exact = (logits.cpu() if logits.device.type == 'mps' else logits).double()  # mps has no float64
            token = draw_from(restrict(exact, temperature, top_k, top_p), generator).to(logits.device)
        confidences.append((logits.gather(1, token) - logits.logsumexp(-1, keepdim=True)).exp().squeeze(1))
        tokens.append(token.squeeze(1))
    return torch.cat(tokens), torch.cat(confidences)


def draw_from(probabilities, generator):
    """One index per row of probabilities (N, V), which need not sum to 1: (N, 1)."""
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(len(probabilities), 1, dtype=torch.float64, generator=generator).to(cumulative.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def restrict(logits, temperature, top_k, top_p):
    """Probabilities (N, V) at a temperature, within the top k, within the nucleus p (Holtzman et al. 2020)."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # what comes before is enough already
        probabilities = probabilities.masked_fill(outside.scatter(1, order, outside), 0.0)
    return probabilities


# ---------------------------------------------------------------------------- left to right

class KVCache:
    """Keys and values of what each row has read so far, `lengths` (B,) tokens, in buffers of `size` tokens.

    Rows start together at position 0, padded on the right to one length; what lies beyond a row's own length
    is overwritten as it goes on, and masked until then.
    """

    def __init__(self, rows, size, device):
        self.buffers = {}
        self.size = size
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.even, self.longest = True, 0  # whether all rows are equally long; known without asking the device

    def positions(self, length):
        """Where `length` new tokens of each row stand: a slice, or (B, length) if rows differ."""
        if self.even or self.longest == 0:
            return slice(self.longest, self.longest + length)
        return self.lengths[:, None] + torch.arange(length, device=self.lengths.device)

    def extend(self, layer, k, v):
        """Stores a layer's new keys and values (B, H, T, D); all of them so far, a mask, whether causal."""
        if layer not in self.buffers:
            self.buffers[layer] = [x.new_zeros(x.size(0), x.size(1), self.size, x.size(3)) for x in (k, v)]
        keys, values = self.buffers[layer]
        if self.longest == 0:
            keys[:, :, :k.size(2)], values[:, :, :v.size(2)] = k, v
            return k, v, None, True
        end, mask = self.longest + 1, None
        if self.even:
            keys[:, :, end - 1:end], values[:, :, end - 1:end] = k, v
        else:
            rows = torch.arange(len(k), device=k.device)
            keys[rows, :, self.lengths], values[rows, :, self.lengths] = k[:, :, 0], v[:, :, 0]
            mask = (torch.arange(end, device=k.device) <= self.lengths[:, None])[:, None, None]  # (B, 1, 1, S)
        return keys[:, :, :end], values[:, :, :end], mask, False

    def advance(self, lengths):
        """Counts what was read: `lengths` new tokens per row."""
        self.lengths = self.lengths + torch.tensor(lengths, device=self.lengths.device)
        self.even = self.even and len(set(lengths)) == 1
        self.longest += max(lengths)


def continue_left_to_right(model, prompts, max_new_tokens, draw, stop_tokens, use_cache):
    rows, starts = [list(prompt) for prompt in prompts], [0] * len(prompts)
    running, cache, block_size = [True] * len(rows), None, model.config.block_size
    context = max(1, block_size // 2)  # of what is past the block
    for _ in range(max_new_tokens):
        full = [len(row) - start > block_size for row, start in zip(rows, starts)]
        starts = [len(row) - context if f else start for row, start, f in zip(rows, starts, full)]
        if cache is None or any(full):
            size = min(block_size, max(map(len, rows)) + max_new_tokens)  # a pretrained model's block is endless
            cache = KVCache(len(rows), size, model.embedding.weight.device) if use_cache else None
            states = read(model, [row[start:] for row, start in zip(rows, starts)], cache)
        else:
            states = read(model, [row[-1:] for row in rows], cache)
        tokens, _ = draw(states)
        for i, token in enumerate(tokens.tolist()):
            rows[i].append(token)  # a row that has stopped goes on as well: shapes stay the same
            running[i] = running[i] and token not in stop_tokens
        if not any(running):
            break
    return [cut(row, len(prompt), stop_tokens) for row, prompt in zip(rows, prompts)]


def read(model, texts, cache):
    """States (B, C) after each of `texts`, lists of ids of any lengths, which follow what `cache` holds."""
    lengths = [len(text) for text in texts]
    padded = [text + [0] * (max(lengths) - len(text)) for text in texts]
    device = model.embedding.weight.device
    hidden = model.hidden(torch.tensor(padded, device=device), cache)  # (B, T, C)
    if cache is not None:
        cache.advance(lengths)
    last = torch.tensor(lengths, device=device) - 1
    return hidden[torch.arange(len(texts), device=device), last]


def cut(row, prompt_length, stop_tokens):
    """The row up to its first stop token after the prompt, that token included."""
    for i in range(prompt_length, len(row)):
        if row[i] in stop_tokens:
            return row[:i + 1]
    return row


# ---------------------------------------------------------------------------- filling

class Sampler:
    """How hidden positions are chosen: a name and its parameters.

    ancestral             each with the same probability, so that the order is random (MDLM)
    confidence, blocks    the surest draws, an equal share of them in each step (LLaDA)
    threshold             all draws that are surer than the threshold, one at least (Fast-dLLM)
    remdm                 like ancestral, and what was written is hidden again at times (ReMDM)

    Where the surest come first, `ends` come last: a text's end and its filler are sure before the text is.
    """

    def __init__(self, name, block_length, threshold, eta, generator, ends, k=0, watch=None):
        self.name, self.block_length, self.threshold, self.eta = name, block_length, threshold, eta
        self.generator, self.ends = generator, [token for token in ends if token is not None]
        self.k, self.watch = k, watch

    def chance(self, where, probability):
        """Each position of `where` (B, L) with this probability."""
        uniform = torch.rand(where.shape, dtype=torch.float64, generator=self.generator)
        return where & (uniform < probability).to(where.device)

    def remask(self, written, steps_left, steps):
        """Positions, of those `written` (B, L) so far, that are hidden again."""
        return self.chance(written, remdm_rates(steps_left, steps, self.eta)[0]) if self.name == 'remdm' else None

    def candidates(self, hidden, steps_left, steps):
        """Where to draw: chance alone decides (B, L), or everywhere, to see where the model is sure."""
        if self.name == 'ancestral':
            return self.chance(hidden, 1 / steps_left)
        if self.name == 'remdm':
            return self.chance(hidden, remdm_rates(steps_left, steps, self.eta)[1])
        return hidden

    def keep(self, where, tokens, confidence, steps_left):
        """Which of the positions `where` (B, L) keep the tokens drawn there, given the probability of each."""
        if self.name in ('ancestral', 'remdm') or steps_left == 1:
            return where
        for token in self.ends:
            confidence = torch.where(tokens == token, confidence - 1, confidence)
        rank = confidence.masked_fill(~where, -2).argsort(1, descending=True).argsort(1)
        if self.name == 'threshold':
            return where & ((confidence > self.threshold) | (rank == 0))
        return where & (rank < -(-where.sum(1, keepdim=True) // steps_left))


def remdm_rates(steps_left, steps, eta):
    """Probabilities to hide a written token again, and to reveal a hidden one (Wang et al. 2025, ReMDM-cap).

    α is the share that is visible, α_t now and α_s after the step: hide with σ = min(η, (1 − α_s) / α_t),
    reveal with (α_s − (1 − σ) α_t) / (1 − α_t).
    """
    now, after = 1 - steps_left / steps, 1 - (steps_left - 1) / steps
    sigma = min(eta, (1 - after) / now) if now > 0 else 0.0
    return sigma, (after - (1 - sigma) * now) / (1 - now)


def continue_by_filling(model, prompts, max_new_tokens, draw, stop_tokens, steps, sampler):
    """Prompts of one length, continued by windows of at most block_size tokens."""
    device, block_size, mask_id = model.embedding.weight.device, model.config.block_size, model.config.mask_id
    rows = torch.tensor(prompts, device=device)  # (B, L)
    prompt_length, left = rows.size(1), max_new_tokens
    while True:
        holes = (rows == mask_id).any()  # of the prompt: filled before a full one gives way to new tokens
        whole = rows.size(1) + min(left, 1) <= block_size or holes
        context = min(rows.size(1), block_size if whole else block_size // 2)
        new = min(left, block_size - context)
        window = torch.cat([rows[:, rows.size(1) - context:], rows.new_full((len(rows), new), mask_id)], 1)
        rows = torch.cat([rows[:, :rows.size(1) - context], fill(model, window, draw, steps, sampler)], 1)
        left -= new
        finished = [cut(row, prompt_length, stop_tokens) for row in rows.tolist()]
        if left == 0 or all(row[-1] in stop_tokens and len(row) > prompt_length for row in finished):
            return finished


def fill(model, canvas, draw, steps, sampler):
    """Fills each <|mask|> of the canvas (B, L), all at once or, for sampler 'blocks', from left to right."""
    canvas = canvas.clone()
    holes = canvas == model.config.mask_id
    columns = holes.any(0).nonzero().squeeze(1)  # where any row has something to fill
    if len(columns) == 0:
        return canvas
    parts = columns.split(sampler.block_length) if sampler.name == 'blocks' else [columns]
    lengths = [len(part) for part in parts]
    steps = len(columns) if steps is None else steps
    belief, step = None, 0  # of all hidden positions, also of those whose block comes later
    for part, share in zip(parts, share_steps(steps, lengths)):
        region = torch.zeros_like(holes)
        region[:, part] = holes[:, part]
        for steps_left in range(share, 0, -1):  # the last step takes what is left
            belief = fill_some(model, canvas, region, belief, draw, steps_left, share, sampler)
            step += 1
            if sampler.watch:
                sampler.watch(step, canvas, belief)
    return canvas


def share_steps(steps, lengths):
    """Steps for each of some parts, in proportion to their lengths: `steps` in all, one at least for each."""
    shares = []
    for i, length in enumerate(lengths):
        share = round(steps * length / sum(lengths[i:]))  # of what is left
        shares.append(max(1, min(share, steps - len(lengths[i + 1:]))))
        steps -= shares[-1]
    return shares


def fill_some(model, canvas, region, belief, draw, steps_left, steps, sampler):
    """One step: writes some of the region (B, L) into the canvas, and returns what is believed of the rest.

    A token is drawn from the model's whole distribution, never taken from a belief.
    """
    hidden = region & (canvas == model.config.mask_id)
    where = sampler.candidates(hidden, steps_left, steps)
    remasked = sampler.remask(region & ~hidden, steps_left, steps)
    if where.any() or (model.believes and sampler.k):  # else the step changes nothing
        states = model.hidden(canvas, belief=belief)
        tokens, confidence = draw(states[where])
        drawn = torch.zeros_like(canvas).masked_scatter(where, tokens)
        confidence = torch.zeros(canvas.shape, device=canvas.device).masked_scatter(where, confidence)
        keep = sampler.keep(where, drawn, confidence, steps_left)
        canvas[keep] = drawn[keep]
        belief = model.believe(states, canvas == model.config.mask_id, sampler.k)
    if remasked is not None:
        canvas[remasked] = model.config.mask_id  # nothing is believed of them yet
    return belief
