"""An architecture that is added to ARCHITECTURES, and nowhere else, goes through every script."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import letter_tokenizer, write_folder, write_small_checkpoint
from helpers import assert_same_run, losses, metrics, run, train

import hf
from lm import checkpoints, families
from lm.configurator import UserError
from model import ARCHITECTURES, Autoregressive, Diffusion, ModelConfig, Transformer, reduced


class Focal(Diffusion):
    """Masked diffusion whose loss is that of surely predicted tokens the least: no bound of -log p."""

    bound = 'none'

    def forward(self, tokens, loss_mask=None, noise=None, doc_ids=None, reduction='sum'):
        maskable, counted = self.loss_positions(tokens, loss_mask)
        x_t, masked = self.corrupt(tokens, maskable, noise, self.mask_ratio(noise))
        nll, pred = self.token_nll(self.hidden(x_t, doc_ids), tokens, masked)
        loss = (1 - torch.exp(-nll)) ** 2 * nll  # (B, T)
        metrics = {'correct': (pred == tokens) & counted, 'predicted': masked & counted}
        metrics['certainty'] = torch.exp(-nll).detach() * counted
        return reduced(reduction, loss.sum(), loss, counted, metrics)


class Smoothed(Transformer):
    """Predicts the next token with smoothed targets: a causal model whose loss is no likelihood."""

    causal, extra_tokens = True, 1
    needs_noise, trains_on_padding = False, False

    def forward(self, tokens, loss_mask=None, noise=None, doc_ids=None, reduction='sum'):
        _, counted = self.loss_positions(tokens, loss_mask)
        h = self.hidden(tokens[:, :-1])
        loss, nll, pred = self.weighted_nll(h, tokens[:, 1:], counted[:, 1:].float(), label_smoothing=0.1)
        nll, pred = F.pad(nll, (1, 0)), F.pad(pred, (1, 0), value=-1)
        metrics = {'correct': (pred == tokens) & counted, 'predicted': counted}
        metrics['certainty'] = torch.exp(-nll) * counted
        return reduced(reduction, loss, nll, counted, metrics)


class Filler(Transformer):
    """Predicts the masked third of a row: bidirectional, on the trunk alone."""

    def forward(self, tokens, loss_mask=None, noise=None, doc_ids=None, reduction='sum'):
        maskable, counted = self.loss_positions(tokens, loss_mask)
        masked = maskable & (noise[:, 1:] < 1 / 3)
        h = self.hidden(tokens.masked_fill(masked, self.config.mask_id), doc_ids)
        loss, nll, pred = self.weighted_nll(h, tokens, masked.float())
        metrics = {'correct': (pred == tokens) & counted, 'predicted': masked & counted}
        metrics['certainty'] = torch.exp(-nll) * counted
        return reduced(reduction, loss, nll, counted, metrics)


KINDS = {'focal': Focal, 'smoothed': Smoothed, 'filler': Filler}


class Scaled(Autoregressive):
    """Logits times a number of its own: another function than that of its base, with a weight that this lacks."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def head(self, hidden, weight=None):
        return self.scale * super().head(hidden, weight)


def test_a_subclass_is_no_model_of_its_bases_family_and_says_what_it_lacks_of_its_weights(
    monkeypatch, tmp_path
):
    monkeypatch.setitem(ARCHITECTURES, 'scaled', Scaled)
    config = ModelConfig(vocab_size=64, mask_id=62, ignore_id=63, **families.published_config('llama3', 32))
    assert families.family_of('ar', config)[0] == 'llama'
    assert families.family_of('scaled', config) == families.family_of(Scaled, config) == (None, None)
    path = write_small_checkpoint(tmp_path / 'run' / 'ckpt.pt', 'ar', letter_tokenizer())
    with pytest.raises(
        UserError, match='has no scale of architecture=.scaled.; let new_weights of Scaled in model.py'
    ):
        checkpoints.convert(checkpoints.load(path), path, 'scaled', None)
    monkeypatch.setattr(Scaled, 'new_weights', classmethod(lambda cls, config: {'scale': torch.ones(1)}))
    converted = checkpoints.convert(checkpoints.load(path), path, 'scaled', None)
    tokens = torch.arange(8)[None]
    one, other = (
        checkpoints.load_model(c, 'cpu').logits(tokens) for c in (converted, checkpoints.load(path))
    )
    assert torch.equal(one, other)  # attention does not change, so neither does what is predicted where


