"""Generation, on models small enough to enumerate."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_drawn_from, random_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import model as model_module
from model import ARCHITECTURES, Diffusion, ModelConfig
from sampling import SAMPLERS, generate, remdm_rates, restrict, sample_tokens, uniform_numbers

MASK, IGNORE, BLOCK = 10, 9, 12
SHAPE = dict(vocab_size=11, block_size=BLOCK, n_layer=2, n_head=4, n_embd=32, mask_id=MASK, ignore_id=IGNORE)
LEARNED = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False)
EQUAL, UNEQUAL = [[1, 2, 3], [4, 5, 6]], [[7], [1, 2, 3, 4, 5], [3, 3], list(range(9)) + [1, 2, 3]]


def tiny(architecture, **changes):
    return random_model(architecture, 0.3, **{**SHAPE, **changes})


def watch(model):
    """A list that every forward pass from now on adds its tokens to."""
    seen, hidden = [], model.hidden

    def watched(tokens, doc_ids=None, cache=None, belief=None):
        seen.append(tokens.clone())
        return hidden(tokens, doc_ids, cache, belief)

    model.hidden = watched
    return seen


# ---------------------------------------------------------------------------- left to right


@torch.no_grad()
def write_greedily(model, prompt, max_new_tokens):
    """One row, token by token, without a cache; past the block, the last half of it is the context."""
    row, start = list(prompt), 0
    for _ in range(max_new_tokens):
        if len(row) - start > model.config.block_size:
            start = len(row) - model.config.block_size // 2
        row.append(int(model.logits(torch.tensor([row[start:]]))[0, -1].argmax()))
    return row


@pytest.mark.parametrize('prompts', [EQUAL, UNEQUAL], ids=['equal', 'unequal'])
@pytest.mark.parametrize(
    'changes',
    [{}, LEARNED, {'n_kv_head': 2}, {'n_kv_head': 1, **LEARNED}],
    ids=['rope', 'learned', 'grouped', 'learned-grouped'],
)
def test_greedy_text_is_the_same_with_and_without_cache(changes, prompts):
    model = tiny('ar', vocab_size=200, **changes)
    expected = [write_greedily(model, prompt, 3 * BLOCK) for prompt in prompts]
    assert all(len(set(row)) > 6 for row in expected)  # a text that could go wrong
    for use_cache in (True, False):
        assert generate(model, prompts, 3 * BLOCK, temperature=0, use_cache=use_cache) == expected


@pytest.mark.parametrize('prompts', [EQUAL, UNEQUAL], ids=['equal', 'unequal'])
def test_drawn_text_is_the_same_with_and_without_cache(prompts):
    cached, read_again = (generate(tiny('ar'), prompts, 3 * BLOCK, use_cache=use) for use in (True, False))
    assert cached == read_again


def test_cache_reads_one_token_at_a_time():
    model = tiny('ar')
    seen = watch(model)
    generate(model, [[1, 2, 3]], 2 * BLOCK, temperature=0)
    assert [x.size(1) for x in seen] == [3] + [1] * 9 + [6] + [1] * 6 + [6] + [1] * 6
    seen.clear()
    generate(model, [[1, 2, 3]], 4, temperature=0, use_cache=False)
    assert [x.size(1) for x in seen] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    'changes, prompts',
    [({}, EQUAL), ({'n_kv_head': 2, **LEARNED}, UNEQUAL)],
    ids=['equal', 'learned-grouped-unequal'],
)
def test_the_compiled_step_writes_the_same_and_is_compiled_once(changes, prompts, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    backend, compile = CompileCounterWithBackend('aot_eager'), torch.compile
    monkeypatch.setattr(torch, 'compile', lambda step, mode: compile(step, backend=backend))
    model = tiny('ar', vocab_size=200, **changes)
    for options in ({}, {'seed': 1}, {'seed': 2, 'stop_tokens': [7]}):
        expected = generate(model, prompts, 3 * BLOCK, **options)
        assert generate(model, prompts, 3 * BLOCK, compile=True, **options) == expected
    assert backend.frame_count == 1 and not counters['graph_break']


def test_a_batch_of_more_rows_than_logits_at_once_draws_the_same(monkeypatch):
    model, prompts = tiny('ar'), [[i] for i in range(9)]
    expected = generate(model, prompts, 20)
    monkeypatch.setattr(model_module, 'LOGITS_PER_CHUNK', 64 * 2)
    assert generate(model, prompts, 20) == expected


def test_a_block_of_one_token_can_be_gone_past():
    for architecture in ARCHITECTURES:
        (row,) = generate(tiny(architecture, block_size=1), [[4]], 3)
        assert row[0] == 4 and len(row) == 4 and MASK not in row


def test_stop_token_ends_its_row_and_no_other():
    model, prompts = tiny('ar'), [[1, 2, 3], [4, 5, 6], [7, 8, 1], [2, 2, 2]]
    rows = generate(model, prompts, 9, temperature=0)
    stop = rows[0][5]
    expected = [row[: 3 + row[3:].index(stop) + 1] if stop in row[3:] else row for row in rows]
    assert len({len(row) for row in expected}) > 1 and max(map(len, expected)) == 12
    for use_cache in (True, False):
        assert generate(model, prompts, 9, temperature=0, stop_tokens=[stop], use_cache=use_cache) == expected
    assert generate(model, [[1, 2, stop]], 9, temperature=0, stop_tokens=[stop])[0][:3] == [1, 2, stop]


def test_generation_ends_when_every_row_has_stopped():
    model = tiny('ar')
    seen = watch(model)
    rows = generate(model, EQUAL, 40, stop_tokens=range(IGNORE))
    assert len(seen) == 1 and [row[:3] for row in rows] == EQUAL and all(len(row) == 4 for row in rows)


# ---------------------------------------------------------------------------- drawing

FOUR = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64)


@pytest.mark.parametrize(
    'options, expected',
    [
        ((1.0, None, None), [0.15, 0.5, 0.05, 0.3]),
        ((0.5, None, None), [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),  # p² over its sum
        ((1.0, 1, None), [0, 1, 0, 0]),
        ((1.0, 2, None), [0, 0.625, 0, 0.375]),
        ((1.0, 9, None), [0.15, 0.5, 0.05, 0.3]),
        ((1.0, None, 0.01), [0, 1, 0, 0]),
        ((1.0, None, 0.49), [0, 1, 0, 0]),
        ((1.0, None, 0.51), [0, 0.625, 0, 0.375]),
        ((1.0, None, 0.79), [0, 0.625, 0, 0.375]),
        ((1.0, None, 0.81), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ((1.0, None, 1.0), [0.15, 0.5, 0.05, 0.3]),
        ((1.0, 2, 0.6), [0, 1, 0, 0]),  # 0.625 of the two likeliest is enough
        ((0.5, None, 0.68), [0, 1, 0, 0]),  # and 0.685 of the sharpened four
    ],
)
def test_top_k_and_the_smallest_nucleus_by_hand(options, expected):
    kept = restrict(FOUR.log(), *options)
    torch.testing.assert_close(kept / kept.sum(), torch.tensor([expected], dtype=torch.float64))


def states_of(model, rows):
    with torch.no_grad():
        return model.hidden(torch.tensor([[1, 2, 3]]))[0, -1].expand(rows, -1)


def draw(model, states, options):
    """Tokens (N,) and their probabilities (N,)."""
    generator = torch.Generator().manual_seed(0)
    uniform = uniform_numbers((len(states),), generator, states.device) if options[0] else None
    return sample_tokens(model, states, uniform, options, confidence=True)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('options', [(1.0, None, None), (0.7, None, None), (1.5, 4, None), (1.0, None, 0.8)])
def test_draws_follow_the_probabilities(architecture, options, monkeypatch):
    monkeypatch.setattr(model_module, 'LOGITS_PER_CHUNK', 64 * 999)  # in parts
    model = tiny(architecture)
    states = states_of(model, 20000)
    tokens, confidence = draw(model, states, options)
    logits = model.head(states[:1]).double()
    kept = restrict(logits, *options)[0]
    assert_drawn_from(kept / kept.sum(), tokens)  # <|mask|>, padding and, for ar, <|ignore|> have 0
    assert (kept[MASK:] == 0).all() and len(set(tokens.tolist())) > 2
    torch.testing.assert_close(confidence, logits.softmax(-1)[0, tokens].float())


@pytest.mark.parametrize('options', [(0, None, None), (1.0, 1, None), (1.0, None, 1e-9)], ids=['0', 'k', 'p'])
def test_the_likeliest_token_in_three_ways(options):
    model = tiny('ar')
    with torch.no_grad():
        states = model.hidden(torch.randint(0, IGNORE, (20, BLOCK))).flatten(0, 1)
    tokens, confidence = draw(model, states, options)
    probabilities = model.head(states).softmax(-1).detach()
    assert torch.equal(tokens, probabilities.argmax(-1))
    torch.testing.assert_close(confidence, probabilities.amax(-1))


@pytest.mark.parametrize('uniform', [0.0, 1 - 2**-53])
def test_no_uniform_number_gives_an_impossible_token(uniform):
    model = tiny('ar')
    states = states_of(model, 1)
    possible = model.head(states).topk(2).indices[0].sort().values
    assert possible[0] > 0  # something impossible lies on both sides
    token = sample_tokens(model, states, torch.tensor([uniform], dtype=torch.float64), (1.0, 2, None))
    assert token == (possible[0] if uniform == 0 else possible[1])


# ---------------------------------------------------------------------------- both


@pytest.mark.parametrize('sampler', SAMPLERS[:-1])
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_a_seed_is_a_text(architecture, sampler):
    model = tiny(architecture)
    first, again, other = (generate(model, EQUAL, 12, seed=seed, sampler=sampler) for seed in (1, 1, 2))
    assert first == again and first != other
    torch.manual_seed(5)  # the state of torch's own generator is neither used nor moved
    before = torch.get_rng_state()
    assert generate(model, EQUAL, 12, seed=1, sampler=sampler) == first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('training', [True, False])
def test_generation_is_without_dropout_and_leaves_the_mode_as_it_was(architecture, training):
    expected = generate(tiny(architecture), EQUAL, 20)
    model = tiny(architecture, dropout=0.5).train(training)
    assert generate(model, EQUAL, 20) == expected
    assert model.training is training and model.blocks[0].dropout.training is training
    with pytest.raises(RuntimeError, match='broken'):
        generate(break_hidden(model), EQUAL, 20)
    assert model.training is training


def break_hidden(model):
    def broken(*_, **__):
        raise RuntimeError('broken')

    model.hidden = broken
    return model


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_nothing_to_write_gives_the_prompts_back(architecture):
    full = list(range(8)) + [1, 2, 3, 4]
    assert generate(tiny(architecture), [[1], full], 0) == [[1], full]


@pytest.mark.parametrize(
    'architecture, prompt, options, named',
    [
        ('ar', [1] * 13, {}, '13 tokens.*block_size=12'),
        ('diffusion', [1] * 13, {}, '13 tokens.*block_size=12'),
        ('ar', [], {}, 'prompt is empty'),
        ('diffusion', [], {}, 'prompt is empty'),
        ('ar', [1, MASK, 2], {}, r'<\|mask\|>'),
        ('ar', [1], {'sampler': 'greedy'}, "sampler is 'greedy'.*ancestral, confidence, "),
        ('diffusion', [1], {'sampler': 'greedy'}, "sampler is 'greedy'.*ancestral, confidence, "),
        ('diffusion', [1], {'max_new_tokens': -1}, 'max_new_tokens is -1; '),
        ('ar', [1], {'temperature': -0.5}, 'temperature is -0.5; '),
        ('ar', [1], {'top_k': 0}, 'top_k is 0; '),
        ('ar', [1], {'top_p': 0.0}, 'top_p is 0.0; '),
        ('ar', [1], {'top_p': 1.5}, 'top_p is 1.5; '),
        ('diffusion', [1], {'steps': 0}, 'steps is 0; '),
        ('diffusion', [1], {'sampler': 'first_hitting', 'steps': 3}, 'so steps=3 has no effect'),
        ('diffusion', [1], {'block_length': 0}, 'block_length is 0; '),
        ('diffusion', [1], {'sampler': 'speculative'}, 'needs an ar model to check; train with --ar_weight'),
        ('diffusion', [1], {'threshold': 2.0}, 'threshold is 2.0; '),
        ('diffusion', [1], {'eta': -0.1}, 'eta is -0.1; '),
    ],
)
def test_what_cannot_be_continued_is_refused_in_a_sentence(architecture, prompt, options, named):
    with pytest.raises(ValueError, match=named) as error:
        generate(tiny(architecture), [[1, 2], prompt], **{'max_new_tokens': 4, **options})
    assert str(error.value).endswith('.')


# ---------------------------------------------------------------------------- filling

MASKED = [[1, MASK, 3, MASK, MASK, 6], [MASK, 2], [5, 6, 7, 8, MASK, 1], [4], [MASK] * 12]


@pytest.mark.parametrize('max_new_tokens', [0, 5, 30])
@pytest.mark.parametrize('sampler', SAMPLERS[:-1])
def test_every_hidden_position_is_filled_and_no_other(sampler, max_new_tokens):
    model = tiny('diffusion')
    rows = generate(model, MASKED, max_new_tokens, sampler=sampler, block_length=2, eta=1.0)
    for prompt, row in zip(MASKED, rows, strict=True):
        assert len(row) == len(prompt) + max_new_tokens
        assert all(0 <= token < MASK for token in row)
        assert all(token in (given, MASK) or given == MASK for given, token in zip(prompt, row))
        assert [r for r, p in zip(row, prompt) if p != MASK] == [p for p in prompt if p != MASK]


@pytest.mark.parametrize('steps', [1, 3, 4, 6, 8, 40, None])
@pytest.mark.parametrize('sampler', SAMPLERS[1:-1])
def test_at_most_so_many_forward_passes_as_steps(sampler, steps):
    model = tiny('diffusion')
    seen = watch(model)
    rows = generate(model, [[1, 2, 3]] * 3, 8, sampler=sampler, steps=steps, block_length=3, eta=0.5)
    blocks = 3 if sampler == 'blocks' else 1  # each needs one pass at least
    assert blocks <= len(seen) <= max(blocks, steps or 8)
    assert all(MASK not in row for row in rows)
    if sampler in ('confidence', 'blocks'):
        assert len(seen) == min(8, max(blocks, steps or 8))


def test_remdm_takes_more_steps_than_positions_when_asked():
    model = tiny('diffusion')
    seen = watch(model)
    generate(model, [[1]] * 20, 4, sampler='remdm', steps=30, eta=0.5)
    assert 15 < len(seen) <= 30


def test_blocks_fill_from_left_to_right():
    model = tiny('diffusion')
    seen = watch(model)
    generate(model, [[1, 2, 3], [4, 5, 6]], 9, sampler='blocks', block_length=3)
    assert len(seen) == 9
    for x in seen:
        left = (x[:, 3:] == MASK).unflatten(1, (3, 3)).sum(-1)  # (B, block)
        for row in left.tolist():
            assert sum(0 < n < 3 for n in row) <= 1 and row == sorted(row)


class Fixed(Diffusion):
    """Gives position i the token i with probability sure[i], and shares the rest among the others."""

    def hidden(self, tokens, doc_ids=None, cache=None, belief=None):
        sure = torch.tensor(self.sure[: tokens.size(1)])
        p = ((1 - sure) / (MASK - 1))[:, None].expand(-1, 64).clone()
        p[range(len(sure)), range(len(sure))] = sure
        return p.log().expand(len(tokens), -1, -1)

    def head(self, hidden):
        return hidden + self.logit_bias


def fixed(*sure):
    model = Fixed(ModelConfig(**SHAPE))
    model.sure = sure
    return model


def masks_seen(seen):
    return [(x[0] == MASK).nonzero().squeeze(1).tolist() for x in seen]


def test_confidence_writes_the_surest_first_in_equal_shares():
    model = fixed(0.9, 0.6, 0.95, 0.7, 0.8, 0.5, 0.99)
    seen = watch(model)
    assert generate(model, [[0]], 6, temperature=0, sampler='confidence', steps=3) == [list(range(7))]
    assert masks_seen(seen) == [[1, 2, 3, 4, 5, 6], [1, 3, 4, 5], [1, 5]]


def test_confidence_counts_the_holes_of_each_row():
    model = fixed(0.9, 0.6, 0.95, 0.7, 0.8)
    seen = watch(model)
    prompts = [[MASK, MASK, MASK, MASK], [0, MASK, 2, 3]]
    generate(model, prompts, 0, temperature=0, sampler='confidence', steps=2)
    assert [(x == MASK).sum(1).tolist() for x in seen] == [[4, 1], [2]]  # a finished row is not computed


def test_threshold_writes_what_is_sure_and_at_least_one():
    model = fixed(0.9, 0.6, 0.95, 0.7, 0.8, 0.5, 0.99)
    seen = watch(model)
    assert generate(model, [[0]], 6, temperature=0, sampler='threshold', threshold=0.75) == [list(range(7))]
    assert masks_seen(seen) == [[1, 2, 3, 4, 5, 6], [1, 3, 5], [1, 5], [5]]
    seen.clear()
    generate(model, [[0]] * 3, 6, temperature=0, sampler='threshold', threshold=0.0)
    assert len(seen) == 1


def test_threshold_writes_in_each_row_in_each_pass():
    model = tiny('diffusion')
    seen = watch(model)
    generate(model, EQUAL, 9, sampler='threshold', threshold=0.999)
    counts = torch.stack([(x == MASK).sum(1) for x in seen])
    assert len(seen) > 1 and (counts.diff(dim=0) < 0)[counts[:-1] > 0].all()


def test_first_hitting_writes_one_token_of_each_row_in_each_pass():
    model = tiny('diffusion')
    seen = watch(model)
    generate(model, [[1, 2, MASK], [MASK, 2, MASK]], 0)
    generate(model, [[1, MASK, 3, MASK]] * 50, 4)
    left = [(x == MASK).sum(1).tolist() for x in seen]
    assert left[:2] == [[1, 2], [1]] and left[2:] == [[n] * 50 for n in range(6, 0, -1)]
    assert len((seen[3] == MASK).unique(dim=0)) == 6  # in random order


@pytest.mark.parametrize('sampler', ['ancestral', 'remdm'])
def test_random_order_reveals_the_same_share_in_each_step(sampler):
    model = tiny('diffusion')
    seen = watch(model)
    generate(model, [[1]] * 400, 11, sampler=sampler, steps=5, eta=0.3)
    shares = [float((x[:, 1:] == MASK).float().mean()) for x in seen]
    assert shares == pytest.approx([1, 0.8, 0.6, 0.4, 0.2], abs=0.03)


def test_remdm_hides_again_what_it_wrote_and_never_what_was_given():
    model = tiny('diffusion')
    seen = []
    generate(
        model,
        [[1, 2, 3]] * 4,
        9,
        sampler='remdm',
        eta=0.5,
        watch=lambda step, x, belief: seen.append(x.clone()),
    )
    hidden = torch.stack(seen) == MASK  # (steps, B, L)
    assert (hidden[1:] & ~hidden[:-1]).any()
    assert not hidden[:, :, :3].any()


@pytest.mark.parametrize('steps', [1, 2, 7, 100])
@pytest.mark.parametrize('eta', [0.0, 0.1, 1.0])
def test_remdm_rates_are_probabilities_and_keep_the_schedule(steps, eta):
    for steps_left in range(steps, 0, -1):
        again, reveal = remdm_rates(steps_left, steps, eta)
        assert 0 <= again <= eta and 0 <= reveal <= 1 + 1e-12
        visible = 1 - steps_left / steps
        assert visible * (1 - again) + (1 - visible) * reveal == pytest.approx(visible + 1 / steps)
    assert (again, reveal) == (0, 1)  # the last step leaves nothing hidden


# ---------------------------------------------------------------------------- what is not computed again


def test_a_row_is_computed_only_in_steps_in_which_it_may_change():
    model, steps = tiny('diffusion'), []
    seen = watch(model)
    generate(model, [[1]] * 8, 4, steps=40, watch=lambda step, *_: steps.append(step))
    assert steps == list(range(1, 41))  # a step that computes nothing is a step
    assert 8 <= sum(map(len, seen)) <= 8 * 4  # each of them revealed a token at least
    seen.clear()
    model = tiny('sdd')
    seen = watch(model)
    generate(model, [[1]], 4, steps=40, sampler='threshold', threshold=0.0)
    assert len(seen) <= 4  # beliefs of nothing are not renewed


def test_diffusion_goes_on_past_the_block():
    model = tiny('diffusion')
    seen = watch(model)
    (row,) = generate(model, [[1, 2, 3, 4, 5]], 40, sampler='confidence', steps=2)
    assert len(row) == 45 and row[:5] == [1, 2, 3, 4, 5] and MASK not in row
    starts = [0, 6, 12, 18, 24, 30, 36]  # a window keeps the last half of the block before it
    windows = [x[0].tolist() for x in seen[::2]]
    assert len(windows) == len(starts)
    for start, window in zip(starts, windows):
        known = 5 if start == 0 else 6
        assert window == row[start : start + known] + [MASK] * (min(45, start + BLOCK) - start - known)


def test_rows_of_a_diffusion_batch_are_what_they_are_alone():
    model = tiny('diffusion')
    together = generate(model, MASKED, 10, temperature=0, sampler='confidence', steps=4)
    for prompt, row in zip(MASKED, together):
        assert generate(model, [prompt], 10, temperature=0, sampler='confidence', steps=4) == [row]


def test_stop_token_cuts_a_diffusion_row_after_the_prompt():
    model, prompts = tiny('diffusion'), [[1, 2, 3], [4, 5, 6], [7, 8, 1]]
    rows = generate(model, prompts, 9)
    stop = rows[0][6]
    expected = [row[: 3 + row[3:].index(stop) + 1] if stop in row[3:] else row for row in rows]
    assert len(expected[0]) <= 7 and generate(model, prompts, 9, stop_tokens=[stop]) == expected
    seen = watch(model)
    rows = generate(model, prompts, 400, stop_tokens=range(MASK), steps=1)
    assert len(seen) == 1 and all(len(row) == 4 for row in rows)  # no window after the one where all stopped


# ---------------------------------------------------------------------------- a perfect denoiser

LETTERS, LENGTH = 3, 3
HIDDEN = LETTERS  # the id of <|mask|>
TEXTS = list(product(range(LETTERS), repeat=LENGTH))  # 27
STATES = list(product(range(LETTERS + 1), repeat=LENGTH))  # 64, partly hidden


def toy_joint():
    """Probabilities (27,): the last letter is most often the sum of the others."""
    p = [(0.6, 0.3, 0.1)[a] * (0.92 if c == (a + b) % LETTERS else 0.04) / LETTERS for a, b, c in TEXTS]
    return torch.tensor(p, dtype=torch.float64)


def posteriors(p):
    """The probability (64, 3, 3) of each letter at each position, given what is visible in a state."""
    texts, table = torch.tensor(TEXTS), torch.zeros(len(STATES), LENGTH, LETTERS, dtype=torch.float64)
    for s, state in enumerate(torch.tensor(STATES)):
        fits = p * ((texts == state) | (state == HIDDEN)).all(1)
        for i, letter in product(range(LENGTH), range(LETTERS)):
            table[s, i, letter] = fits[texts[:, i] == letter].sum() / fits.sum()
    return table


class Oracle(Diffusion):
    """The perfect denoiser of a table of posteriors, whatever a row's first token."""

    def hidden(self, tokens, doc_ids=None, cache=None, belief=None):
        state = tokens[:, 1:] @ torch.tensor([16, 4, 1])  # its place in STATES
        return F.pad(self.table[state].log(), (0, 64 - LETTERS, 1, 0), value=-torch.inf).float()

    def head(self, hidden):
        return hidden


