"""Generation: one generate() for all architectures.

`ar` writes from left to right with a KV cache. The diffusion architectures fill hidden positions, wherever
they are: a prompt is what is visible, so a continuation and an infilling are the same call.
"""

from contextlib import contextmanager

import torch

from lm.configurator import UserError
from model import Belief

SAMPLERS = ('ancestral', 'confidence', 'blocks', 'threshold', 'remdm')


@torch.inference_mode()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    stop_tokens=(),
    seed=0,
    use_cache=True,
    compile=False,
    steps=None,
    sampler='ancestral',
    block_length=32,
    cache_blocks=False,
    threshold=0.9,
    eta=0.1,
    k=None,
    watch=None,
):
    """Continues each of `prompts` (lists of token ids, not empty) by max_new_tokens tokens.

    Returns lists of ids: the prompt, what follows, and the stop token if one ended it early. A prompt holds
    at most block_size tokens; a longer text goes on with the last half of the block as its context.

    temperature     0: always the likeliest token
    top_k, top_p    draw among the k likeliest tokens; among the fewest that have probability p together
    use_cache       ar: keep keys and values; the same tokens without, only slower
    compile         ar: compile the step that reads one token and draws the next, on a GPU as a CUDA graph; the first
                    token of the first text waits for that
    steps           diffusion: forward passes, at most, for a window's hidden positions; None: as many as these
    sampler         diffusion: how positions are chosen, see `Sampler`
    block_length    of sampler='blocks'     threshold   of 'threshold'     eta   of 'remdm'
    cache_blocks    of sampler='blocks': an approximation, see `BlockCache`
    k               sdd: candidates per hidden position; 0: none, as masked diffusion; None: the model's own number
    watch           diffusion: called as watch(step, canvas (B, L), belief or None) after each step of a window

    Diffusion also fills each <|mask|> within a prompt; with max_new_tokens=0 it does only that.
    """
    check_prompts(model, prompts)
    check_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        steps=steps,
        sampler=sampler,
        block_length=block_length,
        threshold=threshold,
        eta=eta,
        k=k,
    )
    generator, options = torch.Generator().manual_seed(seed), (temperature, top_k, top_p)

    def draw(states):
        return draw_tokens(model, states, *options, generator)

    with evaluating(model):
        if model.causal:
            return continue_left_to_right(
                model, prompts, max_new_tokens, options, generator, set(stop_tokens), use_cache, compile
            )
        check_cache_blocks(model, sampler, cache_blocks)
        choice = Sampler(
            sampler,
            block_length,
            threshold,
            eta,
            generator,
            [*stop_tokens, model.config.ignore_id],
            model.config.k if k is None else k,
            watch,
            cache_blocks,
        )
        rows = [None] * len(prompts)
        for length in sorted(set(map(len, prompts))):  # rows of one length share their forward passes
            same = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            filled = continue_by_filling(
                model, [prompts[i] for i in same], max_new_tokens, draw, set(stop_tokens), steps, choice
            )
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
            raise UserError(
                f'The prompt has {len(prompt)} tokens, but the model sees at most '
                f'block_size={model.config.block_size}; shorten the prompt.'
            )
        if model.causal and model.config.mask_id in prompt:
            raise UserError(
                'The prompt holds <|mask|>, which an autoregressive model cannot fill; infill with a '
                'diffusion model.'
            )


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
        ('k', 'at least 0, or None', lambda x: x is None or x >= 0),
    ):
        if not is_right(settings[name]):
            raise UserError(f'{name} is {settings[name]!r}; it has to be {wanted}.')


def check_cache_blocks(model, sampler, cache_blocks):
    if cache_blocks and sampler != 'blocks':
        raise UserError(
            f"cache_blocks belongs to sampler='blocks', but sampler is {sampler!r}; leave it out, or "
            "choose 'blocks'."
        )
    if cache_blocks and model.config.shift:
        raise UserError(
            "cache_blocks is not for a model that was started from an ar checkpoint's weights: what "
            'predicts the first token of a block lies outside of it; leave it out.'
        )


# ---------------------------------------------------------------------------- drawing


def draw_tokens(model, states, temperature, top_k, top_p, generator):
    """A token for each state (N, C), and the probability that the model gives it: (N,), (N,)."""
    tokens, confidences = [], []
    for part in states.split(model.head_rows(states)):
        logits = model.head(part)  # (n, V)
        uniform = None if temperature == 0 else uniform_numbers((len(part),), generator, logits.device)
        token = choose(logits, uniform, temperature, top_k, top_p)
        confidences.append(
            (logits.gather(1, token[:, None]) - logits.logsumexp(-1, keepdim=True)).exp().squeeze(1)
        )
        tokens.append(token)
    return torch.cat(tokens), torch.cat(confidences)


