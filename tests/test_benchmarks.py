"""Check what benchmarks/ promise apart from their figures: no peer but a stand-in, no data but what is made here."""

import importlib.util
import json
import re
import runpy
import shutil
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_folder
from helpers import train
from test_recipes import config_of

from benchmarks import timing
from lm import checkpoints, data
from lm.configurator import ROOT, UserError
from lm.folder import Folder, version_of
from lm.runtime import Runtime
from model import ARCHITECTURES

NANOGPT = Path(__file__).parent / 'nanogpt'  # a stand-in for a clone


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
def letters(tmp_path, prepare):
    """A folder as prepare/shakespeare.py writes it, with as many characters."""
    (tmp_path / 'letters.txt').write_text((string.ascii_letters + string.digits + '. \n') * 40)
    return Folder(prepare('shakespeare.py', f'--input={tmp_path}/letters.txt'))


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
            timing.finish([('a', 1.0, '>=', 1.0), ('b', value, '<=', 1.62)])
        assert exit.value.code == status
    assert 'MISSED   b: 1.630 (wanted <= 1.62)' in capsys.readouterr().out


@pytest.mark.parametrize(
    'name, arguments, said',
    [
        ('compare', ['--only=sleep'], 'sleep'),
        ('compare', ['--runs=0'], 'runs is 0'),
        ('compare', ['--peer=no/clone'], 'no/clone is no clone .* git clone'),
        ('gpu', ['--device=cpu', '--steps=1'], 'git clone'),
    ],
)
def test_a_mistake_is_one_sentence(bench, name, arguments, said):
    with pytest.raises(UserError, match=said):
        bench(name, *arguments).main()


def test_benchmarks_run_from_anywhere(tmp_path):
    command = [sys.executable, ROOT / 'benchmarks' / 'gpu.py', '--help']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('usage: python gpu.py'), done.stderr


def test_loss_counts_each_token_but_the_first_once(bench, letters, monkeypatch):
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=2, n_embd=32)
    model = checkpoints.make_model('ar', vocab_size=letters.tokenizer.vocab_size, block_size=16, **shape)
    compare = bench('compare')
    monkeypatch.setattr(compare, 'BLOCK_SIZE', 16)
    loss = compare.validation_loss(model.logits, letters.tokens['val'])
    total = count = 0
    for batch in data.EvaluationBatches(letters, 'val', ARCHITECTURES['ar'], 16, 4, 'packed'):
        nll, counted, _ = model(*batch)
        total, count = total + nll.item(), count + counted.item()
    assert count == len(letters.tokens['val']) - 1 and count % 16
    assert loss == pytest.approx(total / count, rel=1e-6)


@pytest.mark.slow
def test_learning_is_compared(bench, letters, tmp_path, monkeypatch, capsys):
    clone = shutil.copytree(NANOGPT, tmp_path / 'clone', ignore=shutil.ignore_patterns('__pycache__'))
    words = f'--peer={clone} --dataset={letters.path} --only=learn'.split()
    compare = bench('compare', *words)
    for name, value in {'PEER_STEPS': 21, 'SHORT_STEPS': 21, 'WARMUP': 1}.items():
        monkeypatch.setattr(compare, name, value)
    monkeypatch.setattr(compare, 'OUR_RECIPE', f'{compare.OUR_RECIPE} --batch_size=2')
    output, targets = rehearse(compare.main, capsys)
    assert len(targets) == 5
    sizes = re.findall(r'(nanoGPT|ours), .* loss [\d.]+, ([\d,]+) parameters', output)
    # As nanoGPT's get_num_params() counts; ours has no gains in RMSNorm, and rows that the peer has not do not count.
    assert sizes == [('nanoGPT', '795,904'), ('ours', '831,624'), ('ours', '831,624')]
    assert {path.name for path in clone.iterdir()} - {'__pycache__'} == {'model.py', 'train.py'}


