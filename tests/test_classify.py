"""Check what classify.py promises, seen from outside: runs of the script on small tasks and texts, without network."""

import json
import os
import runpy
import signal

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer, random_model
from helpers import (
    CPU,
    GPT2_SWITCHES,
    DeadError,
    assert_same_run,
    dies_at_call,
    finish,
    load,
    losses,
    metrics,
    run,
    special_ids,
    start,
    start_ranks,
    tune,
    wait_for_step,
    write_base,
    write_examples,
)

import hf
from lm import checkpoints, classification
from lm.configurator import UserError

COMMON = [*CPU, '--seed=1']
TINY = [*COMMON, '--n_layer=2', '--n_head=2', '--n_embd=16']
TASK = '--target_func=fn_a --sequence_length=10 --train_set_size=20 --test_set_size=40 --batch_size=6'.split()
TEXTS = ['--task=sentiment', '--language_database=db.py', '--batch_size=4', '--train_langs=rus']
BYTES = ['--tokenizer=bytes', '--block_size=24']


def classify(*arguments):
    return run('classify.py', *arguments)


def write_language(folder, words, draw):
    folder.mkdir()
    for split, size in (('train', 24), ('test', 12)):
        labels = draw.integers(0, 2, size)
        labels[:2] = 0, 1
        lines = ['a\ta-phoneme\tb\tb-phoneme\tlabel']
        for label in labels:
            text = 'so ' * int(draw.integers(0, 5)) + words[label]
            lines.append(f'{text}\tp{words[label]}\tmore\tpmore\t{("neg", "pos")[label]}')
        (folder / f'{split}.tsv').write_text('\n'.join(lines) + '\n')


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a database of two languages."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    entry = {
        'train_features': ['a', 'b'],
        'eval_feature': 'label',
        'splits': ['train', 'test'],
        'task_type': 'classification',
        'classes': ['neg', 'pos'],
    }
    for language, words in (('rus', ('da', 'net')), ('pol', ('tak', 'nie'))):
        write_language(tmp_path / language, words, draw)
    database = {language: {'sentiment': {**entry, 'dataset': language}} for language in ('rus', 'pol')}
    (tmp_path / 'db.py').write_text(f'LANGUAGES = {database!r}')
    return tmp_path


def results_of(out):
    return json.loads((out / 'eval_results.json').read_text())


# ---------------------------------------------------------------------------- tasks


def test_the_quick_run_with_its_published_names_leaves_its_artifacts(place):
    published = (
        '--n_epochs=4 --lr=1e-3 --eta_min=1e-4 --precision=fp32 --results_path=run --model=tiny'.split()
    )
    classify(*COMMON, *TASK, '--batch_size=20', '--n_layer=1', '--n_embd=16', *published)
    out = place / 'run'
    config = json.loads((out / 'config.json').read_text())
    expected = dict(num_epochs=4, learning_rate=1e-3, min_lr=1e-4, dtype='float32', pool='last')
    assert {key: config[key] for key in expected} == expected
    history = runpy.run_path(str(out / 'metrics.py'))
    assert history['steps'] == [0, 1, 2, 3, 4]  # before the first step and after the last
    for name in ('train_losses', 'test_losses', 'train_accuracies', 'test_accuracies'):
        assert len(history[name]) == 5 and all(isinstance(value, float) for value in history[name])
    assert all(0 <= value <= 1 for value in history['train_accuracies'] + history['test_accuracies'])
    results = results_of(out)
    assert results['test']['accuracy'] == history['test_accuracies'][-1] and results['test']['rows'] == 40
    with np.load(out / 'predictions.npz') as saved:
        labels, preds = saved['test_labels'], saved['test_preds']
        assert len(labels) == 40 and (preds == (saved['test_logits'][:, 0] > 0)).all()
        assert (preds == labels).mean() == pytest.approx(results['test']['accuracy'])
    assert {'logs.log', 'metrics.csv', 'ckpt.pt'} <= {path.name for path in out.iterdir()}
    last = metrics(out)[-1]
    assert last['step'] == '4' and last['train/lr']


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd'])
def test_each_architecture_learns_a_simple_task(place, architecture):
    task = '--target_func=fn_c --sequence_length=14 --train_set_size=400 --test_set_size=100'.split()
    shape = f'--architecture={architecture} --pool=mean --n_layer=1 --n_head=2 --n_embd=32'.split()
    settings = '--batch_size=50 --num_epochs=50 --learning_rate=1e-2 --optimizer=muon'.split()
    settings += ['--schedule=linear', '--eval_every=120', '--out_dir=run']
    classify(*COMMON, *task, *shape, *settings)
    assert results_of(place / 'run')['test']['accuracy'] > 0.75
    loaded = checkpoints.load_model(checkpoints.load(place / 'run'), 'cpu')  # as the other scripts do
    assert loaded.config.n_embd == 32