def uniform_numbers(shape, generator, device):
    """Numbers in [0, 1) in float64. They come from the CPU, so that a seed means the same on each device; and stay
    there for a device that has no float64."""
    uniform = torch.rand(*shape, dtype=torch.float64, generator=generator)
    return uniform if device.type == 'mps' else uniform.to(device)


def choose(logits, uniform, temperature, top_k, top_p):
    """A token (N,) per row of logits (N, V), by uniform numbers (N,), or the likeliest at temperature 0.

    Drawn in float64: Gumbel noise in float32 cannot reach the tail, which lowers the temperature unnoticed
    (Zheng et al. 2024).
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = restrict(logits.to(uniform.device).double(), temperature, top_k, top_p).cumsum(-1)  # (N, V)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return drawn.squeeze(1).to(logits.device)


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
    is overwritten as it goes on, and masked until then. Once `fixed`, it always gives whole buffers and a mask, and
    all that changes is in tensors that stay where they are: one compiled step serves all.
    """

    def __init__(self, rows, size, device):
        self.buffers = {}
        self.size = size
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.even, self.longest = (
            True,
            0,
        )  # whether all rows are equally long; known without asking the device
        self.fixed = False

    def positions(self, length):
        """Where `length` new tokens of each row stand: a slice, or (B, length) if rows differ."""
        if not self.fixed and (self.even or self.longest == 0):
            return slice(self.longest, self.longest + length)
        return self.lengths[:, None] + torch.arange(length, device=self.lengths.device)

    def extend(self, layer, k, v):
        """Stores a layer's new keys and values (B, H, T, D); all of them so far, a mask, whether causal."""
        if layer not in self.buffers:
            self.buffers[layer] = [x.new_zeros(x.size(0), x.size(1), self.size, x.size(3)) for x in (k, v)]
        keys, values = self.buffers[layer]
        if self.fixed:
            return self.put(keys, values, k, v, self.size)
        if self.longest == 0:
            keys[:, :, : k.size(2)], values[:, :, : v.size(2)] = k, v
            return k, v, None, True
        end = self.longest + 1
        if not self.even:
            return self.put(keys, values, k, v, end)
        keys[:, :, end - 1 : end], values[:, :, end - 1 : end] = k, v
        return keys[:, :, :end], values[:, :, :end], None, False

    def put(self, keys, values, k, v, end):
        """Stores one token of each row at its own place; each row sees its own tokens among the first `end`."""
        rows = torch.arange(len(k), device=k.device)
        keys[rows, :, self.lengths], values[rows, :, self.lengths] = k[:, :, 0], v[:, :, 0]
        mask = (torch.arange(end, device=k.device) <= self.lengths[:, None])[:, None, None]  # (B, 1, 1, S)
        return keys[:, :, :end], values[:, :, :end], mask, False

    def advance(self, lengths):
        """Counts what was read: `lengths` new tokens per row, or the same number of each."""
        if isinstance(lengths, int):
            self.lengths += lengths
            if not self.fixed:  # a number that changes would be compiled into the step
                self.longest += lengths
            return
        self.lengths += torch.tensor(lengths, device=self.lengths.device)
        self.even = self.even and len(set(lengths)) == 1
        self.longest += max(lengths)


LOOK_EVERY = (
    16  # tokens: how often a GPU is asked whether all rows have stopped, since it has to be waited for
)