def transition(table, again, reveal):
    """Probabilities (64, 64) from state to state: positions are hidden again and revealed independently."""
    states = torch.tensor(STATES)
    new = (1 - again) * F.one_hot(states, LETTERS + 1).double()  # (64, 3, 4): what becomes of each position
    new[..., HIDDEN] = again
    revealed = torch.cat([reveal * table, torch.full((len(STATES), LENGTH, 1), 1 - reveal)], -1)
    new[states == HIDDEN] = revealed[states == HIDDEN]
    return new[:, torch.arange(LENGTH), states].prod(-1)


def outcome(table, rates):
    """Probabilities (27,) of the texts after steps with these rates of hiding again and revealing."""
    now = torch.eye(len(STATES), dtype=torch.float64)[-1]  # all is hidden
    for again, reveal in rates:
        now = now @ transition(table, again, reveal)
    return now[[STATES.index(text) for text in TEXTS]]


def drawn_texts(p, rows, **options):
    """Indices (rows,) in TEXTS of what the perfect denoiser of p writes."""
    model = Oracle(ModelConfig(vocab_size=4, mask_id=HIDDEN, block_size=4))
    model.table = posteriors(p)
    texts = torch.tensor(generate(model, [[0]] * rows, LENGTH, **options))[:, 1:]
    return texts @ torch.tensor([9, 3, 1])