def test_validation_rows_choose_the_weights_and_stop_early(place, capsys):
    stopping = '--val_set_size=10 --early_stopping=2 --eval_every=1 --max_steps=60'.split()
    variables = classify(*TINY, *TASK, *stopping, '--learning_rate=0.03', '--out_dir=run')
    best, results = variables['best'].step, results_of(place / 'run')
    assert variables['step'] < 60 and results['step'] == best == variables['history']['steps'][-1] - 2
    values = losses(place / 'run')
    assert int(np.argmin(values)) == best
    assert results['val']['loss'] == pytest.approx(min(values), rel=1e-4)
    with pytest.raises(SystemExit):
        classify('--out_dir=run', '--resume_from=auto')
    assert '--early_stopping=0 makes it go on' in capsys.readouterr().out


def test_evaluations_take_some_rows_and_the_last_one_all_that_are_held_out(place):
    classify(*TINY, *TASK, '--max_steps=2', '--eval_examples=7', '--eval_every=1', '--out_dir=run')
    results = results_of(place / 'run')
    assert {name: results[name]['rows'] for name in ('train', 'test')} == {'train': 7, 'test': 40}


def test_a_head_that_is_not_finite_replaces_no_checkpoint(place):
    settings = '--num_layers_to_finetune=0 --max_steps=1 --warmup_steps=0 --learning_rate=1e39 --out_dir=run'
    with pytest.raises(UserError, match=r'head\.\S+ is not finite after step 1; the last checkpoint is kept'):
        classify(*TINY, *TASK, *settings.split())
    checkpoint = load(place / 'run')
    assert checkpoint['global_step'] == 0
    assert all(weight.isfinite().all() for weight in checkpoint['head_state_dict'].values())


# ---------------------------------------------------------------------------- texts


@pytest.mark.faults
def test_a_thousand_classes_leave_small_files(place):
    database = (
        (place / 'db.py')
        .read_text()
        .replace("['neg', 'pos']", str(['neg', 'pos', *map(str, range(9, 1007))]))
    )
    (place / 'db.py').write_text(database)
    classify(*TINY, *TEXTS, *BYTES, '--max_steps=1', '--out_dir=run')
    assert (place / 'run/eval_results.json').stat().st_size < 20_000
    assert 'confusion' not in results_of(place / 'run')['rus']


@pytest.mark.slow
def test_texts_in_two_languages_are_joined_and_judged_apart(place):
    settings = '--num_epochs=30 --learning_rate=1e-2 --optimizer=muon --architecture=diffusion'.split()
    languages = ['--train_langs=rus,pol', '--eval_langs=pol,rus']
    variables = classify(*TINY, *TEXTS, *BYTES, *languages, *settings, '--n_embd=32', '--out_dir=run')
    results = results_of(place / 'run')
    assert results['train']['rows'] == 48 and {'pol', 'rus'} < set(results)
    assert results['classes'] == ['neg', 'pos']
    assert results['pol']['macro_f1'] > 0.9 and len(results['rus']['confusion']) == 2
    assert 0 <= results['rus']['auroc'] <= 1
    assert variables['raw_classifier'].pool == 'mean'
    row, vocabulary = variables['sets']['train'].rows[0].tolist(), variables['vocabulary']
    assert row[0] == vocabulary.endoftext_id and row.count(vocabulary.endoftext_id) == 2
    assert vocabulary.decode(row).endswith('more')
    ipa = classify(*TINY, *TEXTS, *BYTES, '--model_type=ipa', '--num_epochs=1', '--out_dir=ipa')
    assert vocabulary.decode(ipa['sets']['rus'].rows[0]) in ('pdapmore', 'pnetpmore')


