"""What classify.py promises, seen from outside: runs of the script on small tasks and texts, without network."""

import csv
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer, random_model, signals_kept
from test_finetune import tune, write_base, write_examples

from lm import checkpoints, classification, optim, pretrained, tasks
from lm.configurator import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = ('--n_layer=2 --n_head=2 --n_embd=16 --device=cpu --dtype=float32 --no_wandb --seed=1').split()
TASK = '--target_func=fn_a --sequence_length=10 --train_set_size=20 --test_set_size=40 --batch_size=6'.split()
TEXTS = '--task=sentiment --language_database=db.py --batch_size=4 --tokenizer=bytes --block_size=24'.split()


def classify(*arguments, tiny=TINY):
    """Runs the script in this process; returns its variables."""
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(sys, 'argv', ['classify.py', *tiny, *map(str, arguments)])
        return runpy.run_path(str(ROOT / 'classify.py'), run_name='__main__')


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a database of two languages; what tasks make is kept there as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, 'ROOT', tmp_path)
    draw = np.random.default_rng(0)
    for language, words in (('rus', ('da', 'net')), ('pol', ('tak', 'nie'))):
        folder = tmp_path / language
        folder.mkdir()
        for split, size in (('train', 24), ('test', 12)):
            labels = draw.integers(0, 2, size)
            labels[:2] = 0, 1
            lines = [
                'so ' * int(draw.integers(0, 5))
                + f'{words[label]}\tp{words[label]}\tmore\tpmore\t{("neg", "pos")[label]}'
                for label in labels
            ]
            (folder / f'{split}.tsv').write_text(
                '\n'.join(['a\ta-phoneme\tb\tb-phoneme\tlabel', *lines]) + '\n'
            )
    entry = {
        'train_features': ['a', 'b'],
        'eval_feature': 'label',
        'splits': ['train', 'test'],
        'task_type': 'classification',
        'classes': ['neg', 'pos'],
    }
    database = {language: {'sentiment': {**entry, 'dataset': language}} for language in ('rus', 'pol')}
    (tmp_path / 'db.py').write_text(f'LANGUAGES = {database!r}')
    return tmp_path


def load_metrics(out):
    return runpy.run_path(str(out / 'metrics.py'))


def rows(out):
    with open(out / 'metrics.csv', newline='') as file:
        return [{**row, 'train/tokens_per_sec': None} for row in csv.DictReader(file)]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def test_the_quick_run_with_its_published_names_leaves_its_artifacts(place):
    classify(
        '--target_func=fn_a',
        '--sequence_length=10',
        '--train_set_size=20',
        '--test_set_size=40',
        '--batch_size=20',
        '--n_epochs=4',
        '--lr=1e-3',
        '--eta_min=1e-4',
        '--precision=fp32',
        '--results_path=run',
        '--model=tiny',
    )
    out = place / 'run'
    config = json.loads((out / 'config.json').read_text())
    assert [config[key] for key in ('num_epochs', 'learning_rate', 'min_lr', 'dtype')] == [
        4,
        1e-3,
        1e-4,
        'float32',
    ]
    metrics = load_metrics(out)
    assert metrics['steps'] == [0, 1, 2, 3, 4]  # before the first step and after the last
    for name in ('train_losses', 'test_losses', 'train_accuracies', 'test_accuracies'):
        assert len(metrics[name]) == 5 and all(isinstance(value, float) for value in metrics[name])
    assert all(0 <= value <= 1 for value in metrics['train_accuracies'] + metrics['test_accuracies'])
    results = json.loads((out / 'eval_results.json').read_text())
    assert results['test']['accuracy'] == metrics['test_accuracies'][-1] and results['test']['rows'] == 40
    with np.load(out / 'predictions.npz') as saved:
        assert (saved['test_preds'] == (saved['test_logits'][:, 0] > 0)).all() and len(
            saved['test_labels']
        ) == 40
        assert (saved['test_preds'] == saved['test_labels']).mean() == pytest.approx(
            results['test']['accuracy']
        )
    assert {'logs.log', 'metrics.csv', 'ckpt.pt'} <= {path.name for path in out.iterdir()}
    assert config['pool'] == 'last' and (rows(out)[-1]['step'], rows(out)[-1]['train/lr'] != '') == (
        '4',
        True,
    )


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd'])
def test_each_architecture_learns_a_simple_task(place, architecture):
    classify(
        '--target_func=fn_c',
        '--sequence_length=14',
        '--train_set_size=400',
        '--test_set_size=100',
        '--batch_size=50',
        '--num_epochs=45',
        '--learning_rate=1e-2',
        '--optimizer=muon',
        '--schedule=linear',
        f'--architecture={architecture}',
        '--n_embd=32',
        '--pool=mean',
        '--out_dir=run',
        '--eval_every=120',
    )
    assert load_metrics(place / 'run')['test_accuracies'][-1] > 0.75
    loaded = checkpoints.load_model(checkpoints.load(place / 'run'), 'cpu')  # as the other scripts do
    assert loaded.config.n_embd == 32


