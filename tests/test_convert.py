"""An `ar` model as the start of a bidirectional one."""

import json

import pytest
import torch
from conftest import random_model, write_folder
from test_train import GPT2, load, same, train

import sampling
from lm import checkpoints, data, likelihood
from lm.configurator import UserError

SHAPE = dict(vocab_size=30, block_size=16, n_layer=2, n_head=2, n_embd=16, mask_id=28, ignore_id=29)


def ar_checkpoint(**changes):
    model = random_model('ar', 0.4, **{**SHAPE, **changes})
    return model, {
        'architecture': 'ar',
        'model_config': vars(model.config),
        'model_state_dict': model.state_dict(),
    }


def converted(checkpoint, architecture='diffusion', **settings):
    return checkpoints.load_model(checkpoints.as_start(checkpoint, 'ar.pt', architecture, **settings), 'cpu')


def some_tokens(length=16):
    return torch.randint(0, 28, (3, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'tied': False, 'n_head': 4, 'n_kv_head': 2},
        {'norm': 'layer', 'position': 'learned', 'embedding_width': 8},
    ],
    ids=['native', 'untied', 'narrow'],
)
@torch.no_grad()
def test_a_converted_model_begins_as_the_ar_model_one_position_on(changes):
    ar, checkpoint = ar_checkpoint(**changes)
    model, tokens = converted(checkpoint).train(), some_tokens()
    model.opening = data.opening(0, 10, 16, seed=0)
    torch.testing.assert_close(
        model.logits(tokens)[:, 1:, :28], ar.logits(tokens)[:, :-1, :28], atol=1e-5, rtol=0
    )
    model.opening = None
    assert (model.logits(tokens)[:, 1:, :28] - ar.logits(tokens)[:, :-1, :28]).abs().max() > 0.1


@torch.no_grad()
def test_every_reader_of_a_converted_model_sees_the_same_shift():
    model, tokens = converted(ar_checkpoint()[1]), some_tokens()
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[:, [3, 4, 9]] = True
    log_p = model.logits(tokens.masked_fill(hidden, 28)).log_softmax(-1)
    expected = -log_p.gather(2, tokens[..., None]).squeeze(2)
    noise = torch.cat([torch.ones(3, 1), 1 - hidden.float()], 1)
    torch.testing.assert_close(model.losses(tokens, hidden, noise)[0], expected * hidden)
    last = torch.zeros_like(hidden)
    last[:, 9] = True
    torch.testing.assert_close(
        likelihood.chain_rule(model, tokens, last)[:, 9],
        -model.logits(tokens.masked_fill(last, 28))
        .log_softmax(-1)[:, 9]
        .gather(1, tokens[:, 9:10])
        .squeeze(1),
    )
    filled = sampling.generate(model, tokens.masked_fill(last, 28).tolist(), 0, temperature=0)
    assert [row[9] for row in filled] == model.logits(tokens.masked_fill(last, 28))[:, 9].argmax(-1).tolist()


@torch.no_grad()
def test_a_hidden_token_never_leaks_through_the_shift():
    model, tokens = converted(ar_checkpoint()[1]), some_tokens()
    noise = torch.full((3, 17), 0.9)
    noise[:, [0, 4, 8, 9]] = 0.5
    masked = noise[:, 1:] < model.levels(noise)
    other = torch.where(masked, (tokens + 1) % 28, tokens)
    first, second = (model.losses(x, None, noise)[0] for x in (tokens, other))
    assert (
        torch.equal(first != second, masked) and masked.sum() == 9
    )  # another token is scored, nothing else moves


def test_rows_that_ar_never_learned_are_the_mean_of_those_that_it_did():
    for changes in ({}, {'tied': False}):
        ar, checkpoint = ar_checkpoint(**changes)
        model = converted(checkpoint)
        for name in ('embedding', 'unembedding') if changes else ('embedding',):
            before, after = getattr(ar, name).weight, getattr(model, name).weight
            torch.testing.assert_close(after[28:30], before[:28].mean(0).expand(2, -1))
            assert torch.equal(after[:28], before[:28]) and not torch.equal(before[28], after[28])


@pytest.mark.parametrize('position', ['rope', 'learned'])
def test_a_start_may_have_shorter_rows(position):
    ar, checkpoint = ar_checkpoint(position=position)
    model = converted(checkpoint, 'ar', block_size=8)
    assert model.config.block_size == 8
    torch.testing.assert_close(model.logits(some_tokens(8)), ar.logits(some_tokens(8)))
    with pytest.raises(UserError, match='ar.pt sees at most 16 tokens'):
        converted(checkpoint, 'ar', block_size=17)