@pytest.mark.parametrize('words, like', [([], True), (['--group_by_length=False'], False)])
def test_texts_of_like_length_share_a_step(place, words, like):
    lines = [f'{"x" * (1 + 7 * i % 16)}\ty\t{("neg", "pos")[i % 2]}' for i in range(16)]  # of sixteen lengths
    (place / 'rus' / 'train.tsv').write_text('\n'.join(['a\tb\tlabel', *lines]))
    spread = []
    for steps in (1, 2, 3, 4):
        words_of_run = [f'--max_steps={steps}', '--eval_every=9', '--overwrite', '--out_dir=run', *words]
        variables = classify(*TINY, *TEXTS, *BYTES, *words_of_run)
        last = [len(variables['sets']['train'].rows[i]) for i in variables['index']]
        spread.append(max(last) - min(last))
    assert all(difference == 3 for difference in spread) is like


# ---------------------------------------------------------------------------- resume, ranks

CASES = {
    'dropout': ['--dropout=0.1', '--token_dropout=0.3', '--gradient_accumulation_steps=2'],
    'selected': ['--architecture=diffusion', '--optimizer=muon', '--val_set_size=8', '--best_by=accuracy'],
    'sdd': ['--architecture=sdd', '--label_smoothing=0.1', '--class_weights=balanced'],
    'adapters': ['--init_from=base', '--lora_rank=2'],
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_a_stopped_run_goes_on_bit_identical(place, case):
    steps = 40
    shape = COMMON if case == 'adapters' else [*TINY, *BYTES]
    if case == 'adapters':
        write_base(place / 'base', 'ar')
    settings = [*shape, *TEXTS, *CASES[case], f'--max_steps={steps}', '--eval_every=20', '--log_every=1']
    process = start('classify.py', *settings, '--out_dir=run')
    wait_for_step(place / 'run', 3, process)
    os.kill(process.pid, signal.SIGTERM)
    finish(process)
    assert 3 <= load(place / 'run')['global_step'] < steps
    assert not (place / 'run/predictions.npz').exists()
    classify('--resume_from=run')
    classify(*settings, '--out_dir=whole')
    assert_same_run(place / 'run', place / 'whole')
    one, other = load(place / 'run'), load(place / 'whole')
    assert one['history'] == other['history']
    torch.testing.assert_close(one['head_state_dict'], other['head_state_dict'], atol=0, rtol=0)
    with np.load(place / 'run/predictions.npz') as a, np.load(place / 'whole/predictions.npz') as b:
        assert a.files == b.files and all(np.array_equal(a[name], b[name]) for name in a.files)


@pytest.mark.faults
@pytest.mark.parametrize('key', ['train_set_size', 'test_set_size'])
def test_a_set_without_rows_is_a_sentence(place, key):
    with pytest.raises(UserError, match=f'{key} is 0; it must be even'):
        classify(*TINY, *TASK, f'--{key}=0', '--out_dir=run')
    assert not (place / 'run').exists()


@pytest.mark.faults
def test_a_start_with_a_shorter_block_size_goes_on_with_it(place):
    write_base(place / 'base', 'ar')
    classify(*COMMON, *TEXTS, '--init_from=base', '--block_size=12', '--max_steps=2', '--out_dir=run')
    assert classify('--resume_from=run', '--max_steps=4')['block_size'] == 12


@pytest.mark.faults
def test_a_block_size_is_refused_that_the_start_does_not_see_and_kept_where_it_has_no_effect(place):
    write_base(place / 'base', 'ar')
    with pytest.raises(UserError, match='block_size is 900, but base sees'):
        classify(*COMMON, *TEXTS, '--init_from=base', '--block_size=900', '--max_steps=2', '--out_dir=run')
    words = [*TINY, *TASK, '--block_size=9', '--out_dir=other', '--resume_from=auto']
    for steps in (1, 2):
        assert classify(*words, f'--max_steps={steps}')['step'] == steps


def test_a_finished_run_is_left_alone_and_goes_on_where_it_is_made_longer(place):
    classify(*TINY, *TASK, '--max_steps=2', '--out_dir=run')
    with pytest.raises(SystemExit) as end:
        classify(*TINY, *TASK, '--out_dir=run', '--resume_from=auto')
    assert end.value.code == 0
    for words, said in (
        ([*TASK, '--out_dir=run'], 'already holds a run'),
        (['--target_func=fn_b', '--resume_from=run'], "has target_func='fn_a', not 'fn_b'"),
        (['--tokenizer=char', '--resume_from=run'], "has tokenizer='bpe', not 'char'"),
        (['--batch_size=5', '--max_steps=4', '--resume_from=run'], 'has 6 rows per step, not 5'),
    ):
        with pytest.raises(UserError, match=said):
            classify(*TINY, *words)
    assert classify('--resume_from=run', '--max_steps=4')['step'] == 4


@pytest.mark.faults
def test_a_run_that_dies_in_its_last_evaluation_is_not_finished(place, monkeypatch):
    classify(*TINY, *TASK, '--max_steps=2', '--out_dir=run')
    with monkeypatch.context() as patch:
        patch.setattr(np, 'savez_compressed', lambda *_, **__: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(UserError, match='could not be written'):
            classify('--resume_from=run', '--max_steps=4')
    assert not (place / 'run/predictions.npz').exists()  # those of the shorter run
    classify('--resume_from=run')
    assert (place / 'run/predictions.npz').exists()


@pytest.mark.faults
def test_a_run_goes_on_with_other_labels_only_on_purpose(place):
    settings = [*TINY, *TEXTS, *BYTES, '--out_dir=run']
    classify(*settings, '--max_steps=2')
    table = (place / 'rus/test.tsv').read_text().split('\n')
    table[1] = table[1].replace('neg', 'pos') if 'neg' in table[1] else table[1].replace('pos', 'neg')
    (place / 'rus/test.tsv').write_text('\n'.join(table))
    with pytest.raises(
        UserError, match='the rows of rus changed since the run of run/ckpt.pt; put .*--changed_data'
    ):
        classify(*settings, '--max_steps=4', '--resume_from=auto')
    assert classify(*settings, '--max_steps=4', '--resume_from=auto', '--changed_data')['step'] == 4
    assert 'resumed with the rows of rus=' in (place / 'run/logs.log').read_text()


@pytest.mark.faults
def test_a_run_that_dies_in_an_evaluation_loses_no_step(place, monkeypatch):
    settings = [*TINY, *TASK, '--max_steps=4', '--eval_every=2', '--val_set_size=6']
    for calls, step in ((1, 0), (5, 2), (5, 4)):  # four in each evaluation
        with monkeypatch.context() as patch, pytest.raises(DeadError):
            function = classification.class_metrics
            patch.setattr(classification, 'class_metrics', dies_at_call(function, calls))
            classify(*settings, '--out_dir=run', '--resume_from=auto')
        assert load(place / 'run')['global_step'] == step
    classify(*settings, '--out_dir=run', '--resume_from=auto')
    classify(*settings, '--out_dir=whole')
    assert_same_run(place / 'run', place / 'whole')
    assert load(place / 'run')['history'] == load(place / 'whole')['history']


@pytest.mark.slow
def test_two_ranks_end_where_one_does(place):
    settings = [*TINY, *TEXTS, *BYTES, '--max_steps=20']
    finish(*start_ranks('classify.py', *settings, '--batch_size=2', '--out_dir=two'))
    classify(*settings, '--out_dir=one')
    one, two = (load(place / name) for name in ('one', 'two'))
    assert one['global_step'] == two['global_step'] == 20
    for name, weight in one['model_state_dict'].items():
        torch.testing.assert_close(weight, two['model_state_dict'][name], atol=1e-4, rtol=1e-4)
    with np.load(place / 'one/predictions.npz') as a, np.load(place / 'two/predictions.npz') as b:
        np.testing.assert_allclose(a['rus_logits'], b['rus_logits'], atol=1e-4)


# ---------------------------------------------------------------------------- what it starts from


def test_a_run_starts_from_a_checkpoint_and_only_its_top_trains(place):
    classify(*TINY, *TASK, '--num_epochs=1', '--out_dir=base')
    before = load(place / 'base')['model_state_dict']
    settings = [*COMMON, *TASK, '--init_from=base']
    top = ['--num_epochs=2', '--num_layers_to_finetune=1', '--learning_rate=0.01']
    classify(*settings, *top, '--out_dir=tuned')
    after = load(place / 'tuned')['model_state_dict']
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith('blocks.1.')}
    with pytest.raises(UserError, match='base has n_layer=2, not 3; leave it out'):
        classify(*settings, '--n_layer=3', '--out_dir=wrong')
    with pytest.raises(UserError, match='has 2 layers'):
        classify(*settings, '--num_layers_to_finetune=3', '--out_dir=wrong')


def test_adapters_and_the_head_train_and_the_rest_stays(place):
    classify(*TINY, *TASK, '--num_epochs=1', '--out_dir=base')
    settings = [*COMMON, *TASK, '--init_from=base', '--lora_rank=2', '--learning_rate=0.01', '--max_steps=8']
    variables = classify(*settings, '--out_dir=tuned')
    before, weights = load(place / 'base')['model_state_dict'], dict(variables['trunk'].named_parameters())
    assert all(not weight.requires_grad or 'lora' in name for name, weight in weights.items())
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items() if name in before)
    assert any('lora' in name and weight.requires_grad for name, weight in weights.items())
    tuned = checkpoints.load_model(checkpoints.load('tuned'), 'cpu')  # merged, as the other scripts want it
    tokens = torch.randint(0, 2, (3, 11))
    torch.testing.assert_close(tuned.hidden(tokens), variables['trunk'].eval().hidden(tokens))
    assert not torch.equal(tuned.blocks[0].mlp.up.weight, before['blocks.0.mlp.up.weight'])


