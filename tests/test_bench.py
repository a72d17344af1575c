"""What benchmarks/ promise apart from their figures: no peer but a stand-in, no data but what is made here."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import timing
from lm import checkpoints, data
from lm.configurator import ROOT, UserError
from model import ARCHITECTURES

NANOGPT = Path(__file__).parent / 'nanogpt'  # a stand-in for a clone
CACHE = Path(os.environ.get('TIKTOKEN_CACHE_DIR', '/work/shared/data/tiktoken_cache'))
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


@pytest.fixture
def bench(monkeypatch):
    """A script of benchmarks/ as a module, with given arguments."""
    monkeypatch.setattr(sys, 'path', list(sys.path))

    def load(name, *arguments):
        path = ROOT / 'benchmarks' / f'{name}.py'
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
        spec = importlib.util.spec_from_file_location(f'bench_{name}', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def rehearse(main, capsys):
    """The output of a whole benchmark, and the names of its targets; what is missed makes the status 1."""
    with pytest.raises(SystemExit) as exit:
        main()
    output = capsys.readouterr().out
    verdicts = re.findall(r'^(reached|MISSED) +(.*): ', output, re.M)
    assert exit.value.code == ('MISSED' in dict(verdicts))
    return output, [name for _, name in verdicts]


@pytest.fixture
def letters(tmp_path):
    """A folder as prepare/shakespeare.py writes it, with as many characters."""
    (tmp_path / 'letters.txt').write_text((string.ascii_letters + string.digits + '. \n') * 40)
    where = [f'--input={tmp_path}/letters.txt', f'--output_dir={tmp_path}/letters', '--num_workers=1']
    timing.run([sys.executable, ROOT / 'prepare/shakespeare.py', *where])
    return data.Folder(tmp_path / 'letters')


# ---------------------------------------------------------------------------- timing


@pytest.mark.parametrize('lines', (PEER_LINES, OUR_LINES))
def test_both_sides_are_timed_between_the_same_steps(lines):
    assert timing.seconds_per_step(lines, warmup=10) == pytest.approx(3 / 20)
    with pytest.raises(UserError, match='1 lines of progress'):
        timing.seconds_per_step(lines, warmup=11)


def test_sides_take_turns_and_the_warmup_is_left_out(capsys):
    calls = []

    def side(name, seconds):
        return lambda: calls.append(name) or seconds / len(calls)

    ratio = timing.compare_rates('x', {'peer': side('peer', 6), 'ours': side('ours', 3)}, 60, 2, warmup=1)
    assert calls == ['peer', 'ours', 'ours', 'peer', 'peer', 'ours']
    assert ratio == pytest.approx(((6 / 4) / (3 / 3) + (6 / 5) / (3 / 6)) / 2)
    assert 'x, peer: 40.0 · 50.0 tokens/s' in capsys.readouterr().out


def test_a_missed_target_makes_the_status_1(capsys):
    for value, status in ((1.62, 0), (1.63, 1)):
        with pytest.raises(SystemExit) as exit:
            timing.finish([timing.Target('a', 1.0, '>=', 1.0), timing.Target('b', value, '<=', 1.62)])
        assert exit.value.code == status
    assert 'MISSED   b: 1.630 (wanted <= 1.62)' in capsys.readouterr().out


def test_a_process_is_timed_and_its_largest_size_is_known():
    held = 'held = bytes(300_000_000) + b"x"; del held; print("a"); import time; time.sleep(0.3); print("b")'
    done = timing.run([sys.executable, '-c', held])
    (first, a), (second, b) = done.lines
    assert (a, b) == ('a', 'b') and second - first > 0.2 and done.seconds > second
    assert 300 < done.peak_mb < 1000


def test_a_script_that_fails_is_reported_with_what_it_said():
    with pytest.raises(UserError, match='failed(.|\n)*no more'):
        timing.run([sys.executable, '-c', 'print("so far so good"); raise SystemExit("no more")'])


@pytest.mark.parametrize(
    'name, arguments, said',
    [
        ('compare', ['--only=learn,sleep'], 'sleep'),
        ('compare', ['--new_tokens=512'], '512'),
        ('compare', ['--work_steps=50'], '50'),
        ('sample', ['--what=best'], "'best'"),
        ('sample', ['--peer=no/clone'], 'no/clone is no clone .* git clone'),
        ('sample', ['--what=diffusion', '--peer=.'], 'git clone .*diffusion-llm'),
        ('gpu', ['--device=cpu'], 'git clone'),
        ('sft', [], 'Give --input'),
        ('classify', ['--dtype=float31'], 'float31'),
        ('prepare', ['--runs=0'], 'runs is 0'),
    ],
)
def test_a_mistake_is_one_sentence(bench, name, arguments, said):
    with pytest.raises(UserError, match=said):
        bench(name, *arguments).main()


@pytest.mark.parametrize('name', ['prepare', 'gpu'])  # one named as a package of ours, one that uses another
def test_benchmarks_run_from_anywhere(name, tmp_path):
    command = [sys.executable, ROOT / 'benchmarks' / f'{name}.py', '--help']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f'usage: python {name}.py'), done.stderr


# ---------------------------------------------------------------------------- beside nanoGPT


def test_loss_counts_each_token_but_the_first_once(bench, letters):
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=2, n_embd=32)
    model = checkpoints.make_model('ar', vocab_size=letters.tokenizer.vocab_size, block_size=16, **shape)
    seen = []

    def logits(tokens):
        seen.append(len(tokens))
        return model.logits(tokens)

    loss = bench('compare').validation_loss(logits, letters, 16)
    total = count = 0
    for batch in data.evaluation_batches(letters, 'val', ARCHITECTURES['ar'], 16, 4):
        nats, counted, _ = model(*batch)
        total, count = total + nats.item(), count + counted.item()
    tokens = len(letters.tokens['val'])
    assert (
        count == tokens - 1 and tokens % 16 != 1 and sum(seen) == -(-count // 16)
    )  # the last window overlaps
    assert loss == pytest.approx(total / count, rel=1e-6)


@pytest.mark.slow
def test_learning_working_and_decoding_are_compared(bench, letters, tmp_path, monkeypatch, capsys):
    clone = shutil.copytree(NANOGPT, tmp_path / 'clone')
    short = (
        '--runs=1 --peer_steps=21 --short_steps=21 --work_steps=21 --warmup_steps=1 --new_tokens=4'.split()
    )
    compare = bench('compare', f'--peer={clone}', f'--dataset={letters.path}', *short)
    monkeypatch.setattr(compare, 'SPLITS', {split: len(tokens) for split, tokens in letters.tokens.items()})
    monkeypatch.setattr(compare, 'WORK', {'0.8M': {**compare.WORK['0.8M'], 'n_layer': 1}})
    output, targets = rehearse(compare.main, capsys)
    assert len(targets) == 5 + 1 + 2
    sizes = re.findall(r'(nanoGPT|ours): .* loss [\d.]+, ([\d,]+) parameters', output)
    # As nanoGPT's get_num_params() counts; ours has no gains in RMSNorm, and rows that the peer has not do not count.
    assert sizes == [('nanoGPT', '795,904'), ('ours', '794,752'), ('ours', '794,752')]
    assert sorted(path.name for path in clone.iterdir() if path.name != '__pycache__') == [
        'model.py',
        'train.py',
    ]


def test_other_data_than_the_peers_are_refused(bench, letters):
    with pytest.raises(UserError, match='65 characters .*shakespeare.py'):
        bench('compare', f'--peer={NANOGPT}', f'--dataset={letters.path}').main()


def test_decoding_with_the_peers_weights_gives_its_tokens(bench, monkeypatch, capsys):
    sample = bench('sample', f'--peer={NANOGPT}', '--runs=1', '--new_tokens=64', '--block_size=66')
    monkeypatch.setattr(sample, 'SHAPES', {'0.8M': {**sample.SHAPES['0.8M'], 'n_embd': 32}})
    output, targets = rehearse(sample.main, capsys)
    assert len(targets) == 2 and "equal to nanoGPT's: 1.000" in output


@pytest.mark.slow
@torch._dynamo.config.patch(disable=True)
def test_all_figures_for_a_gpu_are_rehearsed_on_a_cpu(bench, monkeypatch, capsys):
    gpu = bench('gpu', f'--peer={NANOGPT}', '--device=cpu', '--steps=1', '--new_tokens=4')
    monkeypatch.setattr(gpu, 'VOCABULARY', dict(vocab_size=64, mask_id=62, ignore_id=63))
    _, targets = rehearse(gpu.main, capsys)
    assert len(targets) == 7


# ---------------------------------------------------------------------------- the architectures side by side


def test_training_steps_of_all_architectures_are_timed(make_folder, monkeypatch, capsys):
    arguments = '--steps=1 --batch_size=2 --block_size=16 --device=cpu --optimizer=adamw'.split()
    monkeypatch.setattr(sys, 'argv', ['train.py', f'--dataset={make_folder()}', *arguments])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    script = str(ROOT / 'benchmarks/train.py')
    output, targets = rehearse(lambda: runpy.run_path(script, run_name='__main__'), capsys)
    assert len(targets) == 2
    assert len(re.findall(r'batches per second', output)) == 3
    assert len(re.findall(r'ms per step, [\d,]+ tokens/s, MFU', output)) == 3
    shares = [int(share) for share in re.findall(r'sdd, \d passes before, (\d+)% of the steps', output)]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=2)


# ---------------------------------------------------------------------------- beside other libraries


@pytest.mark.slow
def test_classifying_is_compared_with_transformers(bench, capsys):
    arguments = '--n_layer=1 --sequence_length=8 --batch_size=4 --runs=1 --steps=7 --dtype=float32'.split()
    output, targets = rehearse(bench('classify', *arguments).main, capsys)
    assert len(targets) == 1 and 'float32, transformers: ' in output


TRL = """#!/bin/bash
place="${@: -1}"
place="${place#--folder=}"
case "$*" in
    *--side=model*) exec PYTHON "$@" ;;
    *--side=full*) exec FULL ;;
    *--side=lora*) exec LORA ;;
