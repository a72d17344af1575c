"""A checkpoint as the start of a model of another architecture, of blocks, or of shorter rows."""

import pytest
import torch
from helpers import GPT2_SWITCHES
from test_checkpoints import make_checkpoint, some_tokens

import sampling
from lm import checkpoints, optim
from lm.configurator import UserError


def converted(checkpoint, architecture='diffusion', **settings):
    return checkpoints.load_model(checkpoints.convert(checkpoint, 'ar.pt', architecture, **settings), 'cpu')


@pytest.mark.parametrize(
    'changes',
    [{}, {'tied': False, 'n_head': 4, 'n_kv_head': 2}, {**GPT2_SWITCHES, 'embedding_width': 8}],
    ids=['native', 'untied', 'projected'],
)
@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
@torch.no_grad()
def test_a_converted_model_begins_as_the_ar_model_one_position_on(architecture, changes):
    ar, checkpoint = make_checkpoint(**changes)
    model, tokens = converted(checkpoint, architecture).train(), some_tokens()
    expected = ar.logits(tokens)[:, :-1, :28]
    model.attn_mask = optim.annealed_mask(0, 10, 16, seed=0)
    torch.testing.assert_close(model.logits(tokens)[:, 1:, :28], expected, atol=1e-5, rtol=0)
    model.attn_mask = None
    assert (model.logits(tokens)[:, 1:, :28] - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.faults
def test_two_streams_have_no_shift():
    assert converted(make_checkpoint()[1], ar_weight=1.0).config.shift is False
    shifted = checkpoints.convert(make_checkpoint()[1], 'ar.pt', 'diffusion')
    for blocks in ({'block_length': (4,)}, {'ar_weight': 1.0}):
        with pytest.raises(
            UserError, match='a token from the position before it, so it is no start for blocks'
        ):
            checkpoints.convert(shifted, 'dream.pt', 'diffusion', **blocks)


def test_loss_and_sampling_of_a_converted_model_see_the_same_shift():
    model, tokens = converted(make_checkpoint()[1]), some_tokens()
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, [3, 4, 9]] = True
    log_p = model.logits(tokens.masked_fill(masked, 28)).log_softmax(-1)
    expected = -log_p.gather(2, tokens[..., None]).squeeze(2)
    noise = torch.cat([torch.ones(3, 1), 1 - masked.float()], 1)
    nll, *_ = model(tokens, masked, noise, reduction='none')
    torch.testing.assert_close(nll, expected * masked)
    rows = sampling.generate(model, tokens.masked_fill(masked, 28).tolist(), 0, steps=1, temperature=0)
    assert torch.equal(torch.tensor(rows)[masked], log_p[masked].argmax(-1))


@torch.no_grad()
def test_a_masked_token_never_leaks_through_the_shift():
    model, tokens = converted(make_checkpoint()[1]), some_tokens()
    noise = torch.full((3, 17), 0.9)
    noise[:, [0, 4, 8, 9]] = 0.5
    masked = noise[:, 1:] < model.mask_ratio(noise)
    other = torch.where(masked, (tokens + 1) % 28, tokens)
    first, second = (model(x, None, noise, reduction='none')[0] for x in (tokens, other))
    assert torch.equal(first != second, masked) and masked.sum() == 9  # another target, nothing else


def test_rows_that_ar_never_learned_are_the_mean_of_those_that_it_did():
    for changes in ({}, {'tied': False}):
        ar, checkpoint = make_checkpoint(**changes)
        model = converted(checkpoint)
        for name in ('embedding', 'unembedding') if changes else ('embedding',):
            before, after = getattr(ar, name).weight, getattr(model, name).weight
            torch.testing.assert_close(after[28:30], before[:28].mean(0).expand(2, -1))
            assert torch.equal(after[:28], before[:28]) and not torch.equal(before[28], after[28])


@torch.no_grad()
def test_a_diffusion_model_starts_an_sdd_model_that_is_the_same_without_beliefs():
    diffusion, checkpoint = make_checkpoint('diffusion')
    sdd, tokens = converted(checkpoint, 'sdd'), some_tokens()
    assert torch.equal(sdd.denoiser(tokens, k=0)[0], diffusion.denoiser(tokens)[0])
    assert torch.equal(sdd.belief_proj.weight, torch.eye(16)) and not sdd.config.shift


@pytest.mark.parametrize('position', ['rope', 'learned'])
def test_a_start_may_have_shorter_rows(position):
    ar, checkpoint = make_checkpoint(position=position)
    model = converted(checkpoint, 'ar', block_size=8)
    assert model.config.block_size == 8
    torch.testing.assert_close(model.logits(some_tokens(8)), ar.logits(some_tokens(8)))
    with pytest.raises(UserError, match='ar.pt sees 16 tokens; choose a smaller block_size'):
        converted(checkpoint, 'ar', block_size=17)


@pytest.mark.parametrize('held, wanted', [('diffusion', 'ar'), ('sdd', 'diffusion'), ('ar', 'rnn')])
def test_what_a_model_cannot_start_is_refused(held, wanted):
    expected = f"holds architecture='{held}', no start for '{wanted}'; use --arch"
    with pytest.raises(UserError, match=expected):
        checkpoints.convert(make_checkpoint(held)[1], 'run', wanted)
