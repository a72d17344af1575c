"""Block diffusion: what a block attends to, what its likelihood is of, and the `ar` model in its clean tokens."""

import json
from dataclasses import replace
from itertools import pairwise, permutations, product

import pytest
import torch
from conftest import assert_drawn_from, random_model, write_folder
from helpers import TRAIN, assert_same_run, finish, load, losses, metrics, run, start_ranks, train

from lm import likelihood, runtime, speculation
from lm.caches import BlockCache
from lm.configurator import UserError
from lm.draw import restrict
from lm.speculation import check_draft
from model import Autoregressive
from sampling import generate

MASK, IGNORE, BLOCK = 10, 9, 12
SHAPE = dict(vocab_size=11, block_size=BLOCK, n_layer=2, n_head=2, n_embd=16, mask_id=MASK, ignore_id=IGNORE)
KINDS = pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])


def tiny(architecture='diffusion', block_length=(4,), **changes):
    return random_model(architecture, 0.4, **{**SHAPE, 'block_length': block_length, **changes})


def some_tokens(rows=3, length=BLOCK, seed=0):
    return torch.randint(0, IGNORE, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_noise(tokens, seed=1):
    return torch.rand(len(tokens), 1 + tokens.size(1), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- the two streams


@KINDS
def test_a_block_as_long_as_the_row_is_the_whole_row_bit_for_bit(architecture):
    tokens = some_tokens()
    whole, long = (
        tiny(architecture, length)(tokens, None, some_noise(tokens)) for length in ((0,), (BLOCK,))
    )
    assert torch.equal(whole[0], long[0])
    two_streams = tiny(architecture, ar_weight=0.5, block_length=(0,)).eval()(
        tokens, None, some_noise(tokens)
    )
    torch.testing.assert_close(two_streams[0], whole[0])


@KINDS
def test_a_block_sees_the_clean_tokens_before_it_and_its_own_noisy_ones(architecture):
    model, tokens = tiny(architecture), some_tokens(1)
    noise = some_noise(tokens)
    (nll,), _, metrics = model(tokens, None, noise, reduction='none')
    masked = metrics['predicted'][0]
    assert {1, 2, 3, 4} >= set(masked.view(-1, 4).sum(1).tolist())  # no block without a mask
    for place in range(BLOCK):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % IGNORE
        other = model(changed, None, noise, reduction='none')[0][0]
        differs = (other - nll).abs() > 1e-6
        differs[place] = False  # its own loss
        block = torch.arange(BLOCK) // 4
        visible = not masked[place]
        expected = masked & ((block > place // 4) | ((block == place // 4) & visible))
        expected[place] = False
        assert torch.equal(differs, expected), place


@KINDS
def test_cached_states_of_a_block_are_those_of_the_two_streams(architecture):
    model, tokens = tiny(architecture), some_tokens()
    masked = some_noise(tokens)[:, 1:] < 0.5
    x_t = tokens.masked_fill(masked, MASK)
    streams = model.two_streams(tokens)
    hidden, clean = model.denoiser(x_t, None, streams, tokens)
    cache = BlockCache(12, 'cpu')
    for begin in (0, 4, 8):
        part = slice(begin, begin + 4)
        cache.waiting = tokens[:, cache.length : begin]
        torch.testing.assert_close(
            model.denoiser(x_t[:, part], cache=cache)[0], hidden[:, part], atol=1e-5, rtol=1e-5
        )
    ar = Autoregressive(replace(model.config, block_length=(0,), ar_weight=0.0))
    ar.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(ar.eval().hidden(tokens), clean, atol=1e-5, rtol=1e-5)


def test_a_block_is_read_in_the_first_pass_of_the_next_one():
    model, seen = tiny(block_length=(4,)), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].size(1)))
    generate(model, [[1]], 11)  # one token per pass
    assert seen == [4] * 3 + [8, 4, 4, 4] * 2


@KINDS
def test_documents_of_a_row_are_what_they_are_alone(architecture):
    model, tokens = tiny(architecture, block_length=(3,), ar_weight=0.3), some_tokens(1)
    doc_ids = torch.tensor([[0] * 5 + [1] * 7])
    loss_mask = torch.ones_like(tokens)
    loss_mask[0, 5] = 0  # its context
    noise = some_noise(tokens)
    together, _, metrics = model(tokens, loss_mask, noise, doc_ids, reduction='none')
    for part in (slice(0, 5), slice(5, 12)):
        own_noise = torch.cat([noise[:, :1], noise[:, 1:][:, part]], 1)
        alone, _, own = model(tokens[:, part], loss_mask[:, part], own_noise, reduction='none')
        torch.testing.assert_close(alone, together[:, part], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own['ar_loss'], metrics['ar_loss'][:, part], atol=1e-5, rtol=1e-5)


def test_blocks_of_padding_alone_are_not_in_the_loss():
    model, tokens = tiny(), some_tokens(1)
    tokens[0, 6:] = IGNORE
    nll, counted, _ = model(tokens, None, torch.zeros(1, 1 + BLOCK), reduction='none')
    assert (nll[0, 1:8] > 0).all() and (nll[0, 8:] == 0).all()
    assert counted[0].tolist() == [False] + [True] * 5 + [False] * 6


def test_the_next_token_loss_is_that_of_an_ar_model_and_trains_with_its_weight():
    tokens = some_tokens()
    noise, model = some_noise(tokens), tiny(ar_weight=0.3)
    ar = Autoregressive(replace(model.config, block_length=(0,), ar_weight=0.0))
    weights = {name: x for name, x in model.state_dict().items() if name != 'neighbours.after.weight'}
    ar.load_state_dict(weights)
    bound, count, metrics = model(tokens, None, noise)
    log_p = ar.hidden(tokens)[:, :-1] @ ar.head_weight().T
    log_p = (
        15 * torch.tanh(log_p / 15) + ar.logit_bias.masked_fill(torch.arange(64) == IGNORE, 0)
    ).log_softmax(-1)
    expected = -log_p.gather(2, tokens[:, 1:, None]).sum()
    torch.testing.assert_close(metrics['ar_loss'], expected, rtol=1e-5, atol=1e-4)
    loss, *rest = model.train()(tokens, None, noise)
    torch.testing.assert_close(loss, bound + 0.3 * expected, rtol=1e-5, atol=1e-4)
    sums = {}
    runtime.add(sums, loss, *rest)  # what is logged beside val/loss
    torch.testing.assert_close(sums['loss'].float(), bound, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------- likelihoods, enumerated

LETTERS, LENGTH = 3, 3
TEXTS = list(product(range(LETTERS), repeat=LENGTH))
ROWS = torch.tensor([(0, *text) for text in TEXTS])  # (27, 4); blocks of two: the context and one, two


def toy(architecture, block_length):
    shape = dict(vocab_size=LETTERS + 1, mask_id=LETTERS, ignore_id=None, block_size=LENGTH + 1, k=2)
    return tiny(architecture, block_length, **shape)


def in_orders(model, **options):
    """p (27,) where the two of the second block are written in either order."""
    turns = [[-1, 0, *turn] for turn in permutations((0, 1))]
    nll = [likelihood.chain_rule(model, ROWS, turn=turn, **options).sum(1).double() for turn in turns]
    return torch.exp(-torch.stack(nll)).mean(0)


@KINDS
@pytest.mark.parametrize('fresh', [True, False])
def test_blocks_are_written_with_the_probabilities_of_their_likelihood(architecture, fresh):
    model = toy(architecture, (2,))
    rows = torch.tensor(generate(model, [[0]] * 10000, LENGTH, fresh_beliefs=fresh))
    p = in_orders(model, carried=not fresh)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert_drawn_from(p, rows[:, 1:] @ torch.tensor([9, 3, 1]))


@KINDS
def test_the_bound_of_blocks_is_the_mean_over_the_orders_in_them(architecture):
    model = toy(architecture, (2,))
    turns = [[-1, 0, *turn] for turn in permutations((0, 1))]
    expected = torch.stack([likelihood.chain_rule(model, ROWS, turn=turn).sum(1) for turn in turns]).mean(0)
    noise = some_noise(torch.zeros(20000, LENGTH + 1), seed=0)
    for place in (0, 13, 26):
        draws = model.nll(ROWS[place].expand(20000, -1), None, noise)
        assert abs(draws.mean() - expected[place]) < 4 * draws.std() / 20000**0.5


@KINDS
@pytest.mark.parametrize('every', [2, 3, 9])
def test_a_step_that_masks_every_nth_block_has_the_same_expected_loss_and_next_tokens(architecture, every):
    model, tokens = tiny(architecture, ar_weight=1.0).train(), some_tokens()
    arguments = tokens, None, some_noise(tokens)

    def losses(every, first):
        model.noisy_blocks = every, first
        loss, count, metrics = model(*arguments)
        return loss - metrics['ar_loss'], metrics['ar_loss'], count

    whole, parts = (
        losses(1, 0),
        [losses(every, first / min(every, 3)) for first in range(min(every, 3))],
    )  # of three blocks
    torch.testing.assert_close(sum(loss for loss, *_ in parts) / len(parts), whole[0])
    for _, *others in parts:
        torch.testing.assert_close(others, list(whole[1:]))
    assert all(0 < loss for loss, *_ in parts)


@KINDS
def test_blocks_of_one_are_an_ar_over_masked_tokens(architecture):
    model = toy(architecture, (1,))
    nll = likelihood.chain_rule(model, ROWS).sum(1)
    expected = torch.zeros(27)
    for i in range(1, LENGTH + 1):
        x = torch.cat([ROWS[:, :i], torch.full((27, 1), LETTERS)], 1)
        cache = BlockCache(LENGTH + 1, 'cpu')
        cache.waiting = x[:, :i]
        log_p = model.head(model.denoiser(x[:, i:], cache=cache)[0])[:, 0].log_softmax(-1)
        expected -= log_p.gather(1, ROWS[:, i : i + 1]).squeeze(1)
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------- the scripts


@pytest.fixture(scope='module', params=['diffusion', 'sdd'])
def trained(request, tmp_path_factory):
    """A run on blocks of four and whole rows, with an ar model in it."""
    path = tmp_path_factory.mktemp(request.param)
    write_folder(path / 'letters')
    words = [f'--dataset={path}/letters', f'--architecture={request.param}', '--block_length=(4,0)']
    words += ['--ar_weight=0.5', '--mask_ratio=(0.2,0.8)', '--mode=documents', '--learning_rate=0.02']
    train(*words, '--schedule=constant', '--max_steps=20', '--eval_every=10', f'--out_dir={path}/run')
    return path / 'run'


def test_a_run_on_blocks_learns_all_its_losses_and_goes_on_where_it_stopped(trained, tmp_path):
    first, *_, last = losses(trained)
    rows = [float(row['val/ar_loss']) for row in metrics(trained) if row['val/ar_loss']]
    assert last < first - 0.2 and rows[-1] < rows[0] - 0.2
    data = trained.parent / 'letters'
    words = [
        f'--dataset={data}',
        f'--init_from={trained}',
        '--schedule=constant',
        f'--out_dir={tmp_path}/whole',
    ]
    words[1:1] = [f'--architecture={load(trained)["architecture"]}', '--p_belief=((0.0,0.5),)']
    train(*words)
    assert load(tmp_path / 'whole')['model_config']['block_length'] == (4, 0)
    train(*words[:-1], '--max_steps=3', f'--out_dir={tmp_path}/half')
    run('train.py', f'--resume_from={tmp_path}/half', '--max_steps=6')
    assert_same_run(tmp_path / 'half', tmp_path / 'whole')


def test_its_decoders_write_and_are_evaluated_apart(trained, tmp_path, capsys):
    words = [f'--checkpoint={trained}', '--num_samples=2', '--device=cpu']
    for options in ([], ['--sampler=ar'], ['--sampler=confidence', '--steps=4'], ['--block_length=0']):
        run('sample.py', *words, '--max_new_tokens=10', '--stop_at_end=False', *options)
    assert 'has no effect' not in capsys.readouterr().out
    for options in (['--sampler=speculative'], ['--block_length=0']):  # which its ar model does not know
        run('evaluate.py', *words, '--metrics=generation', '--sample_tokens=5', *options)
    run('sample.py', *words, '--infill=a <mask:3> b')
    words += ['--max_tokens=60', '--draws=2', '--bound_steps=2']
    run('evaluate.py', *words, f'--output={tmp_path}/results.json')
    results = json.loads((tmp_path / 'results.json').read_text())
    whole, ar = results['models']
    assert whole['steps']['steps'] == 2 * -(-results['block_size'] // 4)  # of all blocks, as sample.py counts
    assert (whole['bound'], ar['bound']) == ('upper', 'exact') and ar['name'].endswith(', as ar')
    assert whole['nats_per_token'] != ar['nats_per_token']


@pytest.mark.slow
@pytest.mark.faults
def test_a_rank_without_validation_rows_has_the_metrics_of_the_others(tmp_path):
    folder = write_folder(tmp_path / 'letters', val=['the cat sees a dog'])
    words = [*TRAIN, f'--dataset={folder}', '--architecture=diffusion', '--block_length=4', '--ar_weight=1']
    finish(*start_ranks('train.py', *words, f'--out_dir={tmp_path}/two'))
    run('train.py', *words, '--batch_size=8', f'--out_dir={tmp_path}/one')
    two, one = (float(metrics(tmp_path / name)[-1]['val/ar_loss']) for name in ('two', 'one'))
    assert two == pytest.approx(one, rel=1e-4)


def test_an_ar_checkpoint_starts_one_and_what_cannot_be_is_refused(tmp_path):
    write_folder(tmp_path / 'letters')
    train(f'--dataset={tmp_path}/letters', f'--out_dir={tmp_path}/ar')
    words = [f'--dataset={tmp_path}/letters', f'--init_from={tmp_path}/ar', '--architecture=sdd']
    train(*words, '--block_length=4', '--ar_weight=1', f'--out_dir={tmp_path}/sdd')
    config = load(tmp_path / 'sdd')['model_config']
    assert config['block_length'] == (4,) and not config['shift']
    first = [float(row['val/ar_loss']) for row in metrics(tmp_path / 'sdd') if row['val/ar_loss']][0]
    assert first == pytest.approx(losses(tmp_path / 'ar')[-1], abs=0.15)  # the clean tokens are the ar model
    with pytest.raises(UserError, match='block_length and ar_weight are for diffusion models'):
        train(f'--dataset={tmp_path}/letters', '--block_length=4')


# ---------------------------------------------------------------------------- self-speculation


def ar_of(model):
    ar = Autoregressive(replace(model.config, block_length=(0,), ar_weight=0.0))
    ar.load_state_dict(model.state_dict(), strict=False)
    return ar.eval()


def test_what_follows_a_rejected_token_is_checked_in_the_next_pass(monkeypatch):
    checks, left = [], []

    def watched(draft, *inputs):
        accepted, token = check_draft(draft, *inputs)
        checks.append((draft, draft[accepted + 1 :]))
        return accepted, token

    monkeypatch.setattr(speculation, 'check_draft', watched)
    generate(tiny(block_length=(8,), ar_weight=1.0, block_size=24), [[1]], 22, sampler='speculative')
    for (_, rest), (draft, _) in pairwise(checks):
        if rest:
            left.append(rest)
            assert draft == rest
    assert left


@KINDS
def test_self_speculation_is_greedily_the_ar_models_text(architecture):
    model = tiny(architecture, ar_weight=1.0, block_size=24)
    prompts = [some_tokens(1, length, seed=length)[0].tolist() for length in range(1, 20, 3)]
    expected = generate(ar_of(model), prompts, 40, temperature=0)
    seen, hidden = [], model.hidden
    model.hidden = lambda *inputs, **options: seen.append(1) or hidden(*inputs, **options)
    rows = generate(model, prompts, 40, temperature=0, sampler='speculative')
    assert rows == expected and len(seen) < 40 * len(prompts)


@pytest.mark.faults
def test_weights_that_give_nan_are_a_sentence_in_self_speculation():
    model = tiny(ar_weight=1.0)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0] = torch.inf
    with pytest.raises(ValueError, match='computes nan: its weights are damaged'):
        generate(model, [[1, 2]], 4, sampler='speculative')


def test_self_speculation_drafts_the_first_blocks_that_are_none_of_a_whole_row():
    model = tiny(block_length=(0, 4), ar_weight=1.0)
    text = generate(model, [[1, 2]], 6, temperature=0, sampler='speculative', block_length=4)
    assert generate(model, [[1, 2]], 6, temperature=0, sampler='speculative') == text
    with pytest.raises(ValueError, match='block_length=0 is the whole row'):
        generate(model, [[1, 2]], 6, sampler='speculative', block_length=0)


def test_self_speculation_fills_no_gaps():
    with pytest.raises(ValueError, match='fills no <|mask|>; choose another'):
        generate(tiny(ar_weight=1.0), [[1, MASK, 2]], 4, sampler='speculative')


@pytest.mark.faults
def test_self_speculation_stops_and_tells_what_it_returns():
    model, told = tiny(block_length=(8,), ar_weight=1.0, block_size=24), []
    for weight in model.parameters():
        weight.data.zero_()  # all tokens are as likely for both, so each draft is accepted
    for seed in range(8):
        told.clear()
        options = dict(
            sampler='speculative', seed=seed, stop_tokens=[5], stream=lambda new: told.extend(new[0])
        )
        (row,) = generate(model, [[1, 2]], 11, **options)
        assert row[2:] == told and len(told) <= 11 and 5 not in told[:-1]


@pytest.mark.faults
def test_blocks_that_leave_no_room_for_what_is_before_them_are_refused_and_whole_rows_are_not():
    with pytest.raises(ValueError, match='blocks of 16 leave no room .*; ask for at most 15 tokens'):
        generate(tiny(block_length=(16,), block_size=24), [[1]], 20)
    assert len(generate(tiny(block_length=(32,), block_size=24), [[1]], 30)[0]) == 31


@pytest.mark.parametrize('block', [2, 4])  # of four: what is left of a rejected draft is checked as well
@pytest.mark.parametrize('options', [{}, {'temperature': 0.7, 'top_k': 2}, {'top_p': 0.6}])
def test_self_speculation_draws_from_the_ar_model(options, block):
    shape = dict(vocab_size=LETTERS + 1, mask_id=LETTERS, ignore_id=None, block_size=LENGTH + 5, k=2)
    model = tiny('diffusion', (block,), ar_weight=1.0, **shape)
    rows = torch.tensor(generate(model, [[0]] * 400, LENGTH, sampler='speculative', **options))
    logits = ar_of(model).logits(ROWS[:, :-1]).double().flatten(0, 1)
    q = restrict(logits, options.get('temperature', 1), options.get('top_k'), options.get('top_p'))
    q = (q / q.sum(-1, keepdim=True)).view(27, LENGTH, -1)
    p = q.gather(2, ROWS[:, 1:, None]).squeeze(-1).prod(1)
    assert_drawn_from(p, rows[:, 1:] @ torch.tensor([9, 3, 1]))