def test_what_a_diffusion_model_cannot_start_is_refused():
    model = random_model('diffusion', 0.4, **SHAPE)
    checkpoint = {
        'architecture': 'diffusion',
        'model_config': vars(model.config),
        'model_state_dict': model.state_dict(),
    }
    with pytest.raises(
        UserError, match="holds architecture='diffusion', which cannot start 'ar'; use --arch"
    ):
        checkpoints.as_start(checkpoint, 'run', 'ar')


# ---------------------------------------------------------------------------- annealing


def test_attention_opens_gradually_and_depends_on_seed_and_step_only():
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    masks = [data.opening(step, 10, 64, seed=3) for step in range(10)]
    assert torch.equal(masks[0], causal) and data.opening(10, 10, 64, seed=3) is None
    assert all((mask | ~causal).all() for mask in masks)  # what is behind is always seen
    for step, mask in enumerate(masks):
        assert mask[~causal].float().mean() == pytest.approx(step / 10, abs=0.05)
        assert torch.equal(mask, data.opening(step, 10, 64, seed=3))
    assert not torch.equal(masks[5], data.opening(5, 10, 64, seed=4))
    assert not torch.equal(data.opening(50, 100, 64, seed=3), data.opening(51, 100, 64, seed=3))


@pytest.mark.parametrize('checkpointing', [False, True])
def test_training_sees_what_is_open_and_evaluation_everything(checkpointing):
    model = random_model('diffusion', 0.4, **SHAPE, gradient_checkpointing=checkpointing)
    tokens, other = some_tokens(), some_tokens()
    other[:, 9] = (other[:, 9] + 1) % 28
    model.opening = torch.ones(16, 16, dtype=torch.bool).tril()

    def seen():
        return ((model.logits(tokens) - model.logits(other))[..., :28].abs().amax((0, 2)) > 1e-5).tolist()

    model.train()
    assert seen() == [False] * 9 + [True] * 7
    model.eval()
    assert all(seen())


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A folder with prepared data and an ar run on it."""
    path = tmp_path_factory.mktemp('base')
    write_folder(path / 'letters')
    train(f'--dataset={path}/letters', f'--out_dir={path}/ar', '--max_steps=30')
    return path


@pytest.mark.slow
def test_an_ar_run_starts_a_diffusion_run_that_resumes_bit_for_bit(base, tmp_path):
    settings = [
        f'--dataset={base}/letters',
        '--architecture=diffusion',
        f'--init_from={base}/ar',
        '--max_steps=8',
        '--anneal_steps=6',
        '--eval_every=4',
    ]
    whole = train(*settings, f'--out_dir={tmp_path}/whole')
    state = load(tmp_path / 'whole')
    assert state['model_config']['shift'] and state['architecture'] == 'diffusion'
    assert json.loads((tmp_path / 'whole' / 'config.json').read_text())['anneal_steps'] == 6
    assert whole['raw_model'].opening is None  # at the end attention is full
    train(*settings, f'--out_dir={tmp_path}/part', '--max_steps=4', '--schedule=constant')
    train(*settings, f'--out_dir={tmp_path}/other', '--schedule=constant')
    train(f'--resume_from={tmp_path}/part', '--max_steps=8')
    for key in ('model_state_dict', 'optimizer_state_dict'):
        assert same(load(tmp_path / 'part')[key], load(tmp_path / 'other')[key])
    with pytest.raises(UserError, match='anneal_steps=6, so it cannot go on with 2'):
        train(f'--resume_from={tmp_path}/part', '--max_steps=9', '--anneal_steps=2')


@pytest.mark.parametrize('shape', [[], GPT2], ids=['native', 'gpt2'])
def test_by_default_a_tenth_of_the_steps_opens_and_a_scratch_run_has_none(shape, base, tmp_path):
    settings = [f'--dataset={base}/letters', '--max_steps=20', '--eval_every=20', *shape]
    train(*settings, f'--out_dir={tmp_path}/ar')
    diffusion = [*settings[:3], '--architecture=diffusion']
    started = train(*diffusion, f'--init_from={tmp_path}/ar/best.pt', f'--out_dir={tmp_path}/started')
    assert started['anneal_steps'] == 2
    assert train(*diffusion, f'--out_dir={tmp_path}/scratch')['anneal_steps'] == 0
    with pytest.raises(UserError, match="anneal_steps is 3, but 'ar' never looks ahead"):
        train(*settings, '--anneal_steps=3', f'--out_dir={tmp_path}/no')
    assert not (tmp_path / 'no').exists()


def test_the_hubs_token_is_written_nowhere(base, tmp_path):
    train(f'--dataset={base}/letters', f'--out_dir={tmp_path}/run', '--token=hf_secret', '--max_steps=2')
    assert not [
        path for path in (tmp_path / 'run').rglob('*') if path.is_file() and b'hf_secret' in path.read_bytes()
    ]
