"""The models, small enough to enumerate."""

import math

import pytest
import torch
from conftest import random_model

import model as model_module
from lm.layers import rope_table, rotate
from model import ARCHITECTURES, SIZES, ModelConfig

GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0)
MASK, IGNORE = 10, 9
SHAPE = dict(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=16, mask_id=MASK, ignore_id=IGNORE)


def tiny(architecture, **changes):
    return random_model(architecture, 0.4, **{**SHAPE, **changes})


def some_tokens(rows=4, length=12, seed=0):
    """Random ordinary tokens (B, T): neither <|mask|> nor <|ignore|>."""
    return torch.randint(0, IGNORE, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_noise(tokens, seed=0):
    """Noise (B, 1 + T) with a level of 0.6 in each row."""
    noise = torch.rand(tokens.size(0), 1 + tokens.size(1), generator=torch.Generator().manual_seed(seed))
    noise[:, 0] = 0.6
    return noise


def hiding(masked, level):
    """Noise (B, 1 + T) for which exactly `masked` (B, T) is hidden, at level (B, 1) in [0, 1]."""
    return torch.cat([level, 1 - masked.float()], 1)


def per_token(model, *batch):
    """The loss (B, T), the tokens that count (B, T), and the metrics."""
    with torch.no_grad():
        return model(*batch, reduction='none')


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same(first, second, tolerance):
    """Two dictionaries of gradients agree, and are gradients: something in them is not zero."""
    assert first.keys() == second.keys()
    assert all(value.abs().max() > 0 for value in first.values())
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------- autoregressive


@pytest.mark.parametrize(
    'changes', [{}, {'n_head': 4, 'n_kv_head': 2}, GPT2], ids=['native', 'grouped', 'gpt2']
)
def test_ar_is_causal(changes):
    model, tokens = tiny('ar', **changes), some_tokens()
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % IGNORE
    before, after = model.logits(tokens)[..., :IGNORE], model.logits(other)[..., :IGNORE]
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-5)
    assert ((after - before)[:, 7:].abs().amax(-1) > 1e-4).all()  # and what follows does see it


def test_ar_loss_is_the_cross_entropy_token_by_token():
    model, tokens = tiny('ar'), some_tokens()
    log_p = model.logits(tokens).log_softmax(-1).detach()
    nats = torch.tensor([[-log_p[b, i - 1, tokens[b, i]] for i in range(1, 12)] for b in range(4)])
    right = sum(int(log_p[b, i - 1].argmax() == tokens[b, i]) for b in range(4) for i in range(1, 12))
    loss, count, metrics = model(tokens)
    torch.testing.assert_close(loss, nats.sum())
    torch.testing.assert_close(model.nll(tokens), nats.sum(1))
    assert count == metrics['predicted'] == 4 * 11
    assert metrics['correct'] == right


