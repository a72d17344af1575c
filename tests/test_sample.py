"""sample.py as a user runs it, from nothing but a ckpt.pt."""

import re
import runpy
import shutil
import sys

import pytest
import torch
from conftest import letter_tokenizer

from lm import checkpoints
from lm.configurator import ROOT, UserError

BLOCK = 32


@pytest.fixture(params=['ar', 'diffusion', 'sdd'])
def checkpoint(request, tmp_path):
    return make_checkpoint(request.param, tmp_path)


def make_checkpoint(architecture, folder):
    torch.manual_seed(0)
    tokenizer = letter_tokenizer()
    model = checkpoints.make_model(
        architecture,
        vocab_size=tokenizer.vocab_size,
        block_size=BLOCK,
        n_layer=1,
        n_head=2,
        n_embd=16,
        mask_id=tokenizer.mask_id,
        ignore_id=tokenizer.ignore_id,
    )
    path = folder / f'{architecture}.pt'
    checkpoints.save(
        path,
        {
            'architecture': architecture,
            'global_step': 7,
            'model_state_dict': model.state_dict(),
            'model_config': vars(model.config),
            'tokenizer': tokenizer.to_json(),
            'start_token': tokenizer.endoftext_id,
            'prompt_format': None,
        },
    )
    return path


def sample(capsys, monkeypatch, *options):
    """The samples that sample.py prints, without the lines between them."""
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--device=cpu', '--stop_at_end=False', *map(str, options)])
    runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
    header, *samples = capsys.readouterr().out.split('-' * 80 + '\n')
    assert 'step 7' in header
    return [text.removesuffix('\n') for text in samples]


def test_a_prompt_is_continued(checkpoint, capsys, monkeypatch):
    texts = sample(
        capsys,
        monkeypatch,
        f'--checkpoint={checkpoint}',
        '--prompt=the cat',
        '--num_samples=2',
        '--max_new_tokens=9',
    )
    assert len(texts) == 2 and all(text.startswith('the cat') and len(text) > 7 for text in texts)
    assert texts == sample(
        capsys,
        monkeypatch,
        f'--checkpoint={checkpoint}',
        '--prompt=the cat',
        '--num_samples=2',
        '--max_new_tokens=9',
    )


def test_the_checkpoint_is_all_that_it_needs(checkpoint, tmp_path, capsys, monkeypatch):
    folder = tmp_path / 'elsewhere'
    folder.mkdir()
    shutil.move(checkpoint, folder / 'ckpt.pt')
    monkeypatch.chdir(folder)
    assert (
        len(sample(capsys, monkeypatch, f'--checkpoint={folder}', '--max_new_tokens=50')) == 3
    )  # past the block


def test_a_prompt_comes_from_a_file(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / 'prompt.txt').write_text('a small bird')
    (text,) = sample(
        capsys,
        monkeypatch,
        f'--checkpoint={checkpoint}',
        f'--prompt=FILE:{tmp_path}/prompt.txt',
        '--num_samples=1',
        '--max_new_tokens=3',
    )
    assert text.startswith('a small bird')


@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
@pytest.mark.parametrize('sampler', ['ancestral', 'confidence', 'blocks', 'threshold', 'remdm'])
def test_gaps_are_filled_and_the_rest_stays(sampler, architecture, tmp_path, capsys, monkeypatch):
    path = make_checkpoint(architecture, tmp_path)
    (text,) = sample(
        capsys,
        monkeypatch,
        f'--checkpoint={path}',
        '--infill=the <mask:4> sat<mask:2>',
        '--num_samples=1',
        f'--sampler={sampler}',
        '--top_k=9',
    )
    assert text.startswith('the ') and ' sat' in text and '<mask' not in text


def test_candidates_are_shown_with_their_probabilities(tmp_path, capsys, monkeypatch):
    path = make_checkpoint('sdd', tmp_path)
    shown = sample(
        capsys,
        monkeypatch,
        f'--checkpoint={path}',
        '--max_new_tokens=9',
        '--num_samples=1',
        '--k=2',
        '--show_candidates',
        '--candidate_steps=1,5',
    )
    assert [text.split(':')[0] for text in shown[:-1]] == ['after step 1 of 9', 'after step 5 of 9']
    for text in shown[:-1]:
        first, *places = text.splitlines()
        assert len(places) == first.count('▁')
        for place in places:
            numbers = [float(number) for number in re.findall(r'\d\.\d{3}', place)]
            assert len(numbers) == 3 and abs(sum(numbers) - 1) < 2e-3  # two candidates, and any other token


@pytest.mark.parametrize(
    'options, said',
    [
        (['--show_candidates'], 'keeps no candidates'),
        (['--k=-1'], 'k is -1'),
        (['--checkpoint=nowhere.pt'], 'nowhere.pt'),
        (['--prompt=' + 40 * 'a'], 'has 41 tokens'),
        (['--prompt=what?'], "'?'"),
        (['--prompt=FILE:nowhere.txt'], 'nowhere.txt'),
        (['--infill=the cat'], '<mask:12>'),
        (['--infill=the <mask:2>'], 'autoregressive'),
        (['--infill=a<mask:1>', '--prompt=b'], 'leave one out'),
        (['--num_samples=0'], 'num_samples is 0'),
        (['--temperature=-1.0'], 'temperature is -1.0'),
        (['--sampler=best'], "sampler is 'best'"),
    ],
)
def test_a_mistake_is_one_sentence(options, said, tmp_path, capsys, monkeypatch):
    path = make_checkpoint('ar', tmp_path)
    with pytest.raises(UserError, match='(?s)' + said.replace('?', r'\?')):
        sample(capsys, monkeypatch, f'--checkpoint={path}', *options)
