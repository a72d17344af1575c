"""Sparse distribution diffusion: what beliefs may change and what they may not, and what bounds what."""

import math
from itertools import permutations, product

import pytest
import torch
from conftest import assert_drawn_from, random_model

from lm import likelihood
from model import ARCHITECTURES, Belief, ModelConfig
from sampling import generate

MASK, IGNORE = 10, 9
SHAPE = dict(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=16, mask_id=MASK, ignore_id=IGNORE)
GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0)


def tiny(architecture='sdd', **changes):
    return random_model(architecture, 0.4, **{**SHAPE, **changes})


def some_tokens(rows=4, length=12, seed=0):
    return torch.randint(0, IGNORE, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_noise(tokens, level=0.6):
    noise = torch.rand(tokens.size(0), 1 + tokens.size(1), generator=torch.Generator().manual_seed(1))
    noise[:, 0] = level
    return noise


def some_belief(rows=4, length=12, k=3):
    generator = torch.Generator().manual_seed(2)
    return Belief(
        torch.randint(0, IGNORE, (rows, length, k), generator=generator),
        torch.rand(rows, length, k + 1, generator=generator).softmax(-1)[..., :k],
    )


# ---------------------------------------------------------------------------- beliefs


def test_a_belief_holds_the_likeliest_tokens_with_their_true_probabilities():
    model, tokens = tiny(), some_tokens()
    where = tokens % 2 == 0
    states = model.hidden(tokens)
    belief = model.top_k_belief(states, where, 3)
    p = model.head(states).softmax(-1)
    torch.testing.assert_close(belief.probabilities[where], p.topk(3).values[where])
    assert torch.equal(belief.tokens[where], p.topk(3).indices[where])
    assert (belief.probabilities[~where] == 0).all()
    assert (belief.probabilities.sum(-1) < 1).all()  # the rest of the mass is left to <|mask|>
    assert (belief.tokens != MASK).all()
    assert model.top_k_belief(states, where, 99).tokens.size(-1) == 11  # no more candidates than tokens


@pytest.mark.parametrize('changes', [{}, GPT2], ids=['native', 'gpt2'])
def test_beliefs_are_inert_at_visible_positions(changes):
    model, tokens, belief = tiny(**changes), some_tokens(), some_belief()
    hidden = some_noise(tokens)[:, 1:] < 0.5
    view = tokens.masked_fill(hidden, MASK)
    cleared = Belief(belief.tokens, belief.probabilities * hidden.unsqueeze(-1))
    assert torch.equal(model.hidden(view, belief=belief), model.hidden(view, belief=cleared))
    assert torch.equal(model.hidden(tokens, belief=belief), model.hidden(tokens))
    assert not torch.allclose(
        model.hidden(view, belief=belief), model.hidden(view)
    )  # where hidden, they matter


@pytest.mark.parametrize('changes', [{}, GPT2], ids=['native', 'gpt2'])
def test_without_candidates_it_is_masked_diffusion_bit_for_bit(changes):
    torch.manual_seed(0)
    diffusion = ARCHITECTURES['diffusion'](ModelConfig(**{**SHAPE, **changes}))
    torch.manual_seed(0)
    sdd = ARCHITECTURES['sdd'](ModelConfig(**{**SHAPE, **changes}))
    for name, weight in diffusion.state_dict().items():
        assert torch.equal(weight, sdd.state_dict()[name]), name
    diffusion = tiny('diffusion', **changes)
    sdd = tiny('sdd', **changes)
    sdd.load_state_dict(diffusion.state_dict(), strict=False)
    tokens = some_tokens()
    noise = some_noise(tokens)
    results = [diffusion(tokens, None, noise), sdd(tokens, None, noise, k=0)]
    assert results[0] == results[1]
    for loss, *_ in results:
        loss.backward()
    for name, weight in diffusion.named_parameters():
        assert torch.equal(weight.grad, dict(sdd.named_parameters())[name].grad), name
    for sampler in ('ancestral', 'confidence', 'remdm'):
        assert generate(diffusion, [[1, 2]], 9, sampler=sampler) == generate(
            sdd, [[1, 2]], 9, sampler=sampler, k=0
        )
    assert torch.equal(
        likelihood.nested_bound(diffusion, tokens, None, noise[:, 1:], 6),
        likelihood.nested_bound(sdd, tokens, None, noise[:, 1:], 6, k=0),
    )


@pytest.mark.parametrize(
    'beliefs', [dict(), dict(k=1), dict(passes=2), dict(stale=0.2), dict(passes=3, stale=0.3)]
)
def test_hidden_tokens_never_influence_logits(beliefs, monkeypatch):
    model, tokens = tiny(), some_tokens()
    noise, seen, hidden = some_noise(tokens), [], model.hidden
    masked = noise[:, 1:] < model.mask_ratio(noise)
    masked[:, 0] = False
    monkeypatch.setattr(
        model, 'hidden', lambda *given, **more: seen.append(hidden(*given, **more)) or seen[-1]
    )
    other = torch.where(masked, (tokens + 3) % IGNORE, tokens)
    for x in (tokens, other):
        model(x, None, noise, **beliefs)
    half = len(seen) // 2
    assert half == beliefs.get('passes', 1) + 1
    for one, two in zip(seen[:half], seen[half:]):
        assert torch.equal(one, two)
    monkeypatch.undo()
    seen_before = model(tokens, None, noise, reduction='none', **beliefs)[0]
    tokens[:, 0] = (tokens[:, 0] + 1) % IGNORE
    changed = model(tokens, None, noise, reduction='none', **beliefs)[0] != seen_before
    assert torch.equal(changed, masked)  # while a visible token matters to every hidden one


def test_stale_beliefs_come_from_views_that_see_less_and_nothing_else(monkeypatch):
    model, tokens = tiny(), some_tokens()
    noise, views, hidden = some_noise(tokens, 0.3), [], model.hidden
    monkeypatch.setattr(
        model, 'hidden', lambda view, *rest, **more: views.append(view) or hidden(view, *rest, **more)
    )
    model(tokens, None, noise, passes=2, stale=0.4)
    first, second, last = (view == MASK for view in views)
    assert (first | ~second).all() and (second | ~last).all() and not first[:, 0].any()
    assert first.sum() > second.sum() > last.sum()


@pytest.mark.parametrize('changes', [{}, GPT2], ids=['native', 'gpt2'])
def test_gradient_flows_to_every_parameter_of_the_beliefs_embedding(changes):
    torch.manual_seed(0)
    model, tokens = ARCHITECTURES['sdd'](ModelConfig(**{**SHAPE, **changes})), some_tokens()
    own = set(model.state_dict()) - set(
        ARCHITECTURES['diffusion'](ModelConfig(**{**SHAPE, **changes})).state_dict()
    )
    assert own
    for beliefs, touched in ((dict(), True), (dict(k=0), False)):
        model.zero_grad()
        model(tokens, None, some_noise(tokens), **beliefs)[0].backward()
        for name in own:
            gradient = model.get_parameter(name).grad
            assert gradient is not None  # in every step, or ranks would wait for each other
            assert (gradient != 0).all() == touched, name


def test_autocast_leaves_every_gradient_in_place():
    """Weights that the first pass casts without gradient are not those of the second."""
    model, tokens = tiny(), some_tokens()
    with torch.autocast('cpu', torch.bfloat16):
        loss, *_ = model(tokens, None, some_noise(tokens))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# ---------------------------------------------------------------------------- bounds, enumerated

LETTERS, LENGTH = 3, 3
TEXTS = list(product(range(LETTERS), repeat=LENGTH))
ROWS = torch.tensor([(0, *text) for text in TEXTS])  # (27, 4); the first token is given


def toy(architecture='sdd'):
    return tiny(
        architecture, vocab_size=LETTERS + 1, mask_id=LETTERS, ignore_id=None, block_size=LENGTH + 1, k=2
    )


@torch.no_grad()
def path_nats(model, turn, steps):
    """-log p (27,) of each text if position i is written in the step turn[i], of steps..1: the sampler by hand."""
    nats, belief = torch.zeros(len(ROWS), dtype=torch.float64), None
    for step in range(steps, 0, -1):
        hidden = torch.tensor([False] + [t <= step for t in turn]).expand(len(ROWS), -1)
        view = ROWS.masked_fill(hidden, LETTERS)
        states = model.hidden(view, belief=belief)
        log_p = model.head(states).double().log_softmax(-1).gather(2, ROWS.unsqueeze(-1)).squeeze(-1)
        nats -= log_p[:, [i + 1 for i, t in enumerate(turn) if t == step]].sum(1)
        belief = model.top_k_belief(states, hidden, model.config.k)
    return nats


@pytest.mark.parametrize('steps', [1, 3])
def test_the_bound_of_sampling_in_steps_is_the_mean_over_all_paths_and_above_the_truth(steps):
    model = toy()
    paths = torch.stack(
        [path_nats(model, turn, steps) for turn in product(range(1, steps + 1), repeat=LENGTH)]
    )
    truth = -(torch.logsumexp(-paths, 0) - math.log(len(paths)))  # of the sampler: each path is as likely
    mean = paths.mean(0)
    assert (mean >= truth - 1e-9).all() and torch.exp(-truth).sum() == pytest.approx(1)
    assert steps == 1 or (mean > truth + 1e-4).any()
    noise = torch.rand(4000, 1 + LENGTH, generator=torch.Generator().manual_seed(0))
    for place in (0, 13, 26):
        draws = likelihood.nested_bound(model, ROWS[place].expand(4000, -1), None, noise, steps).sum(1)
        assert abs(draws.mean() - mean[place]) < 4 * draws.std() / 4000**0.5 + 1e-5


def orders(model):
    """-log p (6, 27) of each text if it is written in each order, with fresh beliefs."""
    turns = ([-1, *turn] for turn in permutations(range(LENGTH)))
    return torch.stack([likelihood.chain_rule(model, ROWS, turn=turn).sum(1).double() for turn in turns])


LIKELIHOODS = {  # of each sampler: p (27,) of each text, by what its likelihood or bound is the mean of
    'first_hitting': lambda model: torch.exp(-orders(model)).mean(0),
    'left to right': lambda model: torch.exp(-likelihood.chain_rule(model, ROWS).sum(1).double()),
    'left to right, carried': lambda m: torch.exp(
        -likelihood.chain_rule(m, ROWS, carried=True).sum(1).double()
    ),
    'ancestral': lambda model: torch.stack(
        [torch.exp(-path_nats(model, turn, 3)) for turn in product((1, 2, 3), repeat=LENGTH)]
    ).mean(0),
}
SETTINGS = {
    'first_hitting': {},
    'left to right': {'sampler': 'blocks', 'block_length': 1, 'fresh_beliefs': True},
    'left to right, carried': {'sampler': 'blocks', 'block_length': 1},
    'ancestral': {'steps': 3},
}


@pytest.mark.faults
@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
@pytest.mark.parametrize('sampler', SETTINGS)
def test_each_sampler_draws_from_what_its_likelihood_says(sampler, architecture):
    model = toy(architecture)
    rows = torch.tensor(generate(model, [[0]] * 10000, LENGTH, **SETTINGS[sampler]))
    p = LIKELIHOODS[sampler](model)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert_drawn_from(p, rows[:, 1:] @ torch.tensor([9, 3, 1]))


@pytest.mark.faults
def test_beliefs_that_are_carried_are_another_model_than_fresh_ones():
    fresh, carried = (LIKELIHOODS[sampler](toy()) for sampler in ('left to right', 'left to right, carried'))
    assert (fresh - carried).abs().sum() > 0.01
    rows = generate(toy(), [[0]] * 10000, LENGTH, sampler='blocks', block_length=1)
    with pytest.raises(AssertionError):
        assert_drawn_from(fresh, torch.tensor(rows)[:, 1:] @ torch.tensor([9, 3, 1]))


@torch.no_grad()
def test_the_two_pass_bound_is_the_mean_over_all_orders_and_above_the_truth():
    model = toy()
    nll = orders(model)
    truth = -(torch.logsumexp(-nll, 0) - math.log(len(nll)))
    assert torch.exp(-nll).sum(1).numpy() == pytest.approx(1, abs=1e-5)  # each order is a distribution
    bound = torch.zeros(len(ROWS), dtype=torch.float64)
    for mask in product(
        (0, 1), repeat=LENGTH
    ):  # ∫ t^(m-1) (1-t)^(n-m) dt = 1 / (m C(n, m)) is a mask's weight
        if m := sum(mask):
            noise = torch.tensor([[1.0, 2.0, *(2.0 - 2 * one for one in mask)]]).expand(len(ROWS), -1)
            bound += model.nll(ROWS, None, noise).double() / (m * math.comb(LENGTH, m))
    torch.testing.assert_close(bound, nll.mean(0), atol=1e-4, rtol=1e-5)
    assert (bound >= truth - 1e-6).all() and (bound > truth + 1e-3).any()


# ---------------------------------------------------------------------------- does it help


def chains(rows, seed, length=12, letters=16):
    """Rows (B, length) in which each letter follows from the one before by one fixed, scrambled permutation."""
    following = torch.randperm(letters, generator=torch.Generator().manual_seed(3))
    columns = [torch.randint(0, letters, (rows,), generator=torch.Generator().manual_seed(seed))]
    while len(columns) < length:
        columns.append(following[columns[-1]])
    return torch.stack(columns, 1)


def stratified_noise(rows, seed, length=12):
    noise = torch.rand(rows, 1 + length, generator=torch.Generator().manual_seed(seed))
    noise[:, 0] = (torch.arange(rows) + noise[:, 0]) / rows
    return noise


@pytest.mark.slow
def test_beliefs_gain_and_shuffled_among_the_hidden_positions_they_lose_it(monkeypatch):
    """One layer finds a letter from its neighbour; what a neighbour is believed to be leads it further."""
    torch.manual_seed(0)
    model = ARCHITECTURES['sdd'](
        ModelConfig(17, mask_id=16, block_size=12, n_layer=1, n_head=2, n_embd=32, k=4, neighbours=0)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(250):
        optimizer.param_groups[0]['lr'] = 1e-2 * (1 - step / 250)
        loss, count, _ = model(chains(64, step + 1), None, stratified_noise(64, step + 1), k=4 * (step % 2))
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    batch, top_k_belief = (chains(512, 0), None, stratified_noise(512, 0)), model.top_k_belief

    def shuffled(states, where, k):
        belief, index = top_k_belief(states, where, k), where.flatten().nonzero().squeeze(1)
        other = torch.arange(where.numel())
        other[index] = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
        return Belief(*(part.flatten(0, 1)[other].view_as(part) for part in belief))

    with torch.no_grad():
        count = model(*batch)[1]
        two_pass, without = (model.eval()(*batch, **beliefs)[0] / count for beliefs in ({}, {'k': 0}))
        monkeypatch.setattr(model, 'top_k_belief', shuffled)
        control = model(*batch)[0] / count
    assert two_pass < without - 0.05 and control > without