def test_what_finetune_leaves_is_a_start_its_adapters_included(place):
    write_base(place / 'base', 'sdd')
    write_examples(place / 'examples')
    tune('--dataset=examples', '--init_from=base', '--use_peft', '--max_steps=2', '--out_dir=tuned')
    base, tuned = (checkpoints.load_model(checkpoints.load(name), 'cpu') for name in ('base', 'tuned'))
    frozen = '--learning_rate=0 --weight_decay=0 --max_steps=1'.split()
    variables = classify(*COMMON, *TEXTS, '--init_from=tuned', *frozen, '--out_dir=run')
    tokens = torch.randint(0, 90, (2, 9))
    assert torch.equal(variables['trunk'].eval().hidden(tokens), tuned.hidden(tokens))
    assert not torch.equal(tuned.hidden(tokens), base.hidden(tokens))


def nanogpt_state(model):
    """The weights of a GPT-2 under the names of nanoGPT's ckpt.pt."""
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
        for kind in ('weight', 'bias'):
            for name, part in parts.items():
                state[f'transformer.h.{i}.{name}.{kind}'] = getattr(part, kind)
            qkv = [getattr(getattr(block.attention, letter), kind) for letter in 'qkv']
            state[f'transformer.h.{i}.attn.c_attn.{kind}'] = torch.cat(qkv)
    return {name: weight.detach() for name, weight in state.items()}