class Wandb(SimpleNamespace):
    """A W&B that keeps what it is told."""

    id, mode = 'abc', None

    def __init__(self):
        self.logged = []

    def login(self, prompt):
        return True

    def init(self, **settings):
        return self

    def log(self, values, step):
        self.logged.append({**values, 'step': step})

    def finish(self):
        pass


@pytest.fixture(scope='module', params=KINDS)
def name(request):
    """The name of an architecture that was added, before the class that it is made from."""
    others = dict(ARCHITECTURES)
    ARCHITECTURES.clear()
    ARCHITECTURES.update({request.param: KINDS[request.param], **others})
    yield request.param
    del ARCHITECTURES[request.param]


@pytest.fixture(scope='module')
def trained(name, tmp_path_factory):
    """A run of it, and what W&B was told."""
    path, wandb = tmp_path_factory.mktemp(name), Wandb()
    write_folder(path / 'letters')
    settings = ['--max_steps=40', '--eval_every=20', '--learning_rate=0.03', '--no_wandb=False']
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'wandb', wandb)
        patch.delenv('WANDB_MODE', raising=False)
        train(f'--dataset={path}/letters', f'--architecture={name}', *settings, f'--out_dir={path}/run')
    return path / 'run', wandb.logged


def test_its_own_loss_trains_and_its_metric_reaches_every_log(name, trained):
    out, logged = trained
    first, *_, last = losses(out)
    assert last < first - 0.2
    rows = metrics(out)
    assert all(0 < float(row['train/certainty']) < 1 for row in rows[1:])
    evaluated = [float(row['val/certainty']) for row in rows if row['val/certainty']]
    assert len(evaluated) == 3 and 0 < evaluated[0] < evaluated[-1] < 1
    values = [{name: value for name, value in row.items() if value} for row in rows]
    told = [{name: str(row[name]) for name in wanted} for row, wanted in zip(logged, values, strict=True)]
    assert told == values  # W&B has the names and values of metrics.csv


def test_a_run_of_it_goes_on_where_it_stopped(name, trained, tmp_path):
    letters = trained[0].parent / 'letters'
    settings = [f'--dataset={letters}', f'--architecture={name}', '--schedule=constant']
    train(*settings, f'--out_dir={tmp_path}/whole')
    train(*settings, '--max_steps=3', f'--out_dir={tmp_path}/half')
    run('train.py', f'--resume_from={tmp_path}/half', '--max_steps=6')
    assert_same_run(tmp_path / 'half', tmp_path / 'whole')


def test_it_samples(trained, capsys):
    out, _ = trained
    capsys.readouterr()
    run('sample.py', f'--checkpoint={out}', '--num_samples=2', '--max_new_tokens=8', '--device=cpu')
    text = capsys.readouterr().out
    assert len(re.sub('[^a-z]', '', text)) > 8


def test_it_is_evaluated_without_a_claim_to_a_bound(trained, tmp_path, capsys):
    out, _ = trained
    capsys.readouterr()
    words = [f'--checkpoint={out}', '--num_samples=2', '--device=cpu', f'--output={tmp_path}/results.json']
    run('evaluate.py', *words)
    assert 'no bound' in capsys.readouterr().out
    (figures,) = json.loads((tmp_path / 'results.json').read_text())['models']
    assert figures['bound'] == 'none'


def test_it_is_exported_and_comes_back(name, trained, tmp_path):
    out, _ = trained
    hf.main(['export', str(out), f'--out={tmp_path}/exported'])
    loaded = checkpoints.load(tmp_path / 'exported')
    assert loaded['architecture'] == name
    tokens = torch.arange(16)[None]
    one, other = (checkpoints.load_model(c, 'cpu').logits(tokens) for c in (loaded, checkpoints.load(out)))
    assert torch.equal(one, other)