def assert_a_killed_run_ends_the_same(place, settings, *resume, **tiny):
    """One run whole, one killed in its fourth step, after the checkpoint of the second, and resumed by `resume`."""
    classify(*settings, '--out_dir=whole')
    with pytest.MonkeyPatch.context() as patch:
        rate = optim.learning_rate_at
        patch.setattr(
            optim, 'learning_rate_at', lambda step, *rest: 1 / 0 if step == 3 else rate(step, *rest)
        )
        with pytest.raises(ZeroDivisionError):
            classify(*settings, '--out_dir=killed')
    classify(*resume, **tiny)
    one, other = (torch.load(place / name / 'ckpt.pt', weights_only=True) for name in ('whole', 'killed'))
    for key in (
        'model_state_dict',
        'head_state_dict',
        'optimizer_state_dict',
        'history',
        'global_step',
        'best_step',
    ):
        assert same(one[key], other[key]), key
    assert rows(place / 'whole') == rows(place / 'killed')
    with (
        np.load(place / 'whole' / 'predictions.npz') as a,
        np.load(place / 'killed' / 'predictions.npz') as b,
    ):
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


@pytest.mark.parametrize(
    'options',
    [
        ['--dropout=0.1', '--token_dropout=0.3', '--gradient_accumulation_steps=2', '--val_set_size=10'],
        ['--architecture=diffusion', '--optimizer=muon', '--num_classes=2'],
        ['--architecture=sdd', '--label_smoothing=0.1'],
    ],
)
def test_resume_is_bit_identical(place, options):
    settings = [*TASK, '--max_steps=6', '--eval_every=2', '--log_every=1', *options]
    assert_a_killed_run_ends_the_same(place, settings, *settings, '--out_dir=killed', '--resume_from=auto')
    with pytest.raises(SystemExit) as end:
        classify(*settings, '--out_dir=killed', '--resume_from=auto')
    assert end.value.code == 0
    with pytest.raises(UserError, match='already holds a run'):
        classify(*settings, '--out_dir=killed')
    with pytest.raises(UserError, match='target_func'):
        classify('--target_func=fn_b', '--out_dir=killed', '--resume_from=auto')


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(place):
    command = [sys.executable, ROOT / 'classify.py', *TINY, *TASK, '--max_steps=100000', '--out_dir=run']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (place / 'run' / 'ckpt.pt').exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0 and not (place / 'run' / 'predictions.npz').exists()
    step = torch.load(place / 'run' / 'ckpt.pt', weights_only=True)['global_step']
    classify('--resume_from=run', f'--max_steps={step + 2}')
    assert (place / 'run' / 'predictions.npz').exists()