esac
"""


@pytest.mark.slow
def test_tuning_is_compared_with_trl(bench, tmp_path, capsys):
    """A stand-in for the peer's Python makes the model as the peer does, and tunes it as we do."""
    peer = tmp_path / 'python'
    examples = [{'instruction': f'Say {i}.', 'input': '', 'output': f'The answer is {i}.'} for i in range(36)]
    (tmp_path / 'data.json').write_text(json.dumps(examples))
    arguments = [f'--input={tmp_path}/data.json', f'--peer_python={peer}', '--runs=1', '--block_size=64']
    sft = bench('sft', *arguments, '--warmup_steps=1')
    full, lora = (' '.join(map(str, sft.command_of('ours', kind, '$place'))) for kind in ('full', 'lora'))
    peer.write_text(TRL.replace('PYTHON', sys.executable).replace('FULL', full).replace('LORA', lora))
    peer.chmod(0o755)
    output, targets = rehearse(sft.main, capsys)
    assert len(targets) == 4
    figures = re.findall(r'(\w+), (?:TRL|ours): ([\d,]+) parameters, (\d) steps, mean loss (\S+)', output)
    assert figures[::2] == figures[1::2] and len({parameters for _, parameters, *_ in figures}) == 2


def test_trl_reads_the_rows_that_we_read(bench, make_folder):
    make_folder('data', train_on='abcdefghijklm')
    folder = make_folder('base', train_on='abcdefghijklm').parent
    rows = data.make_rows(
        data.Folder(folder / 'data'), 'train', ARCHITECTURES['ar'], 160, 'examples', training=True
    )
    ours = [tuple(part.tolist() for part in rows.read(row)[:2]) for row in range(rows.num_rows)]
    theirs = [tuple(example.values()) for example in bench('sft', f'--folder={folder}').examples()]
    assert len(ours) > 50 and theirs == ours


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps_rollup'), reason='there is no /proc')
def test_memory_is_that_of_a_whole_tree_of_processes(bench):
    tree_pss = bench('prepare').tree_pss
    inner = 'import time; held = bytes(40_000_000) + b"x"; time.sleep(60)'
    outer = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {inner!r}])'
    process = subprocess.Popen([sys.executable, '-c', outer], start_new_session=True)
    try:
        deadline, peak = time.time() + 30, 0
        while peak < 40 and time.time() < deadline:
            peak = tree_pss(process.pid)
            time.sleep(0.05)
        assert 40 < peak < 200
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not CACHE.is_dir(), reason=f'the GPT-2 vocabulary is not in {CACHE}')
@pytest.mark.skipif(not os.path.exists('/proc/self/smaps_rollup'), reason='there is no /proc')
def test_both_ways_to_prepare_write_the_same_number_of_tokens(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    texts = [
        ' '.join(np.random.default_rng(i).choice(['a', 'cat', 'sees', 'no', 'dog'], 50)) for i in range(500)
    ]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    prepare = bench('prepare', f'--input={tmp_path}/a.jsonl', '--megabytes=1', '--runs=1', '--num_workers=1')
    output, targets = rehearse(prepare.main, capsys)
    assert len(targets) == 2 and len(set(re.findall(r', ([\d,]+) tokens', output))) == 1
