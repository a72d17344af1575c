"""What benchmarks/sft.py promises apart from its figures: no peer, no data but what is made here."""

import runpy
import sys

import pytest
from test_finetune import ROOT, tune, write_base, write_examples
from test_train import metrics

from lm import data
from lm.configurator import UserError


@pytest.fixture
def bench(monkeypatch):
    """The functions of benchmarks/sft.py, with given arguments."""

    def load(*arguments):
        monkeypatch.setattr(sys, 'argv', ['benchmarks/sft.py', *arguments])
        return runpy.run_path(str(ROOT / 'benchmarks/sft.py'))

    return load


def test_both_sides_read_the_same_rows(bench, tmp_path):
    folder = data.Folder(write_examples(tmp_path / 'data'))
    rows = data.make_rows(folder, 'train', 'ar', 160, 'examples', training=True)
    ours = [tuple(part.tolist() for part in rows.read(row)[:2]) for row in range(rows.num_rows)]
    assert len(ours) == 60 and list(bench()['examples'](tmp_path / 'data')) == ours


@pytest.mark.parametrize('kind', ['full', 'lora', '4bit'])
def test_our_side_is_a_run_of_finetune_and_its_figures(bench, tmp_path, kind):
    write_examples(tmp_path / 'data')
    write_base(tmp_path / 'llama', 'ar', n_embd=64)
    functions = bench('--batch_size=4', '--block_size=64', '--lora_r=4')
    tune(*functions['our_command'](tmp_path, kind)[2:], tiny=())
    result = functions['our_result'](tmp_path)
    losses = [float(row['train/loss']) for row in metrics(tmp_path / 'ours') if row['train/loss']]
    assert result['steps'] == 15  # 60 examples, once each
    assert len(losses) == 15 and result['loss'] == pytest.approx(sum(losses) / 15)
    assert (result['trained'] > 50_000) == (kind == 'full') and result['seconds_per_step'] > 0


def test_memory_is_the_largest_that_a_process_had(bench):
    run = bench()['run']
    held = 'import time; held = bytes(80_000_000) + b"x"; del held; time.sleep(0.5)'
    assert (
        70
        < run([sys.executable, '-c', held]) - run([sys.executable, '-c', 'import time; time.sleep(0.5)'])
        < 90
    )


@pytest.mark.parametrize('key', ['steps', 'trained', 'loss'])
def test_sides_that_did_different_work_are_not_compared(bench, key):
    check_same, result = bench()['check_same'], {'steps': 45, 'trained': 1000, 'loss': 7.0}
    check_same('full', result, {**result, 'loss': 7.1})
    with pytest.raises(UserError, match=key):
        check_same('full', result, {**result, key: result[key] * 1.1})


@pytest.mark.parametrize(
    'arguments, words',
    [
        ((), 'Give --input'),
        (('--input=a', '--peer_python=no/python'), 'no/python is no program'),
        (('--input=a', f'--peer_python={sys.executable}', '--what=ful'), 'ful'),
    ],
)
def test_a_mistake_is_one_sentence(bench, arguments, words):
    with pytest.raises(UserError, match=words):
        bench(*arguments)['main']()