def test_a_checkpoint_of_nanogpt_is_found_by_the_published_prefixes(place):
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=24)
    model = random_model('ar', 0.2, **shape, **special_ids(letter_tokenizer()), **GPT2_SWITCHES)
    model_args = {**shape, 'bias': True, 'dropout': 0.0, 'vocab_size': model.config.padded_vocab_size}
    (place / 'checkpoints/letters-ipa').mkdir(parents=True)
    (place / 'tokenizer-ipa').mkdir()
    saved = {'model': nanogpt_state(model), 'model_args': model_args, 'iter_num': 5}
    torch.save(saved, place / 'checkpoints/letters-ipa/ckpt.pt')
    (place / 'tokenizer-ipa/tokenizer.json').write_text(letter_tokenizer().to_json())
    prefixes = ['--checkpoint_prefix=checkpoints', '--model_prefix=letters-{model_type}']
    words = [*prefixes, '--tokenizer=tokenizer-{model_type}', '--model_type=ipa']
    variables = classify(*COMMON, *TEXTS, *words, '--max_steps=1', '--learning_rate=0', '--out_dir=run')
    tokens = torch.randint(0, 27, (2, 9))
    torch.testing.assert_close(variables['trunk'].eval().hidden(tokens), model.hidden(tokens))
    (place / 'other.json').write_text(letter_tokenizer('ab').to_json())
    with pytest.raises(UserError, match='run holds another tokenizer than other.json; leave --tokenizer out'):
        classify(*COMMON, *TEXTS, '--init_from=run', '--tokenizer=other.json', '--out_dir=x')