def test_ar_loss_is_only_where_the_mask_says():
    model, tokens = tiny('ar'), some_tokens()
    loss_mask = torch.zeros_like(tokens, dtype=torch.uint8)
    loss_mask[0, 3] = loss_mask[2, 11] = 1
    log_p = model.logits(tokens).log_softmax(-1)
    loss, count, metrics = model(tokens, loss_mask)
    torch.testing.assert_close(loss, -log_p[0, 2, tokens[0, 3]] - log_p[2, 10, tokens[2, 11]])
    assert count == metrics['predicted'] == 2


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_first_token_is_never_counted(architecture):
    model, tokens = tiny(architecture), some_tokens()
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, 0] = True
    noise = hiding(torch.ones_like(tokens), torch.ones(4, 1))
    loss, count, metrics = model(tokens, loss_mask, noise)
    assert loss == 0 and count == 0 and metrics['predicted'] == 0
    assert model(tokens, None, noise)[1] == 4 * 11
    assert loss_mask[:, 0].all()  # the caller's mask is left as it was


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_sums_of_micro_batches_add_up(architecture):
    model, tokens = tiny(architecture), some_tokens()
    noise, loss_mask = some_noise(tokens), some_tokens(seed=1) % 3 > 0
    whole = model(tokens, loss_mask, noise)
    parts = [model(tokens[rows], loss_mask[rows], noise[rows]) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    assert whole[1] == parts[0][1] + parts[1][1]
    for name, value in whole[2].items():
        torch.testing.assert_close(value, parts[0][2][name] + parts[1][2][name])


# ---------------------------------------------------------------------------- never predicted


@pytest.mark.parametrize('architecture, possible', [('ar', 9), ('diffusion', 10), ('sdd', 10)])
def test_special_and_padding_rows_have_no_probability(architecture, possible):
    model = tiny(architecture)
    probabilities = model.logits(some_tokens()).softmax(-1)
    assert probabilities.size(-1) == 64
    assert (probabilities[..., :possible] > 0).all()  # <|ignore|> is filler that diffusion can predict
    assert (probabilities[..., possible:] == 0).all()


# ---------------------------------------------------------------------------- diffusion


def test_diffusion_sees_both_sides():
    model, tokens = tiny('diffusion'), some_tokens()
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % IGNORE
    difference = (model.logits(tokens) - model.logits(other))[..., :MASK].abs().amax(-1)
    assert (difference > 1e-4).all()


def test_hidden_tokens_never_leak(monkeypatch):
    model, tokens = tiny('diffusion'), some_tokens()
    noise = some_noise(tokens)
    masked = noise[:, 1:] < model.mask_ratio(noise)
    masked[:, 0] = False
    seen, hidden = [], model.hidden
    monkeypatch.setattr(model, 'hidden', lambda x_t, *rest: seen.append(hidden(x_t, *rest)) or seen[-1])

    other = torch.where(masked, (tokens + 3) % IGNORE, tokens)
    nats, nats_of_other = (per_token(model, x, None, noise)[0] for x in (tokens, other))
    assert torch.equal(seen[0], seen[1])
    assert ((nats != nats_of_other) == masked).all()  # it is another token that is scored

    one = tokens.clone()
    row, column = masked.nonzero()[0]
    one[row, column] = other[row, column]
    changed = per_token(model, one, None, noise)[0] != nats
    assert changed.nonzero().tolist() == [[row, column]]

    visible = tokens.clone()
    visible[:, 0] = (visible[:, 0] + 1) % IGNORE
    changed = per_token(model, visible, None, noise)[0] != nats
    assert torch.equal(changed, masked)  # while a visible token matters to every hidden one


def test_diffusion_loss_is_cross_entropy_of_the_hidden_over_the_level():
    model, tokens = tiny('diffusion'), some_tokens()
    noise = some_noise(tokens)
    noise[:, 0] = torch.tensor([0.0, 0.3, 0.7, 1.0])
    level = model_module.T_MIN + (1 - model_module.T_MIN) * noise[:, 0]
    nats, predicted = torch.zeros(4, 12), 0
    for b in range(4):
        hidden = [i for i in range(1, 12) if noise[b, 1 + i] < level[b]]
        corrupted = tokens[b].clone()
        corrupted[hidden] = MASK
        log_p = model.logits(corrupted[None])[0].log_softmax(-1)
        for i in hidden:
            nats[b, i] = -log_p[i, tokens[b, i]] / level[b]
        predicted += len(hidden)
    torch.testing.assert_close(per_token(model, tokens, None, noise)[0], nats, atol=1e-4, rtol=1e-4)
    loss, count, metrics = model(tokens, None, noise)
    torch.testing.assert_close(loss, nats.sum(), atol=1e-3, rtol=1e-4)
    assert count == 4 * 11 and metrics['predicted'] == predicted


def test_diffusion_counts_maskable_tokens_whatever_is_hidden():
    model, tokens = tiny('diffusion'), some_tokens()
    loss_mask = torch.ones_like(tokens)
    loss_mask[:, :4] = 0
    for seed in range(3):
        assert model(tokens, loss_mask, some_noise(tokens, seed))[1] == 4 * 8
    nats = per_token(model, tokens, loss_mask, hiding(torch.ones_like(tokens), torch.ones(4, 1)))[0]
    assert torch.equal(nats > 0, loss_mask.bool())  # the prompt of a row is never hidden


def test_filler_is_paid_for_and_not_counted():
    model, tokens = tiny('diffusion'), some_tokens()
    tokens[:, 9:] = IGNORE
    nats, counted, _ = per_token(model, tokens, None, hiding(torch.ones_like(tokens), torch.ones(4, 1)))
    assert (nats[:, 1:] > 0).all()
    assert counted.sum(1).tolist() == [8] * 4


@pytest.mark.parametrize('changes', [{}, GPT2], ids=['native', 'gpt2'])
def test_a_batch_with_nothing_hidden_costs_nothing(changes):
    model, tokens = tiny('diffusion', **changes), some_tokens()
    loss, count, metrics = model(tokens, None, hiding(torch.zeros_like(tokens), torch.full((4, 1), 0.5)))
    assert loss == 0 and count == 4 * 11 and metrics['predicted'] == 0
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and (weight.grad == 0).all(), name


# ---------------------------------------------------------------------------- attention


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_grouped_queries_equal_repeated_keys(architecture):
    grouped, full = tiny(architecture, n_head=4, n_kv_head=2), tiny(architecture, n_head=4)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(
            ('.k.weight', '.v.weight', '.v0.weight')
        ):  # (2 · 4, 16): heads 0 and 1 become 0, 0, 1, 1
            weights[name] = weight.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = some_tokens()
    torch.testing.assert_close(grouped.logits(tokens), full.logits(tokens), atol=1e-4, rtol=1e-4)
    assert grouped.num_parameters() == full.num_parameters() - (2 * 2 + 1) * 8 * 16


def rope_at(positions):
    return rope_table(10000.0, 8, 32)[:, positions]


def test_rotary_scores_depend_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator)

    def score(m, n):
        a, b = (rotate(x.view(1, 1, 1, 8), rope_at([place])).flatten() for x, place in ((q, m), (k, n)))
        return float(a @ b)

    assert score(5, 2) == pytest.approx(score(23, 20), abs=1e-4)
    assert score(2, 5) == pytest.approx(score(20, 23), abs=1e-4)
    assert score(0, 0) == pytest.approx(float(q @ k), abs=1e-5)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2 and abs(score(5, 2) - score(2, 5)) > 1e-2


