"""What bench.py promises apart from its figures: no timing, no peer, no data but what is made here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from benchmarks import compare
from benchmarks.timing import Target
from lm import checkpoints, data
from lm.configurator import UserError

BENCH = Path(__file__).resolve().parent.parent / 'bench.py'
PEER_LINES = [
    (0.5, 'step 0: train loss 4.2, val loss 4.2'),
    (1.0, 'iter 0: loss 4.2, time 9.9ms, mfu -100.00%'),
    (9.0, 'iter 10: loss 3.0, time 1.0ms, mfu 0.01%'),
    (12.0, 'iter 30: loss 2.5, time 1.0ms, mfu 0.01%'),
]
OUR_LINES = [
    (0.5, 'step 0: val/loss 4.2, val/accuracy 0.0'),
    (9.0, 'step 10/30: loss 3.0, lr 1e-3, 9 tokens/s, 0:01 left'),
    (12.0, 'step 30/30: loss 2.5, lr 0.0, 9 tokens/s, 0:00 left'),
    (15.0, 'step 30: val/loss 2.4'),
]


def prepare(path, characters, sizes):
    """A prepared folder of random characters."""
    path.mkdir()
    vocabulary = {character: i for i, character in enumerate(characters)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token='?')
    tokenizer = data.Tokenizer(tokenizers.Tokenizer(model).to_str())
    (path / 'tokenizer.json').write_text(tokenizer.to_json(), encoding='utf-8')
    for split, size in sizes.items():
        tokens = np.random.default_rng(0).integers(0, len(characters), size).astype('uint16')
        tokens.tofile(path / f'{split}_tokens.bin')
        np.array([0, size], 'uint64').tofile(path / f'{split}_index.bin')
    splits = {split: {'tokens': size, 'documents': 1, 'bytes': size} for split, size in sizes.items()}
    (path / 'config.json').write_text(
        json.dumps(
            {
                'name': path.name,
                'dtype': 'uint16',
                'vocab_size': tokenizer.vocab_size,
                'start_token': 0,
                'prompt_format': None,
                'splits': splits,
            }
        )
    )
    return data.Folder(path)


@pytest.mark.parametrize('lines', (PEER_LINES, OUR_LINES))
def test_both_sides_are_timed_between_the_same_steps(lines):
    assert compare.seconds_per_step(lines, warmup=10) == pytest.approx(3 / 20)


def test_loss_counts_each_token_but_the_first_once(tmp_path):
    folder = prepare(tmp_path / 'letters', 'abcdefgh', {'train': 200, 'val': 100})
    torch.manual_seed(0)
    model = checkpoints.make_model(
        'ar', vocab_size=folder.tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=32
    )
    seen = []

    def logits(tokens):
        assert tokens.is_contiguous() and tokens.size(1) == 16
        seen.append(tokens)
        return model.logits(tokens)

    loss = compare.whole_split_loss(logits, folder, 16)
    total = count = 0
    for batch in data.evaluation_batches(folder, 'val', 'ar', 16, 4):
        nats, counted, _ = model(*batch)
        total, count = total + nats.item(), count + counted.item()
    assert count == 99 and sum(map(len, seen)) == 7  # the seventh window is moved back
    assert loss == pytest.approx(total / count, rel=1e-6)


def test_the_peer_gets_a_copy_and_its_clone_stays_as_it_is(tmp_path):
    clone = tmp_path / 'clone'
    names = compare.PEER_FILES
    for name in names:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(name)
    folder = prepare(tmp_path / 'letters', 'abc', {'train': 50, 'val': 20})
    copy = compare.copy_peer(clone, tmp_path, folder, list('abc'))
    left = [str(path.relative_to(clone)) for path in clone.rglob('*') if path.is_file()]
    assert sorted(left) == sorted(names)
    prepared = copy / 'data' / 'shakespeare_char'
    assert (prepared / 'val.bin').read_bytes() == (folder.path / 'val_tokens.bin').read_bytes()
    assert (copy / 'model.py').read_text() == 'model.py' and (prepared / 'meta.pkl').exists()


def test_parameters_are_counted_by_the_peers_convention():
    shape = dict(vocab_size=68, mask_id=66, ignore_id=67, block_size=64, n_layer=4, n_head=4, n_embd=128)
    count = compare.parameters_by_peer_convention
    gpt2 = checkpoints.make_model('ar', **shape, norm='layer', position='learned', mlp='gelu', qk_norm=False)
    assert count(gpt2, 65) == 795_904  # what nanoGPT's get_num_params() says
    assert count(checkpoints.make_model('ar', **shape), 65) == 794_752  # no gains in RMSNorm


def test_targets_know_their_direction():
    assert Target('loss', 1.62, '<=', 1.62).reached and not Target('loss', 1.63, '<=', 1.62).reached
    assert Target('ratio', 1.0, '>=', 1.0).reached and 'MISSED' in str(Target('ratio', 0.99, '>=', 1.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    'arguments, named',
    (
        (['--what=nonsense'], 'nonsense'),
        (['--only=learn,sleep'], 'sleep'),
        (['--runs=0'], '0'),
        (['--new_tokens=512'], '512'),
        (['--what=train', '--steps=3'], '3'),
        (['--work_steps=60'], '60'),
        (['--dataset=no/such/folder'], 'shakespeare.py'),
    ),
)
def test_mistakes_are_one_sentence(arguments, named):
    result = subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith('error: ') and named in result.stderr
    assert 'Traceback' not in result.stderr and result.stdout == ''


@pytest.mark.slow
def test_training_steps_of_all_architectures_are_timed(make_folder):
    result = subprocess.run(
        [
            sys.executable,
            str(BENCH),
            '--what=train',
            f'--dataset={make_folder()}',
            '--steps=10',
            '--batch_size=2',
            '--block_size=16',
            '--device=cpu',
        ],
        capture_output=True,
        text=True,
    )
    assert 'Traceback' not in result.stderr and result.returncode in (0, 1)  # a time may be missed here
    for architecture in ('ar', 'diffusion', 'sdd'):
        assert re.search(
            rf'^  {architecture} +[\d.]+ ms per step .*tokens/s, MFU .*MiB$', result.stdout, re.M
        )
    assert re.findall(r'^    (\d) \(', result.stdout, re.M) == list('01234')  # passes before a step of sdd
    assert len(re.findall(r'^  (?:reached|MISSED) ', result.stdout, re.M)) == 2


def test_a_folder_that_is_no_clone_is_named(tmp_path):
    folder = prepare(tmp_path / 'letters', 'abc', {'train': 50, 'val': 20})
    for peer in ('', tmp_path):
        with pytest.raises(UserError, match='git clone'):
            compare.copy_peer(peer, tmp_path, folder, list('abc'))


def test_other_data_than_the_peers_are_refused(tmp_path):
    prepare(tmp_path / 'letters', 'abc', {'train': 50, 'val': 20})
    with pytest.raises(UserError, match='65 characters'):
        compare.open_dataset(tmp_path / 'letters')


def test_a_script_that_fails_is_reported_with_what_it_said(tmp_path):
    (tmp_path / 'broken.py').write_text('print("so far so good"); raise SystemExit("no more")')
    with pytest.raises(UserError, match='status 1(.|\n)*no more'):
        compare.run('broken.py', [], tmp_path)


def test_reading_data_is_timed_without_a_model(make_folder):
    result = subprocess.run(
        [
            sys.executable,
            str(BENCH),
            '--what=data',
            f'--dataset={make_folder()}',
            '--steps=10',
            '--batch_size=2',
            '--block_size=16',
            '--device=cpu',
            '--runs=1',
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r'^  (?:packed|documents) +(?:ar|diffusion) +[\d,]+', result.stdout, re.M)) == 4


STAND_IN = """
import torch
from dataclasses import dataclass


@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, 8)

    def forward(self, tokens, targets):
        logits = self.table(tokens) @ self.table.weight.t()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
"""


@pytest.mark.slow
def test_the_measurement_for_a_gpu_runs_through_on_a_cpu(tmp_path):
    (tmp_path / 'model.py').write_text(STAND_IN)
    result = subprocess.run(
        [
            sys.executable,
            str(BENCH),
            '--what=gpu',
            f'--peer={tmp_path}',
            '--device=cpu',
            '--block_size=16',
            '--batch_size=1',
        ],
        capture_output=True,
        text=True,
    )
    assert 'Traceback' not in result.stderr and result.returncode in (0, 1), result.stderr
    assert len(re.findall(r'^  (?:reached|MISSED) ', result.stdout, re.M)) == 6


def test_the_measurement_for_a_gpu_wants_a_clone(tmp_path):
    result = subprocess.run(
        [sys.executable, str(BENCH), '--what=gpu', f'--peer={tmp_path}', '--device=cpu'],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and 'git clone' in result.stderr and 'Traceback' not in result.stderr