def test_decoding_with_the_peers_weights_gives_its_tokens(bench, monkeypatch, capsys):
    compare = bench('compare', f'--peer={NANOGPT}', '--only=write', '--runs=1', '--new_tokens=64')
    monkeypatch.setattr(compare, 'WORK', ['tiny'])
    monkeypatch.setattr(compare, 'WRITE_BLOCK', 66)
    output, targets = rehearse(compare.main, capsys)
    assert len(targets) == 2 and "equal to nanoGPT's: 1.000" in output


def test_the_same_work_is_compared(bench, monkeypatch, capsys):
    compare = bench('compare', f'--peer={NANOGPT}', '--only=work', '--steps=1')
    monkeypatch.setattr(compare, 'WORK', {'tiny': (2, 16)})
    _, targets = rehearse(compare.main, capsys)
    assert len(targets) == 1


@pytest.mark.slow
@torch._dynamo.config.patch(disable=True)
def test_all_figures_for_a_gpu_are_rehearsed_on_a_cpu(bench, capsys):
    gpu = bench('gpu', f'--peer={NANOGPT}', '--device=cpu', '--steps=1', '--new_tokens=4')
    _, targets = rehearse(gpu.main, capsys)
    assert len(targets) == 9


def test_training_steps_of_all_architectures_are_timed(monkeypatch, capsys):
    short = '--steps=1 --batch_size=2 --block_size=16 --vocab_size=64 --device=cpu'.split()
    monkeypatch.setattr(sys, 'argv', ['train.py', *short])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    script = str(ROOT / 'benchmarks/train.py')
    output, targets = rehearse(lambda: runpy.run_path(script, run_name='__main__'), capsys)
    assert len(targets) == 2 and len(re.findall(r'ms per step, [\d,]+ tokens/s, MFU', output)) == 4
    shares = [int(share) for share in re.findall(r'sdd, \d passes before, (\d+)% of the steps', output)]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=2)