def test_rotary_pairs_are_the_two_halves():
    turned = rotate(torch.eye(8).view(8, 1, 1, 8), rope_at([3]))[:, 0, 0]  # unit vectors at position 3
    for i in range(4):
        angle = 3 * 10000 ** (-2 * i / 8)
        expected = torch.zeros(2, 8)
        expected[0, i], expected[0, i + 4] = math.cos(angle), math.sin(angle)
        expected[1, i], expected[1, i + 4] = -math.sin(angle), math.cos(angle)
        torch.testing.assert_close(turned[[i, i + 4]], expected)


# ---------------------------------------------------------------------------- shapes


def gpt2_logits(weights, tokens, n_layer, n_head):
    """GPT-2 (Radford et al. 2019), written from its description; `weights` by our names."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[name + '.weight'] + weights[name + '.bias']

    def linear(x, name):
        return x @ weights[name + '.weight'].T + weights[name + '.bias']

    def attention(x, name):
        q, k, v = (linear(x, f'{name}.{part}').chunk(n_head, -1) for part in 'qkv')
        future = torch.ones(x.size(1), x.size(1)).triu(1).bool()
        heads = []
        for h in range(n_head):
            scores = (q[h] @ k[h].mT / q[h].size(-1) ** 0.5).masked_fill(future, -torch.inf)
            heads.append(scores.softmax(-1) @ v[h])
        return linear(torch.cat(heads, -1), name + '.out')

    x = weights['embedding.weight'][tokens] + weights['positions.weight'][: tokens.size(1)]
    for i in range(n_layer):
        x = x + attention(norm(x, f'blocks.{i}.attention_norm'), f'blocks.{i}.attention')
        u = linear(norm(x, f'blocks.{i}.mlp_norm'), f'blocks.{i}.mlp.up')
        x = x + linear(u * (1 + torch.erf(u / 2**0.5)) / 2, f'blocks.{i}.mlp.down')
    return norm(x, 'norm') @ weights['embedding.weight'].T


def test_gpt2_switches_make_gpt2():
    model, tokens = tiny('ar', **GPT2, mask_id=None, ignore_id=None), some_tokens()
    expected = gpt2_logits(model.state_dict(), tokens, SHAPE['n_layer'], SHAPE['n_head'])
    torch.testing.assert_close(model.logits(tokens)[..., :11], expected[..., :11], atol=1e-3, rtol=1e-4)


def nanogpt_shape():
    """The shape of nanoGPT's recipe for Shakespeare on a CPU."""
    return dict(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128)