def test_a_model_of_the_hub_is_asked_for_with_the_token_which_is_written_nowhere(place, monkeypatch):
    write_base(place / 'base', 'ar')
    hf.main(['export', 'base', '--out=exported'])
    asked = []

    def download(name, token, revision, **options):
        asked.append((name, token, revision))
        return str(place / 'exported')

    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    words = ['--init_from=owner/name', '--token=secret', '--revision=v2', '--max_steps=1']
    classify(*COMMON, *TEXTS, *words, '--out_dir=run')
    assert set(asked) == {('owner/name', 'secret', 'v2')}
    assert not [path for path in (place / 'run').iterdir() if b'secret' in path.read_bytes()]


@pytest.mark.faults
def test_a_setting_without_effect_is_reported(place, capsys):
    classify(
        *TINY,
        *TASK,
        '--context_length=9',
        '--vocab_size=3',
        '--lora_alpha=2',
        '--best_by=accuracy',
        '--train_final_norm',
        '--max_steps=1',
        '--out_dir=run',
    )
    notes = {line for line in capsys.readouterr().out.splitlines() if line.startswith('note')}
    assert notes == {
        'note: block_size=9 has no effect on an algorithmic task.',
        'note: vocab_size=3 has no effect on an algorithmic task.',
        'note: lora_alpha=2.0 has no effect without lora_rank.',
        "note: best_by='accuracy' has no effect without validation rows.",
        'note: train_final_norm=True has no effect where more than the top blocks train.',
    }


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    'options, part',
    [
        (['--target_func=fn_z'], "target_func is 'fn_z'"),
        (['--train_set_size=9'], 'train_set_size is 9'),
        (['--target_func=fn_h', '--sequence_length=22'], 'multiple of 4'),
        (['--sequence_length=8'], '2^8 = 256'),
        (['--num_classes=0'], 'num_classes is 0'),
        (['--class_weights=1,2,3'], 'class_weights is'),
        (['--model=llama9'], "model is 'llama9'"),
        (['--pool=max'], "pool is 'max'"),
        (['--lora_rank=4', '--num_layers_to_finetune=1'], 'leave one of them out'),
        (['--early_stopping=2'], 'early_stopping needs validation rows'),
    ],
)
def test_a_mistake_with_a_task_is_named(place, options, part):
    with pytest.raises(UserError) as error:
        classify(*TINY, *options, '--out_dir=run')
    assert part in str(error.value) and not (place / 'run').exists()


@pytest.mark.parametrize(
    'options, change, part',
    [
        (['--train_langs=deu'], {}, "'deu' is not in the database; it has rus, pol"),
        (['--task=nli'], {}, "has no task 'nli'"),
        ([], {'classes': ['pos', 'neutral']}, "the label 'neg' is none of the 2 classes"),
        ([], {'splits': ['train', 'dev']}, "no file for the split 'dev'"),
        (['--val_set_size=24'], {}, 'val_set_size is 24'),
        (['--num_classes=1'], {'classes': ['neg', 'pos', 'neutral']}, 'labels are of 3 classes'),
    ],
)
def test_a_mistake_with_texts_is_named(place, options, change, part):
    database = runpy.run_path('db.py')['LANGUAGES']
    database['rus']['sentiment'].update(change)
    (place / 'db.py').write_text(f'LANGUAGES = {database!r}')
    with pytest.raises(UserError) as error:
        classify(*TINY, *TEXTS, *BYTES, *options, '--out_dir=run')
    assert part in str(error.value) and not (place / 'run').exists()
