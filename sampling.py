"""Generation: one `generate` for all architectures.

A causal model decodes from left to right with a KV cache. The diffusion architectures denoise masked positions,
wherever they are: a prompt is what is visible, so a continuation and an infilling are the same call.
"""

from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
import torch.nn.functional as F

from lm.caches import BlockCache, KVCache
from lm.draw import certainty_of, check_numbers, confidence_of, restrict, sample_tokens, uniform_numbers
from lm.layers import check, check_setting
from lm.speculation import speculate
from model import Belief

SAMPLERS = 'first_hitting ancestral confidence blocks threshold entropy remdm speculative'.split()
CHECK_EVERY = 16  # tokens between questions to a GPU whether all rows have stopped: each waits for it


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, **options):
    """Continue each of `prompts` (lists of token ids, not empty) by max_new_tokens tokens.

    Returns lists of ids: the prompt, what follows, and the stop token if one ended it early. A prompt holds at most
    block_size tokens; a longer text continues with the last half of the block as its context. Diffusion also fills each
    <|mask|> within a prompt; with max_new_tokens=0 it does only that. options: the fields of `Sampler`. Raises
    ValueError for wrong ones.
    """
    sampler = Sampler(model, **options)
    check_prompts(model, prompts, sampler)
    check(max_new_tokens >= 0, f'max_new_tokens is {max_new_tokens}; it must be at least 0.')
    training = model.training
    model.eval()
    try:
        if model.causal:
            return generate_left_to_right(model, prompts, max_new_tokens, sampler)
        if sampler.sampler == 'speculative':
            return [speculate(model, prompt, max_new_tokens, sampler) for prompt in prompts]
        rows, shapes = [None] * len(prompts), [sampler.shape(prompt) for prompt in prompts]
        for shape in sorted(set(shapes)):  # rows of one shape share their forward passes
            same = [i for i, other in enumerate(shapes) if other == shape]
            batch = torch.tensor([prompts[i] for i in same], device=model.embedding.weight.device)
            write = generate_by_blocks if sampler.is_causal(batch) else generate_by_denoising
            for i, row in zip(same, write(model, batch, max_new_tokens, sampler)):
                rows[i] = sampler.truncate(row, len(prompts[i]))
        return rows
    finally:
        model.train(training)


def check_prompts(model, prompts, sampler):
    block_size, mask_id = model.config.block_size, model.config.mask_id
    left_to_right = model.causal or sampler.sampler == 'speculative'
    for prompt in prompts:
        check(len(prompt) > 0, 'A prompt is empty; start it with <|endoftext|> for a new text.')
        fits = len(prompt) <= block_size
        check(fits, f'The prompt has {len(prompt)} tokens, but block_size={block_size}; shorten it.')
        remedy = 'see fill_left_to_right' if model.causal else 'choose another sampler'
        fits = not left_to_right or mask_id not in prompt
        check(fits, f'The prompt holds <|mask|>, which is not filled from left to right; {remedy}.')


# ---------------------------------------------------------------------------- left to right