@pytest.mark.slow
def test_two_ranks_end_where_one_does(place):
    settings = [*TINY, *TASK, '--num_epochs=6']
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    subprocess.run(
        [*torchrun, ROOT / 'classify.py', *settings, '--batch_size=3', '--out_dir=two'],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    classify(*settings[len(TINY) :], '--out_dir=one')
    one, two = (torch.load(place / name / 'ckpt.pt', weights_only=True) for name in ('one', 'two'))
    assert one['global_step'] == two['global_step'] == 20
    for name, weight in one['model_state_dict'].items():
        torch.testing.assert_close(weight, two['model_state_dict'][name], atol=1e-4, rtol=1e-4)
    with np.load(place / 'one' / 'predictions.npz') as a, np.load(place / 'two' / 'predictions.npz') as b:
        np.testing.assert_allclose(a['test_logits'], b['test_logits'], atol=1e-4)


@pytest.mark.slow
def test_texts_in_two_languages_are_joined_and_judged_apart(place):
    run = classify(
        *TEXTS,
        '--train_langs=rus,pol',
        '--eval_langs=pol,rus',
        '--num_epochs=30',
        '--learning_rate=1e-2',
        '--optimizer=muon',
        '--out_dir=run',
        '--architecture=diffusion',
        '--n_embd=32',
    )
    results = json.loads((place / 'run' / 'eval_results.json').read_text())
    assert results['train']['rows'] == 48 and {'pol', 'rus'} < set(results)
    assert results['pol']['macro_f1'] > 0.9 and len(results['rus']['confusion']) == 2
    assert 0 <= results['rus']['auroc'] <= 1
    assert run['raw_classifier'].pool == 'mean'
    row = run['sets']['train'].rows[0].tolist()
    vocabulary = run['vocabulary']
    assert row[0] == vocabulary.endoftext_id and row.count(vocabulary.endoftext_id) == 2
    assert vocabulary.decode(row).endswith('more')
    ipa = classify(*TEXTS, '--train_langs=rus', '--model_type=ipa', '--num_epochs=1', '--out_dir=ipa')
    assert vocabulary.decode(ipa['sets']['rus'].rows[0]) in ('pdapmore', 'pnetpmore')


def test_validation_rows_choose_the_weights_and_stop_early(place):
    run = classify(
        *TASK,
        '--val_set_size=10',
        '--early_stopping=2',
        '--eval_every=1',
        '--max_steps=60',
        '--learning_rate=0.03',
        '--out_dir=run',
    )
    history, results = run['history'], json.loads((place / 'run' / 'eval_results.json').read_text())
    assert run['step'] < 60 and results['step'] == run['best_step'] == history['steps'][-1] - 2
    losses = [float(row['val/loss']) for row in rows(place / 'run') if row['val/loss']]
    assert int(np.argmin(losses)) == run['best_step'] and results['val']['loss'] == pytest.approx(
        min(losses), rel=1e-4
    )
    with pytest.raises(SystemExit):
        classify('--out_dir=run', '--resume_from=auto')
    with pytest.raises(UserError, match='early_stopping needs validation rows'):
        classify(*TASK, '--early_stopping=2', '--out_dir=other')


def test_a_run_starts_from_a_checkpoint_and_only_its_top_trains(place):
    classify(*TASK, '--num_epochs=1', '--out_dir=base')
    before = torch.load(place / 'base' / 'ckpt.pt', weights_only=True)['model_state_dict']
    classify(
        *TASK,
        '--num_epochs=2',
        '--init_from=base',
        '--num_layers_to_finetune=1',
        '--out_dir=tuned',
        '--learning_rate=0.01',
        tiny=TINY[3:],
    )
    after = torch.load(place / 'tuned' / 'ckpt.pt', weights_only=True)['model_state_dict']
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.startswith('blocks.1.')
    }
    with pytest.raises(UserError, match='another n_layer'):
        classify(*TASK, '--init_from=base', '--out_dir=wrong', tiny=['--n_layer=3', *TINY[3:]])
    with pytest.raises(UserError, match='has 2 layers'):
        classify(*TASK, '--init_from=base', '--num_layers_to_finetune=3', '--out_dir=wrong', tiny=TINY[3:])


def test_compare_to_tests_the_difference_of_two_runs(place):
    classify(*TASK, '--num_epochs=1', '--out_dir=one')
    classify(*TASK, '--num_epochs=5', '--learning_rate=0.01', '--out_dir=two', '--compare_to=one')
    one, two = (json.loads((place / name / 'eval_results.json').read_text()) for name in ('one', 'two'))
    compared = two['compare_to']['test']['accuracy']
    assert compared['difference'] == pytest.approx(two['test']['accuracy'] - one['test']['accuracy'])
    assert 0 < compared['p'] <= 1
    with pytest.raises(UserError, match='no predictions for the rows of test'):
        classify(*TASK, '--seed=2', '--out_dir=three', '--compare_to=one')


def nanogpt_model():
    """A random GPT of nanoGPT's, as its ckpt.pt holds it, and ours with the same weights."""
    model = random_model(
        'ar',
        0.2,
        vocab_size=letter_tokenizer().vocab_size,
        block_size=24,
        n_layer=2,
        n_head=2,
        n_embd=16,
        norm='layer',
        position='learned',
        mlp='gelu',
        bias=True,
        qk_norm=False,
        logit_softcap=0.0,
        mask_id=28,
        ignore_id=29,
    )
    state = {
        'transformer.wte.weight': model.embedding.weight,
        'transformer.wpe.weight': model.positions.weight,
        'transformer.ln_f.weight': model.norm.weight,
        'transformer.ln_f.bias': model.norm.bias,
        'lm_head.weight': model.embedding.weight,
    }
    for i, block in enumerate(model.blocks):
        parts = {
            'ln_1': block.attention_norm,
            'attn.c_proj': block.attention.out,
            'ln_2': block.mlp_norm,
            'mlp.c_fc': block.mlp.up,
            'mlp.c_proj': block.mlp.down,
        }
        for name, part in parts.items():
            state.update(
                {f'transformer.h.{i}.{name}.{kind}': getattr(part, kind) for kind in ('weight', 'bias')}
            )
        for kind in ('weight', 'bias'):
            state[f'transformer.h.{i}.attn.c_attn.{kind}'] = torch.cat(
                [getattr(getattr(block.attention, letter), kind) for letter in 'qkv']
            )
    return model, {
        'model': {'_orig_mod.' + name: weight.detach() for name, weight in state.items()},
        'model_args': dict(
            n_layer=2,
            n_head=2,
            n_embd=16,
            block_size=24,
            bias=True,
            dropout=0.0,
            vocab_size=model.config.padded_vocab_size,
        ),
        'iter_num': 5,
    }