@pytest.mark.parametrize('steps', [1, LENGTH])
def test_ancestral_sampling_is_the_reverse_process_of_so_many_steps(steps):
    """Letters that are revealed in one step are independent, which a perfect denoiser cannot help."""
    p = toy_joint()
    expected = outcome(posteriors(p), [(0.0, 1 / left) for left in range(steps, 0, -1)])
    assert expected.sum() == pytest.approx(1) and (expected - p).abs().sum() > 0.2
    assert_drawn_from(expected, drawn_texts(p, 20000, steps=steps))


def test_ancestral_sampling_in_many_steps_and_one_by_one_gives_the_joint_distribution():
    p = toy_joint()
    assert_drawn_from(p, drawn_texts(p, 4000, steps=400))
    assert_drawn_from(p, drawn_texts(p, 20000))


def test_remdm_is_the_reverse_process_with_its_rates():
    p, eta = toy_joint(), 0.4
    rates = [(min(eta, (left - 1) / (4 - left)) if left < 4 else 0.0, left) for left in range(4, 0, -1)]
    rates = [(again, ((5 - left) - (1 - again) * (4 - left)) / left) for again, left in rates]  # in quarters
    expected = outcome(posteriors(p), rates)
    assert expected.sum() == pytest.approx(1)
    assert_drawn_from(expected, drawn_texts(p, 20000, sampler='remdm', steps=4, eta=eta))


def test_infilling_draws_from_the_conditional_distribution():
    p = toy_joint()
    model = Oracle(ModelConfig(vocab_size=4, mask_id=HIDDEN, block_size=4))
    model.table = posteriors(p)
    rows = torch.tensor(generate(model, [[0, 1, HIDDEN, 2]] * 5000, 0))
    conditional = torch.stack([p[TEXTS.index((1, letter, 2))] for letter in range(LETTERS)])
    assert_drawn_from(conditional / conditional.sum(), rows[:, 2])
