"""What benchmarks/sample.py promises apart from its figures."""

import subprocess
import sys

import pytest
import torch
from conftest import random_model
from test_sample import make_checkpoint

from benchmarks import sample
from lm.configurator import UserError

SHAPE = dict(vocab_size=100, block_size=24, n_layer=2, n_head=2, n_embd=32)


def test_a_mistake_is_one_sentence():
    done = subprocess.run([sys.executable, sample.__file__, '--runs=0'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == 'error: runs is 0; it must be at least 1.\n'


@pytest.mark.parametrize(
    'changes, said',
    [
        (dict(what='best'), "what is 'best'; choose speed or"),
        (dict(what='ar'), 'has no model.py.*karpathy/nanoGPT'),
        (dict(what='diffusion', peer='.'), r'--peer=\. has no src/core/model.py.*diffusion-llm'),
        (dict(what='quality'), 'needs --checkpoint'),
        (dict(new_tokens=2000), 'new_tokens is 2000'),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, said, monkeypatch):
    monkeypatch.setattr(sample, 'config', type(sample.config)(sample.config.known))
    with pytest.raises(UserError, match=said):
        sample.measure(**changes)


@pytest.mark.slow
def test_speed_is_of_each_architecture_sampler_and_batch(capsys, monkeypatch):
    monkeypatch.setattr(sample, 'VOCABULARY', 64)
    sample.measure({'peer': '', 'runs': 1}, length=40, steps=4, batches=(1, 2))  # as bench.py calls it
    lines = [
        line.split(':')[0].split() for line in capsys.readouterr().out.splitlines() if 'first token' in line
    ]
    assert (
        len(lines) == 2 * (1 + 2 * 6)
        and ['ar', 'batch', '2'] in lines
        and ['sdd', 'cached', 'batch', '1'] in lines
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_nothing_is_measured_and_nothing_missed(capsys):
    assert sample.measure(what='gpu') == [] and 'no GPU here' in capsys.readouterr().out


@pytest.mark.parametrize('tied', [True, False])
def test_a_decoded_token_reads_all_weights_that_it_needs(tied):
    model = random_model('ar', 0.3, **SHAPE, n_kv_head=1, tied=tied)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    cache = 2 * 2 * 16  # keys and values of two layers, one head of 16
    assert sample.bytes_per_token(model, 10) == 4 * (128 * 32 + blocks + 5 * cache)


@pytest.mark.parametrize('compile', [False, True])
def test_the_rate_of_decoding_is_of_a_token_at_a_time(compile, monkeypatch):
    backend, seen = torch.compile, []
    monkeypatch.setattr(torch, 'compile', lambda step: backend(step, backend='eager'))
    model = random_model('ar', 0.3, **SHAPE)
    model.register_forward_hook(lambda *_: None)
    hidden = model.hidden
    if not compile:
        model.hidden = lambda tokens, cache: seen.append(tokens.shape) or hidden(tokens, cache)
    assert sample.decode_rate(model, 20, compile) > 0
    assert compile or seen == [(1, 1)] * 20


def test_the_fastest_setting_is_as_good_as_the_first(capsys):
    sample.say_fastest(
        [
            ('ancestral 8', 10.0, 2.0, 5.0),
            ('confidence 4', 20.0, 1.5, 4.0),
            ('confidence 8', 12.0, 2.04, 4.9),
            ('threshold 8', 90.0, 2.06, 5.0),
        ]
    )
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        [
            'ancestral',
            'ancestral 8, 10 tokens/s, 1.00 times; as varied: ancestral 8, 10 tokens/s, 1.00 times',
        ],
        [
            'confidence',
            'confidence 4, 20 tokens/s, 2.00 times; as varied: confidence 8, 12 tokens/s, 1.20 times',
        ],
        ['threshold', 'none; as varied: none'],
    ]


@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
def test_quality_counts_what_was_computed(architecture, tmp_path, capsys):
    path, judge = make_checkpoint(architecture, tmp_path), make_checkpoint('ar', tmp_path)
    sample.measure(
        what='quality',
        checkpoint=str(path),
        judge=str(judge),
        num_samples=3,
        batch_size=2,
        settings='confidence 1, confidence 3, cached 1/4, threshold 1 0.0',
        seed=0,
    )
    passes = [
        float(line.split(' passes')[0].split()[-1])
        for line in capsys.readouterr().out.splitlines()
        if 'passes' in line
    ]
    assert passes[:2] == [31.0, 3.0]  # of 32 tokens the first is given
    assert 1 < passes[2] < 8 and passes[3] < 31