def test_parameter_counts_are_nanogpts():
    model = ARCHITECTURES['ar'](ModelConfig(**nanogpt_shape(), **{**GPT2, 'bias': False}))
    assert model.num_parameters() == 795_904 + 64 * 128  # nanoGPT leaves the positions out of its figure
    shape = {**nanogpt_shape(), 'vocab_size': 68}  # three special rows, one of which is text
    native = ARCHITECTURES['ar'](ModelConfig(**shape, mask_id=66, ignore_id=67))
    shortcuts = 2 * 4 + 4 * 8 * 128
    assert native.num_parameters() == (12 * 4 + 2) * 128**2 + 66 * 128 + shortcuts


def test_gpt2_weights_start_as_in_nanogpt():
    torch.manual_seed(0)
    model = ARCHITECTURES['ar'](ModelConfig(**nanogpt_shape(), **GPT2))
    for name, weight in model.state_dict().items():
        if name.endswith('.bias'):
            assert (weight == 0).all(), name
        elif weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            std = 0.02 / 8**0.5 if name.endswith(('out.weight', 'down.weight')) else 0.02
            assert float(weight.std()) == pytest.approx(std, rel=0.05), name


@pytest.mark.faults
@pytest.mark.parametrize('token', ['', 1.5, -1, 40])
def test_a_special_token_that_is_none_is_refused(token):
    for name in ('mask_id', 'ignore_id'):
        with pytest.raises(ValueError, match=f'{name} is {token!r}; it must be one of 40 tokens'):
            ModelConfig(vocab_size=40, **{name: token})


def test_native_blocks_start_as_the_identity():
    model, tokens = ARCHITECTURES['ar'](ModelConfig(**SHAPE)), some_tokens()
    assert torch.equal(model.hidden(tokens), model.norm(model.embed(tokens)))


@pytest.mark.parametrize(
    'size, millions', [('tiny', 5.0), ('small', 23.6), ('medium', 43.0), ('large', 113.6), ('xl', 348.1)]
)
def test_sizes(size, millions):
    n_layer, n_head, n_embd = SIZES[size]
    config = ModelConfig(32768, n_layer=n_layer, n_head=n_head, n_embd=n_embd, mask_id=1, ignore_id=2)
    with torch.device('meta'):
        model = ARCHITECTURES['diffusion'](config)
    assert model.num_parameters() == 12.5 * n_layer * n_embd**2 + 32766 * n_embd + n_layer * (2 + 16 * n_embd)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    'changes, named',
    [
        ({'norm': 'batch'}, "norm is 'batch'; choose rms or rms_gain or layer."),
        ({'position': 'alibi'}, "position is 'alibi'; choose rope or learned."),
        ({'mlp': 'glu'}, "mlp is 'glu'; choose relu2 or relu or gelu or gelu_tanh or swiglu."),
        ({'vocab_size': 0}, 'vocab_size is 0;'),
        ({'block_size': 0}, 'block_size is 0;'),
        ({'n_layer': -2}, 'n_layer is -2;'),
        ({'n_kv_head': -1}, 'n_kv_head is -1;'),
        ({'dropout': 1.0}, 'dropout is 1.0;'),
        ({'n_embd': 100, 'n_head': 3}, 'n_embd=100 is no even multiple of n_head=3'),
        ({'n_embd': 12, 'n_head': 4}, 'n_embd=12 is no even multiple of n_head=4'),
        ({'n_head': 4, 'n_kv_head': 3}, 'n_head=4 is no multiple of n_kv_head=3'),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_a_sentence(changes, named):
    with pytest.raises(ValueError) as error:
        ModelConfig(**{**SHAPE, **changes})
    assert named in str(error.value) and str(error.value).endswith('.')


def test_a_row_longer_than_the_block_is_refused():
    with pytest.raises(ValueError, match='13 tokens.*block_size=12'):
        tiny('ar').hidden(some_tokens(length=13))
