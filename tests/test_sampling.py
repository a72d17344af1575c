"""Generation, on models small enough to enumerate."""

import pytest
import torch
from conftest import assert_drawn_from, random_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import model as model_module
from lm.draw import confidence_of, restrict, sample_tokens, uniform_numbers
from model import ARCHITECTURES
from sampling import SAMPLERS, generate

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
def test_greedy_text_is_that_of_the_model_without_a_cache(changes, prompts):
    model = tiny('ar', vocab_size=200, **changes)
    expected = [write_greedily(model, prompt, 3 * BLOCK) for prompt in prompts]
    assert all(len(set(row)) > 6 for row in expected)  # a text that could go wrong
    assert generate(model, prompts, 3 * BLOCK, temperature=0) == expected


def test_cache_reads_one_token_at_a_time():
    model = tiny('ar')
    seen = watch(model)
    generate(model, [[1, 2, 3]], 2 * BLOCK, temperature=0)
    assert [x.size(1) for x in seen] == [3] + [1] * 9 + [6] + [1] * 6 + [6] + [1] * 6


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
    assert generate(model, prompts, 9, temperature=0, stop_tokens=[stop]) == expected
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


def test_of_equal_logits_no_more_than_k_are_kept():
    assert restrict(torch.tensor([[1.0, 1.0, 0.0]]), 1.0, 1, None).count_nonzero() == 1


def states_of(model, rows):
    with torch.no_grad():
        return model.hidden(torch.tensor([[1, 2, 3]]))[0, -1].expand(rows, -1)


def draw(model, states, options):
    """Tokens (N,) and their probabilities (N,)."""
    generator = torch.Generator().manual_seed(0)
    uniform = uniform_numbers((len(states),), generator, states.device) if options[0] else None
    return sample_tokens(model, states, uniform, options, confidence_of)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('options', [(1.0, None, None), (0.7, None, None), (1.5, 4, None), (1.0, None, 0.9)])
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


@pytest.mark.faults
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_weights_that_give_nan_are_a_sentence(architecture):
    model = tiny(architecture)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0] = torch.inf
    with pytest.raises(ValueError, match='computes nan: its weights are damaged'):
        generate(model, [[1, 2]], 4)


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
    token, _ = sample_tokens(model, states, torch.tensor([uniform], dtype=torch.float64), (1.0, 2, None))
    assert token == (possible[0] if uniform == 0 else possible[1])


# ---------------------------------------------------------------------------- both


@pytest.mark.parametrize('sampler', [name for name in SAMPLERS if name != 'speculative'])
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
        ('ar', [1], {'temperature': 1e-320}, 'temperature is 1e-320; it must be 0, or between'),
        ('ar', [1], {'temperature': float('nan')}, 'temperature is nan; '),
        ('ar', [1], {'top_k': 0}, 'top_k is 0; '),
        ('ar', [1], {'top_p': 0.0}, 'top_p is 0.0; '),
        ('ar', [1], {'top_p': 1.5}, 'top_p is 1.5; '),
        ('diffusion', [1], {'steps': 0}, 'steps is 0; '),
        ('diffusion', [1], {'sampler': 'first_hitting', 'steps': 3}, 'steps=3 has no effect'),
        ('diffusion', [1], {'sampler': 'speculative', 'k': 2}, 'k=2 has no effect'),
        ('diffusion', [1], {'block_length': 0}, 'block_length is 0; '),
        ('diffusion', [1], {'sampler': 'speculative'}, 'needs an ar model; train with --ar_weight'),
        ('diffusion', [1], {'threshold': 2.0}, 'threshold is 2.0; '),
        ('diffusion', [1], {'sampler': 'entropy', 'threshold': -0.1}, 'threshold is -0.1; '),
        ('diffusion', [1], {'eta': -0.1}, 'eta is -0.1; '),
    ],
)
def test_what_cannot_be_continued_is_refused_in_a_sentence(architecture, prompt, options, named):
    with pytest.raises(ValueError, match=named) as error:
        generate(tiny(architecture), [[1, 2], prompt], **{'max_new_tokens': 4, **options})
    assert str(error.value).endswith('.')