def test_a_checkpoint_of_nanogpt_is_a_base(place):
    model, saved = nanogpt_model()
    (place / 'checkpoints' / 'letters-ipa').mkdir(parents=True)
    path = place / 'checkpoints' / 'letters-ipa' / 'ckpt.pt'
    torch.save(saved, path)
    (place / 'tokenizer-ipa').mkdir()
    (place / 'tokenizer-ipa' / 'tokenizer.json').write_text(letter_tokenizer().to_json())
    tokens = torch.randint(0, 27, (2, 9))
    loaded = checkpoints.load_model(pretrained.load_nanogpt(path, letter_tokenizer()), 'cpu')
    torch.testing.assert_close(loaded.hidden(tokens), model.hidden(tokens))
    run = classify(
        *TEXTS[:3],
        '--train_langs=rus',
        '--model_type=ipa',
        '--checkpoint_prefix=checkpoints',
        '--model_prefix=letters-{model_type}',
        '--tokenizer=tokenizer-{model_type}',
        '--max_steps=1',
        '--learning_rate=0',
        '--out_dir=run',
        tiny=TINY[3:],
    )
    assert torch.equal(run['trunk'].blocks[1].mlp.up.weight, model.blocks[1].mlp.up.weight)
    with pytest.raises(UserError, match="no ckpt.pt of nanoGPT's"):
        classify(
            *TEXTS[:3], '--train_langs=rus', '--init_from=run', '--tokenizer=tokenizer-ipa', '--out_dir=x'
        )


@pytest.mark.parametrize(
    'options, part',
    [
        (['--target_func=fn_z'], "target_func is 'fn_z'"),
        (['--train_set_size=9'], 'train_set_size is 9'),
        (['--target_func=fn_h', '--sequence_length=22'], 'multiple of 4'),
        (['--sequence_length=8'], '2^8 = 256'),
        (['--train_langs=rus'], 'train_langs says nothing about an algorithmic task'),
        (['--num_classes=0'], 'num_classes is 0'),
        (['--class_weights=1,2,3'], 'class_weights is'),
        (['--model=llama9'], "model is 'llama9'"),
        (['--lora_rank=4', '--num_layers_to_finetune=1'], 'leave one out'),
        (['--compare_to=nothing'], 'cannot be read'),
    ],
)
def test_a_mistake_with_a_task_is_named(place, options, part):
    with pytest.raises(UserError) as error:
        classify(*options, '--out_dir=run')
    assert part in str(error.value) and not (place / 'run').exists()


@pytest.mark.parametrize(
    'options, change, part',
    [
        (['--train_langs=deu'], {}, "'deu' is not in the database; it has rus, pol"),
        (['--train_langs=rus', '--task=nli'], {}, "has no task 'nli'"),
        (['--train_langs=rus'], {'classes': ['pos', 'neutral']}, "the label 'neg' is none of the 2 classes"),
        (['--train_langs=rus'], {'splits': ['train', 'dev']}, "no file for the split 'dev'"),
        (['--train_langs=rus'], {'train_features': ['text']}, "there is no 'text'"),
        (['--train_langs=rus'], {'dataset': './nowhere'}, 'There is no folder ./nowhere'),
        (['--train_langs=rus', '--sequence_length=9'], {}, 'sequence_length says nothing about texts'),
        (['--train_langs=rus', '--val_set_size=24'], {}, 'val_set_size is 24'),
        (
            ['--train_langs=rus', '--num_classes=1'],
            {'classes': ['neg', 'pos', 'neutral']},
            'labels are of 3 classes',
        ),
    ],
)
def test_a_mistake_with_texts_is_named(place, options, change, part):
    database = runpy.run_path('db.py')['LANGUAGES']
    database['rus']['sentiment'].update(change)
    Path('db.py').write_text(f'LANGUAGES = {database!r}')
    with pytest.raises(UserError) as error:
        classify(*TEXTS, *options, '--out_dir=run')
    assert part in str(error.value)