def continue_left_to_right(
    model, prompts, max_new_tokens, options, generator, stop_tokens, use_cache, compile
):
    """As `generate`. options: temperature, top_k and top_p."""
    rows, starts = [list(prompt) for prompt in prompts], [0] * len(prompts)
    block_size, left, running = model.config.block_size, max_new_tokens, [True] * len(prompts)
    while left > 0 and any(running):
        texts = [row[start:] for row, start in zip(rows, starts)]
        new = min(left, block_size + 1 - max(map(len, texts)))  # until a row is past the block
        written = write_on(model, texts, new, running, options, generator, stop_tokens, use_cache, compile)
        for i, more in enumerate(written):
            rows[i] += more
            running[i] = running[i] and stop_tokens.isdisjoint(more)
            if len(rows[i]) - starts[i] > block_size:
                starts[i] = len(rows[i]) - max(1, block_size // 2)
        left -= new
    return [cut(row, len(prompt), stop_tokens) for row, prompt in zip(rows, prompts)]


def write_on(model, texts, new, running, options, generator, stop_tokens, use_cache, compile):
    """At most `new` tokens after each of `texts`, as lists; fewer only if those `running` have a stop token now."""
    device = model.embedding.weight.device
    uniform = uniform_numbers((new, len(texts)), generator, device) if options[0] > 0 else [None] * new
    size = (
        -(-(max(map(len, texts)) + new - 1) // 64) * 64
    )  # few different ones, for the sake of compiled steps
    cache = KVCache(len(texts), size, device) if use_cache else None
    tokens = next_tokens(model, read(model, texts, cache), uniform[0], options)
    written, looked, step = [tokens], 0, one_more
    if compile and use_cache and new > 1:
        cache.fixed = True
        step = compiled_step(model, cache, tokens, uniform[1], options)
    for i in range(1, new):
        if stop_tokens and (device.type == 'cpu' or i % LOOK_EVERY == 0):
            for row in torch.stack(written[looked:]).tolist():
                running = [on and token not in stop_tokens for on, token in zip(running, row)]
            looked = i
            if not any(running):
                break
        if use_cache:  # a row that has stopped goes on as well: shapes stay the same
            tokens = step(model, cache, tokens, uniform[i], options)
        else:
            so_far = torch.stack(written, 1).tolist()
            states = read(model, [text + more for text, more in zip(texts, so_far)], None)
            tokens = next_tokens(model, states, uniform[i], options)
        written.append(tokens)
    return torch.stack(written, 1).tolist()


def read(model, texts, cache):
    """States (B, C) after each of `texts`, lists of ids of any lengths, which an empty cache keeps."""
    lengths = [len(text) for text in texts]
    padded = [text + [0] * (max(lengths) - len(text)) for text in texts]
    device = model.embedding.weight.device
    hidden = model.hidden(torch.tensor(padded, device=device), cache)  # (B, T, C)
    if cache is not None:
        cache.advance(lengths)
    last = torch.tensor(lengths, device=device) - 1
    return hidden[torch.arange(len(texts), device=device), last]


def one_more(model, cache, tokens, uniform, options):
    """Reads one token (B,) of each row, which follows what the cache holds, and draws the next (B,)."""
    states = model.hidden(tokens[:, None], cache)[:, 0]
    cache.advance(1)
    return next_tokens(model, states, uniform, options)


def next_tokens(model, states, uniform, options):
    """Tokens (B,) after states (B, C)."""
    rows = model.head_rows(states)
    if len(states) <= rows:
        return choose(model.head(states), uniform, *options)
    parts = zip(states.split(rows), [None] * len(states) if uniform is None else uniform.split(rows))
    return torch.cat([choose(model.head(part), numbers, *options) for part, numbers in parts])


def compiled_step(model, cache, tokens, uniform, options):
    """one_more() for a fixed cache, compiled; on a GPU a CUDA graph, launched at once instead of kernel by kernel."""
    step = torch.compile(one_more)
    if tokens.device.type != 'cuda':
        return step
    lengths, tokens = cache.lengths.clone(), tokens.clone()  # the graph reads and writes these very tensors
    uniform = None if uniform is None else uniform.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles; what these rehearsals keep lies beyond each row and is overwritten
            step(model, cache, tokens, uniform, options)
            cache.lengths.copy_(lengths)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = step(model, cache, tokens, uniform, options)

    def replay(model, cache, new_tokens, numbers, options):
        tokens.copy_(new_tokens)
        if uniform is not None:
            uniform.copy_(numbers)
        graph.replay()
        return drawn.clone()

    return replay


def cut(row, prompt_length, stop_tokens):
    """The row up to its first stop token after the prompt, that token included."""
    for i in range(prompt_length, len(row)):
        if row[i] in stop_tokens:
            return row[: i + 1]
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

    def __init__(
        self, name, block_length, threshold, eta, generator, ends, k=0, watch=None, cache_blocks=False
    ):
        self.name, self.block_length, self.threshold, self.eta = name, block_length, threshold, eta
        self.generator, self.ends = generator, [token for token in ends if token is not None]
        self.k, self.watch, self.cache_blocks = k, watch, cache_blocks

    def chance(self, where, probability):
        """Each position of `where` (B, L) with this probability."""
        uniform = torch.rand(where.shape, dtype=torch.float64, generator=self.generator)
        return where & (uniform < probability).to(where.device)

    def remask(self, written, steps_left, steps):
        """Positions, of those `written` (B, L) so far, that are hidden again."""
        return (
            self.chance(written, remdm_rates(steps_left, steps, self.eta)[0])
            if self.name == 'remdm'
            else None
        )

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
        window = torch.cat([rows[:, rows.size(1) - context :], rows.new_full((len(rows), new), mask_id)], 1)
        rows = torch.cat([rows[:, : rows.size(1) - context], fill(model, window, draw, steps, sampler)], 1)
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
        cache = BlockCache(part) if sampler.cache_blocks else None
        region = torch.zeros_like(holes)
        region[:, part] = holes[:, part]
        for steps_left in range(share, 0, -1):  # the last step takes what is left
            belief = fill_some(model, canvas, region, belief, draw, steps_left, share, sampler, cache)
            step += 1
            if sampler.watch:
                sampler.watch(step, canvas, belief)
    return canvas


def share_steps(steps, lengths):
    """Steps for each of some parts, in proportion to their lengths: `steps` in all, one at least for each."""
    shares = []
    for i, length in enumerate(lengths):
        share = round(steps * length / sum(lengths[i:]))  # of what is left
        shares.append(max(1, min(share, steps - len(lengths[i + 1 :]))))
        steps -= shares[-1]
    return shares


class BlockCache:
    """Keys and values (B, H, L, D) of a whole canvas as the first pass of a block sees it; further passes read the
    block's columns only, and renew theirs.

    An approximation: what lies outside the block sees the tokens that are written into it, and would change (the
    dual cache of Fast-dLLM, Wu et al. 2025).
    """

    def __init__(self, columns):
        self.buffers, self.columns = {}, columns

    def positions(self, length):
        return self.columns if self.buffers else slice(0, length)

    def extend(self, layer, k, v):
        """A layer's keys and values, the new ones (B, H, T, D) among them; no mask, not causal."""
        if layer not in self.buffers:
            self.buffers[layer] = k, v
        else:
            for kept, new in zip(self.buffers[layer], (k, v)):
                kept[:, :, self.columns] = new
        return *self.buffers[layer], None, False


def fill_some(model, canvas, region, belief, draw, steps_left, steps, sampler, cache):
    """One step: writes some of the region (B, L) into the canvas, and returns what is believed of the rest.

    A token is drawn from the model's whole distribution, never taken from a belief. Only rows of which something
    is wanted are computed: those in which a token may be drawn, or, since a step renews beliefs, that have a hole.
    """
    hidden = region & (canvas == model.config.mask_id)
    where = sampler.candidates(hidden, steps_left, steps)
    remasked = sampler.remask(region & ~hidden, steps_left, steps)
    believing = model.believes and sampler.k > 0
    rows = ((canvas == model.config.mask_id) if believing else where).any(1)
    if rows.any():
        columns = slice(None)
        if cache is not None:
            rows, columns = torch.ones_like(rows), cache.columns if cache.buffers else columns

        def part(x):
            return x[rows][:, columns]

        states = model.hidden(part(canvas), cache, belief and Belief(*map(part, belief)))
        tokens, confidence = draw(states[part(where)])
        drawn = torch.zeros_like(canvas).masked_scatter(where, tokens)
        confidence = torch.zeros(canvas.shape, device=canvas.device).masked_scatter(where, confidence)
        keep = sampler.keep(where, drawn, confidence, steps_left)
        canvas[keep] = drawn[keep]
        belief = renew(
            belief, model.believe(states, part(canvas) == model.config.mask_id, sampler.k), rows, columns
        )
    if remasked is not None:
        canvas[remasked] = model.config.mask_id  # nothing is believed of them yet
    return belief


def renew(belief, new, rows, columns):
    """A belief with new values at `columns` of the rows (B,) that were computed; the others keep theirs."""
    if new is None or rows.all() and isinstance(columns, slice):
        return new
    if belief is None:  # the first pass: the other rows have no holes
        belief = Belief(*(x.new_zeros(len(rows), *x.shape[1:]) for x in new))
    belief = Belief(*(x.clone() for x in belief))
    for kept, x in zip(belief, new):
        if isinstance(columns, slice):
            kept[rows] = x
        else:
            kept[:, columns] = x
    return belief
