"""Denoising: which masked positions each sampler fills, and what it draws, on models small enough to enumerate."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_drawn_from
from test_sampling import BLOCK, EQUAL, MASK, SHAPE, tiny, watch

from model import Diffusion, ModelConfig
from sampling import SAMPLERS, generate, remdm_rates

# ---------------------------------------------------------------------------- filling

MASKED = [[1, MASK, 3, MASK, MASK, 6], [MASK, 2], [5, 6, 7, 8, MASK, 1], [4], [MASK] * 12]


@pytest.mark.parametrize('max_new_tokens', [0, 5, 30])
@pytest.mark.parametrize('sampler', [name for name in SAMPLERS if name != 'speculative'])
def test_every_hidden_position_is_filled_and_no_other(sampler, max_new_tokens):
    model = tiny('diffusion')
    rows = generate(model, MASKED, max_new_tokens, sampler=sampler, block_length=2, eta=1.0)
    for prompt, row in zip(MASKED, rows, strict=True):
        assert len(row) == len(prompt) + max_new_tokens
        assert all(0 <= token < MASK for token in row)
        assert all(token in (given, MASK) or given == MASK for given, token in zip(prompt, row))
        assert [r for r, p in zip(row, prompt) if p != MASK] == [p for p in prompt if p != MASK]


@pytest.mark.parametrize('steps', [1, 3, 4, 6, 8, 40, None])
@pytest.mark.parametrize(
    'sampler', [name for name in SAMPLERS if name not in ('first_hitting', 'speculative')]
)
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
        model, [[1, 2, 3]] * 4, 9, sampler='remdm', eta=0.5, watch=lambda start, x, *_: seen.append(x.clone())
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
    generate(model, [[1]] * 8, 4, steps=40, watch=lambda *_: steps.append(1))
    assert len(steps) == 40  # a step that computes nothing is a step
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


ALONE = {'confidence': [None, 4], 'blocks': [None, 4], 'threshold': [None, 4], 'entropy': [None]}


@pytest.mark.parametrize('blocks', [(0,), (3,), (3, 0), (0, 3)], ids=str)
@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
def test_a_row_is_what_it_is_alone_whatever_gaps_stand_beside_it(architecture, blocks):
    model = tiny(architecture, block_length=blocks)
    rows = [[1, MASK, 3, MASK, MASK, 2], [MASK] * 6, [2, 1, 2, 1, 2, 1], [5, MASK, 3, 1, 2, MASK], *MASKED]
    for sampler, choices in ALONE.items():
        for steps, fresh in product(choices, [False, True]):
            options = dict(temperature=0, sampler=sampler, steps=steps, fresh_beliefs=fresh)
            options |= dict(block_length=2) if sampler == 'blocks' and not any(blocks) else {}
            together = generate(model, rows, 6, **options)
            assert together == [generate(model, [row], 6, **options)[0] for row in rows], options


def test_ancestral_steps_are_as_many_as_a_row_has_gaps_whatever_stands_beside_it():
    model, short, long = tiny('diffusion'), [1, MASK, 3, 1, MASK, 2], [MASK] * 6
    seen = watch(model)
    generate(model, [short, long], 0, sampler='ancestral')
    ours = [x for x in seen if any(row.tolist()[2:4] == [3, 1] for row in x)]
    assert 1 <= len(ours) <= 2 and all(len(x) == 1 for x in seen)


def test_stop_token_cuts_a_diffusion_row_after_the_prompt():
    model, prompts = tiny('diffusion'), [[1, 2, 3], [4, 5, 6], [7, 8, 1]]
    stop = generate(model, [prompts[0]], 9)[0][6]
    for prompt in prompts:
        (row,) = generate(model, [prompt], 9)
        expected = row[: 3 + row[3:].index(stop) + 1] if stop in row[3:] else row
        assert generate(model, [prompt], 9, stop_tokens=[stop]) == [expected]
        assert prompt != prompts[0] or len(expected) <= 7
    seen = watch(model)
    rows = generate(model, prompts, 400, stop_tokens=range(MASK), steps=1)
    assert len(seen) == 1 and all(len(row) == 4 for row in rows)  # no window after the one where all stopped


def test_nothing_is_computed_after_the_end_of_a_text_which_comes_last():
    model = fixed(0.5, 0.6, 0.7, 0.99, 0.95, 0.9)
    seen = watch(model)
    options = dict(temperature=0, stop_tokens=[3])
    assert generate(model, [[0]], 5, sampler='confidence', **options) == [[0, 1, 2, 3]]
    assert masks_seen(seen) == [[1, 2, 3, 4, 5], [1, 2, 3, 5], [1, 2, 3], [1, 3], [3]]  # 3 ends the text
    seen.clear()
    model.sure = [0.5, 0.8, 0.7, 0.99, 0.6, 0.5]
    assert generate(model, [[0]], 5, sampler='confidence', **options) == [[0, 1, 2, 3]]
    assert masks_seen(seen)[-1] == [3]
    seen.clear()  # what is given on the right is no text that has ended
    assert generate(model, [[0, MASK, MASK, MASK, MASK, 5]], 0, **options) == [list(range(6))]
    assert len(seen) == 4


def test_entropy_writes_what_costs_no_more_than_the_threshold_to_sample_independently():
    """The entropies but the largest add up to the threshold at most."""
    model = fixed(0.9, 0.6, 0.95, 0.7, 0.8, 0.5, 0.99)
    p = torch.tensor(model.sure).double()
    entropy = -(p * p.log() + (1 - p) * ((1 - p) / (MASK - 1)).log())  # of the positions
    for threshold in (0.0, float(entropy[6]) + 1e-4, float(entropy[6] + entropy[2]) + 1e-4, 100.0):
        seen = watch(model)
        assert generate(model, [[0]], 6, temperature=0, sampler='entropy', threshold=threshold)[0][1:] == [
            *range(1, 7)
        ]
        masked, passes = [*range(1, 7)], []
        while masked:
            passes.append(list(masked))
            surest, spent = sorted(masked, key=lambda i: entropy[i]), 0.0
            while surest and spent <= threshold:
                spent += float(entropy[surest[0]])
                masked.remove(surest.pop(0))
        assert masks_seen(seen) == passes, threshold


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