# ---------------------------------------------------------------------------- record.py


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Logs of three seeds of train.py, and a table whose data are theirs; as if the commit held what is here."""
    path = tmp_path_factory.mktemp('record')
    write_folder(path / 'letters')
    logs = []
    for seed in range(3):
        out = path / str(seed)
        train(f'--dataset={path}/letters', '--eval_tokens=0', f'--seed={seed}', f'--out_dir={out}')
        log = re.sub(r'^commit \S+,', f'commit {HEAD},', (out / 'logs.log').read_text(), flags=re.M)
        logs.append(re.sub(r'\d+ of \d+ cores', '2 of 2 cores', log))
    return logs, f'| letters | somewhere | `{version_of(Folder(path / "letters"))}` |\n'


HEAD = subprocess.run(['git', '-C', ROOT, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()


def judge(bench, monkeypatch, capsys, tmp_path, logs, table):
    (tmp_path / 'LOG').write_text(''.join(logs))
    (tmp_path / 'records.md').write_text(table)
    record = bench('record', tmp_path / 'LOG')
    monkeypatch.setattr(record, 'TABLE', tmp_path / 'records.md')
    record.main()
    return capsys.readouterr().out


@pytest.mark.skipif(not HEAD, reason='no git repository, so no commit to look for')
def test_three_seeds_are_a_record_where_each_is_below_each_of_the_last(
    bench, monkeypatch, capsys, tmp_path, runs
):
    logs, table = runs
    tools = bench, monkeypatch, capsys, tmp_path
    row, verdict = judge(*tools, logs, table).splitlines()
    assert verdict == 'the first of its kind' and row.startswith('| ar | letters | ') and HEAD in row
    for before, after in (('--seed=', '--random_seed='), ('--seed=', "--out_dir='a b' --seed ")):
        other = [log.replace(before, after) for log in logs]  # in other words, the same
        assert judge(*tools, other, table).splitlines()[0] == row
    other = [log.replace('--eval_tokens=0', '--eval_tokens 0') for log in logs]
    assert 'the first of its kind' in judge(*tools, other, table)
    losses = [float(re.search(r'step 6: val/loss (\S+),', log)[1]) for log in logs]
    assert f'({", ".join(f"{loss:.4f}" for loss in sorted(losses))})' in row
    assert 'a record' in judge(*tools, logs, table + row.replace('(', '(9').replace(', ', ', 9', 2) + '\n')
    with pytest.raises(SystemExit):
        judge(*tools, logs, table + row + '\n')  # no better than itself


@pytest.mark.skipif(not HEAD, reason='no git repository, so no commit to look for')
@pytest.mark.parametrize(
    'before, after, says',
    [
        ('--seed=1', '--seed=2', 'seeds'),
        ('--eval_tokens=0', '--eval_tokens=64', 'eval_tokens'),
        (r'done in \d+ s', 'done in 601 s', '601 s'),
        (f'commit {HEAD}', f'commit {HEAD}-dirty', 'not in this repository'),
        ('2 of 2 cores', '3 of 4 cores', '3 threads'),
        ('--eval_tokens=0', '--eval_tokens=0 --base-model=out/a', 'starts from weights'),
        (r'of data \w+', 'of data 01234567', 'prepare'),
        ('step 0: .*', '', 'start|step 0'),
        ('--eval_tokens=0', '--eval_tokens=0 config/stories.py', 'add --eval_tokens=0'),
        ('--eval_tokens=0', '--eval_tokens=0 --eval_batches=1', 'add --eval_tokens=0'),
        ('--eval_tokens=0', 'OWN/warm.py --eval_tokens=0', 'starts from weights'),
        ('--eval_tokens=0', 'OWN/mine.py --eval_tokens=0', 'has no .*/mine.py; commit what was run'),
        ('(?s).*', '', 'The log has 0 runs'),
    ],
)
def test_what_breaks_a_rule_is_no_record(bench, monkeypatch, capsys, tmp_path, runs, before, after, says):
    (tmp_path / 'warm.py').write_text("init_from = 'out/a'")
    (tmp_path / 'mine.py').write_text('beta1 = 0.8')
    logs = [re.sub(before, after.replace('OWN', str(tmp_path)), log) for log in runs[0]]
    with pytest.raises(UserError, match=says):
        judge(bench, monkeypatch, capsys, tmp_path, logs, runs[1])


# ---------------------------------------------------------------------------- study.py


def test_a_study_gathers_runs_once_and_says_what_each_kind_reached(bench, monkeypatch, capsys, tmp_path):
    pytest.importorskip('matplotlib')
    write_folder(tmp_path / 'letters')
    kinds = {'ar': [], 'joint': ['--architecture=diffusion', '--block_length=(2,)', '--ar_weight=1']}
    for name, words in kinds.items():
        out = f'--out_dir={tmp_path}/runs/{name}'
        train(f'--dataset={tmp_path}/letters', '--unique_tokens=100', '--eval_every=2', out, *words)
    study = bench('study', tmp_path / 'runs')
    monkeypatch.setattr(study, 'STUDY', tmp_path / 'study.csv')
    study.main()
    table = re.findall(r'^\| `(.*?)` \| ([\d.]+) \| ([\d.]+)', capsys.readouterr().out, re.M)
    losses = {name: checkpoints.load(tmp_path / 'runs' / name)['best_val_loss'] for name in kinds}
    found = {kind: float(loss) for kind, loss, _ in table}
    assert list(found.values()) == sorted(found.values()) and len(found) == 3
    assert found['ar'] == pytest.approx(losses['ar'], abs=1e-4)
    assert found['diffusion --block_length=[2] --ar_weight=1.0'] == pytest.approx(losses['joint'], abs=1e-4)
    lines = (tmp_path / 'study.csv').read_text()
    study.main()
    assert (tmp_path / 'study.csv').read_text() == lines and lines.count('\n') == 1 + 3 * 3
    assert (tmp_path / 'study.svg').stat().st_size > 5000


def test_a_study_counts_every_micro_step_and_refuses_what_does_not_compare(bench, monkeypatch, tmp_path):
    write_folder(tmp_path / 'letters')
    study = bench('study')
    monkeypatch.setattr(study, 'STUDY', tmp_path / 'study.csv')
    words = [f'--dataset={tmp_path}/letters', '--gradient_accumulation_steps=2']
    train(*words, '--unique_tokens=100', f'--out_dir={tmp_path}/runs/a')
    settings = json.loads((tmp_path / 'runs/a/config.json').read_text())
    tokens = 2 * settings['batch_size'] * settings['block_size'] * settings['max_steps']
    (*_, last) = study.gather(tmp_path / 'runs')
    assert last[3] == tokens
    before = (tmp_path / 'study.csv').read_text()
    train(*words, '--unique_tokens=100', '--learning_rate=0.5', f'--out_dir={tmp_path}/runs/b')
    with pytest.raises(
        UserError, match="differ in {'learning_rate': .*; one study has one size, rate and data"
    ):
        study.gather(tmp_path / 'runs')
    train(*words, f'--out_dir={tmp_path}/all/a')
    with pytest.raises(UserError, match='all/a went through all of its data'):
        study.gather(tmp_path / 'all')
    assert (tmp_path / 'study.csv').read_text() == before


def test_blocks_are_timed_as_train_py_trains_them(bench):
    steps, dist = bench('train'), Runtime('cpu', 'float32')
    shape = dict(block_size=16, block_length=(4,), ar_weight=1.0)
    trainee = steps.Trainee('diffusion', dist, 'adamw', 'tiny', 64, 2, **shape)
    assert trainee.model.noisy_blocks[0] == config_of('train.py')['noisy_every']


def test_a_study_says_when_a_kind_passes_the_best_of_ar(bench):
    study = bench('study')
    kinds = {'ar': (3.0, 2.0, 2.5), 'ar --dropout=0.2': (3.0, 2.5, 2.2), 'diffusion': (4.0, 2.1, 1.9)}
    lines = []
    for kind, losses in kinds.items():
        for i, loss in enumerate(losses, 1):  # an epoch each, at so many tokens per second
            lines.append([250, kind, 0, 250 * i, 5 if kind == 'ar' else 2, loss])
    (_, best), (_, ar), (_, dropout) = (
        line.split(' | ', 1) for line in study.table(study.read_curves(lines)[250])
    )
    assert best == '1.9000 | 3, the last | 6 | too few |'  # 750 tokens, 2 a second
    assert ar == '2.0000 | 2 |  |  |' and dropout == '2.2000 | 3, the last |  |  |'


def test_a_study_extrapolates_when_a_kind_will_pass_the_best_of_ar(bench):
    study, noise = bench('study'), np.random.default_rng(1).normal(0, 1e-3, 40)
    curve = [(0, epoch, 2 + 3 * epoch**-0.5 + noise[epoch - 1]) for epoch in range(1, 41)]
    text = study.crossing(curve, 2.2)  # 2 + 3 / 15
    found, low, high = map(float, re.fullmatch(r'(\S+) \((\S+) to (\S+)\)', text).groups())
    assert low <= 225 <= high and found == pytest.approx(225, rel=0.2) and high / low < 2
    assert study.crossing(curve, 1.9) == 'never'
    assert study.crossing([*curve, (0, 41, 2.6)], 2.2) == 'overfits before'
    assert float(study.crossing(curve, 2.6).split()[0]) == pytest.approx(25, rel=0.02)  # within the run


VARIED = dict(
    dropout=0.1, weight_decay=0.3, token_dropout=0.3, block_length=[8], ar_weight=1.0, p_belief=[[0.8, 1.0]]
)


@pytest.mark.parametrize('key', VARIED)
def test_runs_of_other_settings_have_a_curve_of_their_own(bench, key):
    study = bench('study')
    plain = {'architecture': 'sdd', **study.PLAIN}
    assert study.kind_of(plain) == 'sdd'
    assert study.kind_of({**plain, key: VARIED[key]}).startswith(f'sdd --{key}=')


def test_a_study_knows_all_that_its_sweep_varies(bench):
    sweep, train_py = runpy.run_path(str(ROOT / 'config/sweep_repeats.py')), config_of('train.py')
    plain = json.loads(json.dumps({key: train_py[key] for key in sweep['zipped'] if key != 'architecture'}))
    assert bench('study').PLAIN == plain