def generate_left_to_right(model, prompts, max_new_tokens, sampler):
    """Decode in windows of at most block_size tokens."""
    rows, starts = [list(prompt) for prompt in prompts], [0] * len(prompts)
    block_size, left, running = model.config.block_size, max_new_tokens, [True] * len(prompts)
    while left > 0 and any(running):
        texts, sampler.start = [row[start:] for row, start in zip(rows, starts)], starts[0]
        new = min(left, block_size + 1 - max(map(len, texts)))  # until a row is past the block
        for i, more in enumerate(decode(model, texts, new, running, sampler)):
            rows[i] += more
            running[i] = running[i] and sampler.stop_tokens.isdisjoint(more)
            if len(rows[i]) - starts[i] > block_size:
                starts[i] = len(rows[i]) - max(1, block_size // 2)
        left -= new
    return [sampler.truncate(row, len(prompt)) for row, prompt in zip(rows, prompts)]


def decode(model, texts, new, running, sampler):
    """Decode `new` tokens after each of `texts`, as lists; fewer only once all rows that are `running` have stopped."""
    device, options = model.embedding.weight.device, sampler.options
    uniform = uniform_numbers((new, len(texts)), sampler.rng, device) if sampler.draws else [None] * new
    size = -(-(max(map(len, texts)) + new - 1) // 64) * 64  # few different ones: each is compiled anew
    cache = KVCache(len(texts), size, device)
    position, score = sampler.start + len(texts[0]), confidence_of if sampler.watch else None
    tokens, scores = sample_tokens(model, prefill(model, texts, cache), uniform[0], options, score)
    written, step = [tokens], decode_step
    sampler.tell(position, tokens, scores)
    if sampler.compile:
        cache.fix()
        step = torch.compile(decode_step, mode='reduce-overhead')  # on a GPU a CUDA graph
    running, stops = torch.tensor(running, device=device), torch.tensor([*sampler.stop_tokens], device=device)
    for i in range(1, new):
        running &= (tokens[:, None] != stops).all(1)
        if (device.type == 'cpu' or i % CHECK_EVERY == 0) and not running.any():
            break
        # A row that has stopped goes on as well: shapes stay the same.
        tokens, scores = step(model, cache, tokens, uniform[i], options, score)
        tokens = tokens.clone()
        written.append(tokens)
        sampler.tell(position + i, tokens, scores)
    return torch.stack(written, 1).tolist()


def prefill(model, texts, cache):
    """Compute the hidden states (B, C) after `texts`, lists of ids of any lengths, filling an empty cache."""
    lengths = [len(text) for text in texts]
    padded = [text + [0] * (max(lengths) - len(text)) for text in texts]
    hidden = model.hidden(torch.tensor(padded, device=cache.lengths.device), cache=cache)  # (B, T, C)
    cache.advance(lengths)
    return hidden[torch.arange(len(texts), device=hidden.device), cache.lengths - 1]


def decode_step(model, cache, tokens, uniform, options, score):
    """Read one token (B,) of each row, which follows what the cache holds, and sample the next (B,), with its score."""
    hidden = model.hidden(tokens[:, None], cache=cache)[:, 0]
    cache.advance(1)
    return sample_tokens(model, hidden, uniform, options, score)


def fill_left_to_right(model, rows, seed=0, **options):
    """Fill each run of <|mask|> in `rows`, lists of ids, after what stands before it: all that a causal model can do.

    It does not see what follows. The likeliest of several fillings, by `model.nll`, is the one that fits it best.
    """
    rows, mask_id = [list(row) for row in rows], model.config.mask_id
    while left := [row for row in rows if mask_id in row]:
        starts = [row.index(mask_id) for row in left]
        lengths = [len([*takewhile(mask_id.__eq__, row[i:])]) for row, i in zip(left, starts)]
        heads = [row[:start] for row, start in zip(left, starts)]
        written = generate(model, heads, max(lengths), seed=seed, **options)
        for row, start, length, text in zip(left, starts, lengths, written):
            row[start : start + length] = text[start : start + length]
        seed += 1
    return rows


# ---------------------------------------------------------------------------- denoising


@dataclass
class Sampler:
    """How tokens are drawn and, of diffusion, which masked positions are filled in a step.

    first_hitting         one per step, in random order: ancestral in the limit of many steps (Zheng et al. 2024)
    ancestral             each with the same probability, so that the order is random (MDLM)
    confidence, blocks    the most confident, an equal share of them in each step (LLaDA); within blocks of block_length
    threshold             all that are more confident than the threshold, one at least (Fast-dLLM)
    entropy               the least uncertain while their entropies but the largest add up to at most the threshold, in
                          nats: what it costs to sample them independently is less (Ben-Hamu et al. 2025, EB-Sampler)
    remdm                 like ancestral, and written tokens are masked again with probability eta at most (ReMDM)
    speculative           blocks drafted in a pass and checked by the ar model in a model with ar_weight: its samples

    Where the most confident come first, a text's end and its padding come last, from left to right: a model is sure of
    these before it is of the text. A name of your own in SAMPLERS needs a branch in `to_sample` and in `to_keep`.
    """

    model: object
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = None  # sample among the k likeliest tokens
    top_p: float = None  # sample among the fewest tokens that have probability p together
    stop_tokens: tuple = ()
    seed: int = 0
    stream: object = None  # called with the new ids of each row, lists, as they are written left to right
    # Called after each step as watch(start, x (B, L), confidence (B, L), belief or None): the tokens of the window from
    # position `start` of the first row on, and how sure the model is of those just written, else 0. Beliefs of an sdd
    # that are not carried on cost a pass of the head: only where the call has the attribute shows_beliefs.
    watch: object = None
    compile: bool = False  # causal: compile the decode step; the first text waits for that
    sampler: str = ''  # '': first_hitting, of which the NELBO is a bound; where steps are given, ancestral
    # For the masked positions of a window, or of all blocks together, at least one per block; None: one per position.
    steps: int = None
    block_length: int = None  # of `blocks`, 32; of a model trained on blocks: one of its own, 0 the whole row
    threshold: float = None  # of `threshold` a probability, 0.9; of `entropy` nats, 0.3
    eta: float = 0.1  # of `remdm`
    k: int = None  # candidates of `SDD` per masked position, 0: none; None: the model's own number
    # `SDD`: a pass before each step gives its beliefs, at twice the cost; False: the step before gives them; None: a
    # pass with first_hitting, as the two-pass NELBO assumes.
    fresh_beliefs: bool = None

    def __post_init__(self):
        self.sampler = self.sampler or ('ancestral' if self.steps else 'first_hitting')
        check(self.sampler in SAMPLERS, f'sampler is {self.sampler!r}; choose {", ".join(SAMPLERS)}.')
        by_entropy = self.sampler == 'entropy'
        config, own = self.model.config, self.model.config.block_length
        self.score, most = (certainty_of, torch.inf) if by_entropy else (confidence_of, 1)
        if self.threshold is None:
            self.threshold = 0.3 if by_entropy else 0.9
        drafts = self.sampler == 'speculative'
        if self.block_length is None:
            self.block_length = own[0] if any(own) and not drafts else next(filter(None, own), 32)
        fits = self.temperature == 0 or 1e-3 <= self.temperature <= 1e3
        check_setting(self, 'temperature', fits, '0, or between 0.001 and 1000')
        check_setting(self, 'top_k', self.top_k is None or self.top_k >= 1, 'at least 1, or None')
        fits = self.top_p is None or 0 < self.top_p <= 1
        check_setting(self, 'top_p', fits, 'above 0 and at most 1, or None')
        check_setting(self, 'steps', self.steps is None or self.steps >= 1, 'at least 1, or None')
        check_setting(self, 'threshold', 0 <= self.threshold <= most, f'between 0 and {most}')
        check_setting(self, 'eta', 0 <= self.eta <= 1, 'between 0 and 1')
        check_setting(self, 'k', self.k is None or self.k >= 0, 'at least 0, or None')
        fits = self.block_length in own if any(own) else self.block_length >= 1
        trained = f'one that this model was trained on, {", ".join(map(str, own))}'
        check_setting(self, 'block_length', fits, trained if any(own) else 'at least 1')
        of_itself = {'first_hitting': ['steps'], 'speculative': ['steps', 'k', 'fresh_beliefs']}
        for name in of_itself.get(self.sampler, ()):
            useless = f'with sampler={self.sampler!r}, {name}={getattr(self, name)} has no effect'
            check(getattr(self, name) is None, f'{useless}; leave it out, or choose another sampler.')
        if drafts:
            remedy = 'train with --ar_weight and --block_length'
            check(config.ar_weight, f"sampler='speculative' needs an ar model; {remedy}.")
            check(self.block_length, "sampler='speculative' drafts blocks; block_length=0 is the whole row.")

        self.rng, self.start = torch.Generator().manual_seed(self.seed), 0
        self.stop_tokens = set(self.stop_tokens)
        self.options, self.draws = (self.temperature, self.top_k, self.top_p), self.temperature > 0
        self.own_blocks, self.mask_id = own, config.mask_id
        self.k = config.k if self.k is None else self.k
        if self.fresh_beliefs is None:
            self.fresh_beliefs = self.sampler == 'first_hitting'
        self.carries_beliefs = self.model.has_beliefs and self.k > 0 and not self.fresh_beliefs
        self.tells_beliefs = self.carries_beliefs or getattr(self.watch, 'shows_beliefs', False)
        self.ends = [token for token in (*self.stop_tokens, config.ignore_id) if token is not None]

    def tell(self, start, new, confidence=None):
        """Hand on new tokens (B, T) or (B,) from position `start` on, and how sure the model is of its own."""
        new = new.view(len(new), -1)
        if self.stream:
            self.stream(new.tolist())
        if self.watch and confidence is not None:
            self.watch(start, new, confidence.view_as(new), None)

    def truncate(self, row, start=0):
        """Return a row up to its first stop token from position `start` on, that token included."""
        ends = (i + 1 for i in range(start, len(row)) if row[i] in self.stop_tokens)
        return row[: next(ends, None)]

    def all_stopped(self, new):
        return not any(map(self.stop_tokens.isdisjoint, new.tolist()))

    def shape(self, prompt):
        """Return what prompts that are written together have in common: their length and, where steps or blocks are
        shared out among all masked positions, these. So a text does not depend on those beside it."""
        has_blocks = any(self.own_blocks)
        own_steps = self.sampler in ('ancestral', 'remdm') and not self.steps  # as many as there are gaps
        by_gaps = self.sampler == 'blocks' or own_steps or (has_blocks and self.steps)
        gaps = [i for i, token in enumerate(prompt) if token == self.mask_id]
        return len(prompt), has_blocks and len(gaps) > 0, *(gaps if by_gaps else [])

    def is_causal(self, prompts):
        """Say whether to write block after block: not what a model fills that was trained on whole rows as well."""
        infills = 0 in self.own_blocks and (prompts == self.mask_id).any()
        return any(self.own_blocks) and 0 < self.block_length < self.model.config.block_size and not infills

    def bernoulli(self, where, probability):
        """Choose each position of `where` (B, L) with this probability."""
        uniform = torch.rand(where.shape, dtype=torch.float64, generator=self.rng)
        return where & (uniform < probability).to(where.device)

    def to_remask(self, written, steps_left, steps):
        """Choose which of the positions `written` (B, L) so far are masked again; None: no position."""
        if self.sampler == 'remdm':
            return self.bernoulli(written, remdm_rates(steps_left, steps, self.eta)[0])

    def to_sample(self, masked, steps_left, steps):
        """Choose where to sample (B, L): at random, or everywhere, to see where the model is confident."""
        if self.sampler == 'first_hitting':
            uniform = torch.rand(masked.shape, dtype=torch.float64, generator=self.rng)
            first = uniform.masked_fill(~masked.cpu(), -1).argmax(1, keepdim=True).to(masked.device)
            return masked & torch.zeros_like(masked).scatter(1, first, True)
        if self.sampler == 'ancestral':
            return self.bernoulli(masked, 1 / steps_left)
        if self.sampler == 'remdm':
            return self.bernoulli(masked, remdm_rates(steps_left, steps, self.eta)[1])
        return masked

    def to_keep(self, where, tokens, score, steps_left):
        """Choose which of the positions `where` (B, L) keep their tokens, given how sure the model is of each."""
        if self.sampler in ('first_hitting', 'ancestral', 'remdm') or steps_left == 1:
            return where
        last = -1e3 - torch.arange(where.size(1), device=where.device)
        for token in self.ends:
            score = torch.where(tokens == token, last, score)
        score = score.masked_fill(~where, -1e6)
        ordered, order = score.sort(1, descending=True)
        rank = order.argsort(1)
        if self.sampler == 'threshold':
            return where & ((score > self.threshold) | (rank == 0))
        if self.sampler == 'entropy':
            return where & ((ordered - ordered.cumsum(1)).gather(1, rank) <= self.threshold)
        return where & (rank < -(-where.sum(1, keepdim=True) // steps_left))

    def fill_after_end(self, x, tail):
        """Write the padding of rows x (B, L) that have ended: a stop token in their tail has no mask before it."""
        for token in () if self.sampler == 'remdm' else self.stop_tokens:  # remdm may mask it again
            masked = x == self.mask_id
            ended = (tail & (x == token) & (masked.cumsum(1) == 0)).cummax(1).values
            x[ended & masked] = token

    def probabilities(self, logits):
        """Compute what tokens are drawn with (N, V) from logits (N, V); at temperature 0 all is on the likeliest."""
        check_numbers(logits)
        logits = logits.cpu() if logits.device.type == 'mps' else logits  # which has no float64
        if not self.draws:
            return F.one_hot(logits.argmax(-1), logits.size(-1)).double()
        p = restrict(logits.double(), *self.options)
        return p / p.sum(-1, keepdim=True)


def remdm_rates(steps_left, steps, eta):
    """Compute the probabilities to mask a written token and to reveal a masked one (Wang et al. 2025, ReMDM-cap).

    α is the share that is visible, α_t now and α_s after the step: mask with σ = min(η, (1 − α_s) / α_t), reveal
    with (α_s − (1 − σ) α_t) / (1 − α_t).
    """
    now, after = 1 - steps_left / steps, 1 - (steps_left - 1) / steps
    sigma = min(eta, (1 - after) / now) if now > 0 else 0.0
    return sigma, (after - (1 - sigma) * now) / (1 - now)


def generate_by_denoising(model, rows, max_new_tokens, sampler):
    """Continue prompts of one length, rows (B, L), by windows of at most block_size tokens."""
    block_size, mask_id = model.config.block_size, model.config.mask_id
    prompt_length, left = rows.size(1), max_new_tokens
    while True:
        infills = (rows == mask_id).any()  # within the prompt, before a full one gives way to new tokens
        whole = rows.size(1) + min(left, 1) <= block_size or infills
        context = min(rows.size(1), block_size if whole else block_size // 2)
        new = min(left, block_size - context)
        sampler.start = rows.size(1) - context
        rows = F.pad(rows, (0, new), value=mask_id)
        denoise(model, rows[:, sampler.start :], sampler)
        left -= new
        sampler.tell(rows.size(1) - new, rows[:, rows.size(1) - new :])
        if left == 0 or sampler.all_stopped(rows[:, prompt_length:]):
            return rows.tolist()


def generate_by_blocks(model, rows, max_new_tokens, sampler):
    """Continue prompts of one length, rows (B, L), and fill what they mask, block after block over a cache.

    Past block_size the last half of it is the context. A row is written to the end of the block in which it stops.
    """
    length, prompt_length, block_size = sampler.block_length, rows.size(1), model.config.block_size
    size = prompt_length + max_new_tokens
    problem = f'Of rows of {block_size} tokens, blocks of {length} leave no room for what comes before them'
    fits = size <= block_size // length * length or 2 * length <= block_size
    check(fits, f'{problem}; ask for at most {block_size // length * length - prompt_length} tokens.')
    rows = F.pad(rows, (0, -(-size // length) * length - prompt_length), value=sampler.mask_id)
    begins = [i for i in range(0, rows.size(1), length) if (rows[:, i : i + length] == sampler.mask_id).any()]
    lengths = [min(length, size - begin) for begin in begins]
    steps = share_steps(sampler.steps, lengths) if sampler.steps else [None] * len(begins)
    new_cache = partial(BlockCache, min(rows.size(1), block_size), rows.device)
    start, cache = 0, new_cache()
    for begin, block_steps in zip(begins, steps):
        if begin + length - start > block_size:
            start, cache = begin - block_size // 2 // length * length, new_cache()
        cache.waiting = rows[:, start + cache.length : begin]
        sampler.start = begin
        denoise(model, rows[:, begin : begin + length], sampler, block_steps, cache)
        first = max(begin, prompt_length)
        sampler.tell(first, rows[:, first : min(begin + length, size)])
        if sampler.all_stopped(rows[:, prompt_length:size]):
            break
    return rows[:, :size].tolist()


def denoise(model, x, sampler, steps=None, cache=None):
    """Fill each <|mask|> of x (B, L), in place: all together or, for sampler 'blocks', block by block from the left."""
    masked = x == model.config.mask_id
    columns = masked.any(0).nonzero().squeeze(1)  # where any row has a mask
    if len(columns) == 0:
        return
    by_blocks = sampler.sampler == 'blocks' and not cache and sampler.block_length
    blocks = columns.split(sampler.block_length) if by_blocks else [columns]
    shares = share_steps(steps or sampler.steps or len(columns), [len(block) for block in blocks])
    belief = None  # of all masked positions, also of those whose block comes later
    tail = masked.flip(1).cummin(1).values.flip(1)  # new text: nothing that is given follows
    for block, steps in zip(blocks, shares):
        region = torch.zeros_like(masked)
        region[:, block] = masked[:, block]
        for steps_left in range(steps, 0, -1):  # the last step takes what is left
            belief, confidence = denoise_step(model, x, region, belief, steps_left, steps, sampler, cache)
            sampler.fill_after_end(x, tail)
            if sampler.watch:
                sampler.watch(sampler.start, x, confidence, belief)


def share_steps(steps, lengths):
    """Share steps among blocks in proportion to their lengths: `steps` in all, one at least for each."""
    shares = []
    for i, length in enumerate(lengths):
        share = round(steps * length / sum(lengths[i:]))  # of what is left
        shares.append(max(1, min(share, steps - len(lengths[i + 1 :]))))
        steps -= shares[-1]
    return shares


def denoise_step(model, x, region, belief, steps_left, steps, sampler, cache=None):
    """Write some of the region (B, L) into x (B, L); return the belief of what stays masked, and the confidence (B, L).

    Tokens are always sampled from the full output distribution; beliefs are only an input. Only rows that need it are
    computed: those in which a token may be sampled or, where a step renews beliefs for the next, that have a mask.
    """
    mask_id = model.config.mask_id
    masked = region & (x == mask_id)
    where = sampler.to_sample(masked, steps_left, steps)
    remasked = sampler.to_remask(region & ~masked, steps_left, steps)
    rows = ((x == mask_id) if sampler.carries_beliefs else where).any(1)
    confidence = torch.zeros(x.shape, device=x.device)
    if cache:  # which holds all rows
        rows[:] = rows.any()
    if rows.any():
        if sampler.fresh_beliefs:
            hidden, _ = model.denoiser(x[rows], cache=cache, k=sampler.k)
        else:
            given = belief and Belief(*(values[rows] for values in belief))
            hidden, _ = model.predict(x[rows], cache=cache, belief=given)
        states = hidden[where[rows]]  # (N, C)
        uniform = uniform_numbers((len(states),), sampler.rng, x.device) if sampler.draws else None
        tokens, score = sample_tokens(model, states, uniform, sampler.options, sampler.score)
        drawn = torch.zeros_like(x).masked_scatter(where, tokens)
        score = confidence.masked_scatter(where, score)
        kept = sampler.to_keep(where, drawn, score, steps_left)
        x[kept] = drawn[kept]
        confidence = torch.where(kept, score.exp() if sampler.sampler == 'entropy' else score, 0)
        if sampler.tells_beliefs:
            new_belief = model.top_k_belief(hidden, x[rows] == mask_id, sampler.k)
            belief = update_belief(belief, new_belief, rows)
    if remasked is not None:
        x[remasked] = mask_id  # without a belief
    return belief, confidence


def update_belief(belief, new, rows):
    """Return a belief with new values for the rows (B,) that were computed."""
    if new is None or rows.all():
        return new
    if belief is None:  # the first pass: the other rows have no mask
        belief = Belief(*(x.new_zeros(len(rows), *x.shape[1:]) for x in new))
    return Belief(*(old.index_put((rows,), x) for old, x in zip(belief, new)))