@pytest.mark.parametrize('words, like', [([], True), (['--group_by_length=False'], False)])
def test_texts_of_like_length_share_a_step(place, monkeypatch, words, like):
    widths, batch_of = [], classification.batch_of
    monkeypatch.setattr(
        classification,
        'batch_of',
        lambda examples, places, device: (
            widths.append([len(examples.rows[place]) for place in places]),
            batch_of(examples, places, device),
        )[1],
    )
    lines = [f'{"x" * (1 + 7 * i % 16)}\ty\t{("neg", "pos")[i % 2]}' for i in range(16)]  # of sixteen lengths
    (place / 'rus' / 'train.tsv').write_text('\n'.join(['a\tb\tlabel', *lines]))
    classify(*TEXTS, '--train_langs=rus', '--max_steps=4', '--eval_every=9', '--out_dir=run', *words)
    steps = [step for step in widths if len(step) == 4]
    assert len(steps) == 4 and all(max(step) - min(step) == 3 for step in steps) is like


def test_a_token_of_the_hub_is_passed_on_and_never_written(place, monkeypatch):
    classify(*TASK, '--num_epochs=1', '--out_dir=base')
    given, load = [], checkpoints.load
    monkeypatch.setattr(
        checkpoints, 'load', lambda path, *hub: given.append((str(path), *hub)) or load('base')
    )
    classify(
        *TASK,
        '--num_epochs=1',
        '--init_from=owner/name',
        '--token=secret',
        '--revision=v2',
        '--out_dir=run',
        tiny=TINY[3:],
    )
    assert given == [('owner/name', 'secret', 'v2')]
    assert 'secret' not in (place / 'run/config.json').read_text() + str(load('run')['train_config'])


def test_adapters_and_the_head_train_and_the_rest_stays(place):
    classify(*TASK, '--num_epochs=1', '--out_dir=base')
    settings = [
        *TASK,
        '--init_from=base',
        '--lora_rank=2',
        '--learning_rate=0.01',
        '--max_steps=8',
        '--eval_every=4',
    ]
    run = classify(*settings, '--out_dir=tuned', tiny=TINY[3:])
    before = torch.load(place / 'base' / 'ckpt.pt', weights_only=True)['model_state_dict']
    weights = dict(run['trunk'].named_parameters())
    assert all(not weight.requires_grad or 'lora' in name for name, weight in weights.items())
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items() if name in before)
    assert any('lora_B' in name and weight.abs().sum() > 0 for name, weight in weights.items())
    tuned = checkpoints.load_model(checkpoints.load('tuned'), 'cpu')  # merged, as the other scripts want it
    tokens = torch.randint(0, 2, (3, 11))
    torch.testing.assert_close(tuned.hidden(tokens), run['trunk'].eval().hidden(tokens))
    with pytest.MonkeyPatch.context() as patch:  # dies after the checkpoint of the fourth step, and goes on
        rate = optim.learning_rate_at
        patch.setattr(
            optim, 'learning_rate_at', lambda step, *rest: 1 / 0 if step == 5 else rate(step, *rest)
        )
        with pytest.raises(ZeroDivisionError):
            classify(*settings, '--out_dir=killed', tiny=TINY[3:])
    classify('--resume_from=killed', tiny=[])
    one, other = (torch.load(place / name / 'ckpt.pt', weights_only=True) for name in ('tuned', 'killed'))
    assert same(one['adapted_state_dict'], other['adapted_state_dict'])
    assert same(one['model_state_dict'], other['model_state_dict'])


@pytest.mark.parametrize('architecture', ['ar', 'sdd'])
def test_what_finetune_leaves_is_a_start_its_adapters_included(place, architecture):
    write_base(place / 'base', architecture)
    write_examples(place / 'examples')
    tune(
        '--dataset=examples',
        '--init_from=base',
        '--use_peft',
        '--max_steps=2',
        '--num_samples=0',
        '--out_dir=tuned',
    )
    base, tuned = (checkpoints.load_model(checkpoints.load(name), 'cpu') for name in ('base', 'tuned'))
    run = classify(
        *TEXTS[:3],
        '--train_langs=rus',
        '--init_from=tuned',
        '--learning_rate=0',
        '--weight_decay=0',
        '--max_steps=1',
        '--out_dir=run',
        tiny=TINY[3:],
    )
    tokens = torch.randint(0, 90, (2, 9))
    assert torch.equal(run['trunk'].eval().hidden(tokens), tuned.hidden(tokens))
    assert not torch.equal(tuned.hidden(tokens), base.hidden(tokens))
