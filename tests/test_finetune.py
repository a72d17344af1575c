"""Check what finetune.py promises: runs of the script on a few letters, without network."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer
from helpers import (
    ASCII,
    FIRST_STEP,
    FORM,
    TUNE,
    assert_same_run,
    fill_in,
    fingerprints,
    finish,
    first_gradient,
    load,
    losses,
    metrics,
    run,
    special_ids,
    start,
    start_ranks,
    tune,
    tuning,
    wait_for_step,
    write_base,
    write_examples,
    write_tuning,
)

import hf
from lm import data
from lm.configurator import ROOT, UserError
from lm.folder import Folder


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return write_tuning(tmp_path_factory.mktemp('finetune'))


# ---------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize('base, architecture', [('ar', 'ar'), ('sdd', 'sdd'), ('ar', 'diffusion')])
def test_it_learns_to_answer(place, tmp_path, base, architecture):
    words = [f'--architecture={architecture}', '--max_steps=80', '--eval_every=80', '--log_every=80']
    tune(*tuning(place, base, *words, f'--out_dir={tmp_path}/run'))
    first, last = losses(tmp_path / 'run')
    assert last < first - 1
    checkpoint = load(tmp_path / 'run')
    assert checkpoint['architecture'] == architecture
    assert checkpoint['model_config']['shift'] == (base != architecture)
    assert checkpoint['train_config']['anneal_steps'] == (0 if base == architecture else 8)


@pytest.mark.parametrize('on_prompt', [False, True])
def test_the_loss_is_on_answers_alone_or_on_the_prompt_too(place, tmp_path, on_prompt):
    words = [f'--train_on_prompt={on_prompt}', '--packing=False', '--batch_size=60']
    words += ['--num_epochs=1', '--max_steps=0', f'--out_dir={tmp_path}/run']
    variables = tune(*tuning(place, 'ar', *words))
    folder, count = Folder(place / 'examples'), variables['batches'].get(0)[1]
    assert count == (len(folder.tokens['train']) if on_prompt else folder.masks['train'].sum())
    assert variables['step'] == variables['max_steps'] == 1


@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
def test_examples_are_cut_alike_whether_the_prompt_is_in_the_loss(place, tmp_path, architecture):
    words = [
        f'--architecture={architecture}',
        '--block_size=16',
        '--packing=False',
        '--max_steps=1',
        '--eval_every=1',
    ]
    rows = []
    for on_prompt in (False, True):
        variables = tune(
            *tuning(
                place, 'ar', *words, f'--train_on_prompt={on_prompt}', f'--out_dir={tmp_path}/{on_prompt}'
            )
        )
        rows.append(variables['batches'].rows)
    one, other = rows
    assert one.cut == other.cut > 0 and one.dropped == other.dropped
    for row in range(one.num_rows):
        (tokens, answers, *_), (same_tokens, learned, *_) = one.read(row), other.read(row)
        size = one.num_tokens and min(len(tokens), len(same_tokens))
        assert (tokens[:size] == same_tokens[:size]).all() and (learned[:size] >= answers[:size]).all()


@pytest.mark.parametrize('packing', [True, False])
def test_a_prompt_is_never_masked_answer_and_padding_are(place, tmp_path, packing):
    words = [f'--packing={packing}', f'--out_dir={tmp_path}/run', '--max_steps=1', '--batch_size=32']
    variables = tune(*tuning(place, 'diffusion', *words))
    model, (batch,) = variables['raw_model'], variables['batches'].get(0)[0]
    maskable, _ = model.loss_positions(batch.tokens, batch.loss_mask)
    x_t, masked = model.corrupt(batch.tokens, maskable, batch.noise, torch.full((len(batch.tokens), 1), 0.9))
    in_prompt, padding = batch.loss_mask == 0, batch.tokens == variables['tokenizer'].ignore_id
    assert in_prompt.any() and torch.equal(x_t[in_prompt], batch.tokens[in_prompt])
    assert masked[~in_prompt & padding].any() and masked[~in_prompt & ~padding].any()


def test_the_loss_without_padding_stands_beside_that_with_it(place, tmp_path, capsys):
    words = [f'--out_dir={tmp_path}/run', '--packing=False', '--max_steps=3']
    variables = tune(*tuning(place, 'diffusion', *words))
    row, model = metrics(tmp_path / 'run')[-1], variables['raw_model'].eval()
    text = padding = count = 0
    for batch in data.EvaluationBatches(variables['folder'], 'val', type(model), 64, 4, 'examples'):
        with torch.no_grad():
            nll, counted, _ = model(*batch, reduction='none')
        is_padding, count = batch.tokens == model.config.ignore_id, count + counted.sum()
        text, padding = text + nll[~is_padding].sum(), padding + nll[is_padding].sum()
    assert padding > 0
    assert float(row['val/loss_without_padding']) == pytest.approx((text / count).item(), rel=1e-5)
    assert float(row['val/loss']) == pytest.approx(((text + padding) / count).item(), rel=1e-5)
    assert f'val/loss_without_padding {float(row["val/loss_without_padding"]):.4f}' in capsys.readouterr().out
    assert not metrics(place / 'run')[-1]['val/loss_without_padding']  # of ar, which has no padding


@pytest.mark.faults
@pytest.mark.parametrize(
    'prepared, given, used', [(32, [], 32), (500, [], 64), (32, ['--block_size=48'], 48)]
)
def test_the_block_size_is_the_one_that_the_data_were_prepared_for(place, tmp_path, prepared, given, used):
    folder = shutil.copytree(place / 'examples', tmp_path / 'examples')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'max_seq_len': prepared}))
    variables = tune(
        *tuning(place), f'--dataset={folder}', '--max_steps=1', *given, f'--out_dir={tmp_path}/out'
    )
    assert variables['block_size'] == used


@pytest.mark.faults
def test_what_cannot_fit_into_the_memory_is_refused_before_anything_is_written(place, tmp_path):
    with pytest.raises(UserError, match='Training takes about .* GB, and there are .*; lower batch_size'):
        tune(*tuning(place), '--batch_size=1_000_000_000', '--max_steps=1', f'--out_dir={tmp_path}/out')
    assert list(tmp_path.iterdir()) == []


def test_warmup_is_at_most_a_tenth_of_the_steps_unless_given(place, tmp_path):
    variables = tune(*tuning(place, 'ar', f'--out_dir={tmp_path}/a', '--num_epochs=50', '--max_steps=2'))
    assert variables['step'] == 2 and variables['warmup'] == 0
    variables = tune(*tuning(place, 'ar', f'--out_dir={tmp_path}/b', '--max_steps=2', '--warmup_steps=1'))
    assert variables['warmup'] == 1


def test_answers_are_printed_by_adapters_on_a_rounded_base_with_a_head_of_its_own(place, tmp_path, capsys):
    write_base(tmp_path / 'untied', 'ar', tied=False)
    words = '--use_peft --dtype=bfloat16 --num_samples=1 --sample_tokens=4 --max_steps=1'.split()
    tune(f'--dataset={place}/examples', f'--init_from={tmp_path}/untied', *words, f'--out_dir={tmp_path}/run')
    assert 'val/loss' in capsys.readouterr().out


def test_the_first_thing_shown_is_an_example_with_what_is_in_the_loss(place, tmp_path, capsys):
    words = ['--num_samples=1', '--sample_tokens=4', f'--out_dir={tmp_path}/run']
    tune(*tuning(place, 'ar', *words))
    output = capsys.readouterr().out
    assert output.startswith('--- an example; the loss is on what is in «»\n<|endoftext|>Ask say ')
    assert re.search(
        r'Say «[so itis!]+<\|endoftext\|>»\n---\n60 examples of [\d,]+ tokens, '
        r'[\d,]+ of them trained, in [\d,]+ rows of 64',
        output,
    )
    assert re.search(r'memory, about: weights [\d.]+, gradients', output)
    assert len(re.findall(r'a held-out prompt and its answer at step \d\nAsk say 0', output)) == 3


def test_the_checkpoint_knows_the_format_that_it_was_tuned_with(place):
    checkpoint = load(place / 'run')
    assert checkpoint['prompt_format'] == FORM and checkpoint['train_config']['learning_rate'] == 0.01


def test_early_stopping_ends_the_run_and_best_is_kept(place, tmp_path, capsys):
    words = ['--max_steps=40', '--eval_every=2', '--learning_rate=3', '--warmup_steps=0']
    words += ['--schedule=constant', '--early_stopping=2', f'--out_dir={tmp_path}/run']
    arguments = tuning(place, 'ar', *words)
    variables = tune(*arguments)
    step, best = variables['step'], variables['best'].step
    assert step == best + 4 < 40 and load(tmp_path / 'run', 'best.pt')['global_step'] == best
    assert f'stopped early at step {step}' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        tune(*arguments, '--resume_from=auto')
    assert stop.value.code == 0 and '--early_stopping=0 makes it go on' in capsys.readouterr().out


def test_early_stopping_counts_evaluations_though_eval_every_changes(place, tmp_path):
    words = ['--learning_rate=3', '--warmup_steps=0', '--schedule=constant', f'--out_dir={tmp_path}/run']
    arguments = tuning(place, 'ar', *words, '--early_stopping=3')
    tune(*arguments, '--max_steps=4', '--eval_every=4')  # one evaluation is not better than the first
    variables = tune(*arguments, '--max_steps=40', '--eval_every=1', '--resume_from=auto')
    best = variables['best']
    assert best.later == 3 and variables['step'] == (6 if best.step == 0 else best.step + 3)


def test_a_run_that_goes_back_to_a_copy_stops_early_where_it_did_before(place, tmp_path, monkeypatch):
    losses = dict(enumerate([9.0, 8.0, 7.5, 7.6, 7.7, 7.0, 7.1, 7.2, 7.3]))
    words = tuning(place, 'ar', '--max_steps=40', '--eval_every=1', '--save_every=1', '--early_stopping=3')
    steps = []  # of the evaluations of a run

    def evaluate(*_):
        steps.append(steps[-1] + 1 if steps else 0)
        return {'val/loss': losses[steps[-1]]}

    monkeypatch.setattr('lm.runtime.evaluate', evaluate)
    assert tune(*words, f'--out_dir={tmp_path}/run')['step'] == 8
    for copy in (7, 6, 4, 2):
        shutil.copytree(tmp_path / 'run', tmp_path / f'back-{copy}')
        steps[:] = [copy - 1]
        assert (
            tune(*words, f'--resume_from={tmp_path}/back-{copy}/checkpoints/checkpoint-{copy}')['step'] == 8
        )


def test_scratch_is_allowed_with_a_warning(place, tmp_path, capsys):
    words = ['--init_from=scratch', '--architecture=diffusion', '--block_size=64', '--max_steps=1']
    tune(f'--dataset={place}/examples', *words, f'--out_dir={tmp_path}/run')
    assert 'warning: init_from=scratch' in capsys.readouterr().out
    assert load(tmp_path / 'run')['architecture'] == 'diffusion'


def test_a_model_of_the_hub_is_asked_for_with_the_token_which_is_written_nowhere(
    place, tmp_path, monkeypatch
):
    hf.main(['export', str(place / 'ar'), f'--out={tmp_path}/exported'])
    asked = []

    def download(name, token, revision, **options):
        asked.append((name, token, revision))
        return str(tmp_path / 'exported')

    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    words = ['--init_from=owner/name', '--token=secret', '--revision=v2', '--max_steps=1']
    tune(f'--dataset={place}/examples', *words, f'--out_dir={tmp_path}/run')
    assert set(asked) == {('owner/name', 'secret', 'v2')}
    assert not [path for path in (tmp_path / 'run').iterdir() if b'secret' in path.read_bytes()]


# ---------------------------------------------------------------------------- resume, ranks

CASES = {  # base, settings
    'ar': ('ar', ['--gradient_accumulation_steps=2', '--dropout=0.1', '--warmup_steps=4']),
    'diffusion': ('diffusion', ['--packing=False', '--optimizer=muon']),
    'sdd': ('sdd', ['--p_belief=((0.25,1.0),)', '--k_warmup_steps=6']),
    'adapters': ('ar', ['--use_peft', '--peft_lora_r=4', '--optimizer=muon']),
    'blocks': ('ar', ['--use_peft', '--peft_lora_r=4', '--architecture=diffusion', '--block_length=(4,)']),
    'converted': ('ar', ['--use_peft', '--peft_lora_r=4', '--architecture=sdd', '--p_belief=((0,1),)']),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_a_stopped_run_goes_on_bit_identical(place, tmp_path, case):
    base, words = CASES[case]
    steps, out, reference = 40, tmp_path / 'run', tmp_path / 'reference'
    arguments = [*TUNE, *tuning(place, base, *words), f'--max_steps={steps}', '--eval_every=20']
    whole = start('finetune.py', *arguments, f'--out_dir={reference}')
    process = start('finetune.py', *arguments, f'--out_dir={out}')
    wait_for_step(out, 3, process)
    os.kill(process.pid, signal.SIGTERM)
    finish(process)
    assert 3 <= load(out)['global_step'] < steps
    run('finetune.py', f'--resume_from={out}')  # the checkpoint knows the settings
    finish(whole)
    assert_same_run(out, reference)
    tuned, base = load(reference)['model_state_dict'], load(place / base)['model_state_dict']
    changed = (tuned['embedding.weight'] != base['embedding.weight']).any(1)
    if '--use_peft' in words:
        ids = special_ids(letter_tokenizer(ASCII))
        new = [ids['mask_id'], ids['ignore_id']] if case in ('converted', 'blocks') else []
        assert changed.nonzero().flatten().tolist() == new
        assert case != 'converted' or (tuned['belief_proj.weight'] != torch.eye(16)).any()
    else:
        assert changed.any()


def division(place, base, packing, micro_steps, ranks):
    """Eight rows a step, however they are divided."""
    division = [f'--batch_size={8 // (micro_steps * ranks)}', f'--gradient_accumulation_steps={micro_steps}']
    return [*TUNE, *tuning(place, base), *FIRST_STEP, f'--packing={packing}', *division]


@pytest.mark.slow
@pytest.mark.parametrize('base, packing', [('ar', True), ('ar', False), ('sdd', True)])
def test_the_gradient_is_the_same_for_any_number_of_micro_steps_and_ranks(place, tmp_path, base, packing):
    """Answers are of very different length, so that a mean of means would be something else."""
    out = tmp_path / 'run'
    run('finetune.py', *division(place, base, packing, 1, 1), f'--out_dir={out}')
    expected, loss = first_gradient(out)
    assert expected.norm() > 0.1
    for micro_steps, ranks in ((4, 1), (2, 2)):
        words = division(place, base, packing, micro_steps, ranks)
        finish(*start_ranks('finetune.py', *words, f'--out_dir={out}', ranks=ranks))
        gradient, same_loss = first_gradient(out)
        assert (gradient - expected).abs().max() < 1e-6
        assert same_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.faults
def test_adapters_on_quantized_weights_train_on_several_ranks(place, tmp_path):
    words = tuning(place, 'ar', '--use_peft', '--load_in_4bit', f'--out_dir={tmp_path}/run')
    finish(*start_ranks('finetune.py', *TUNE, *words, ranks=2))
    assert load(tmp_path / 'run')['global_step'] == 6


@pytest.mark.faults
def test_adapters_on_random_weights_go_on_in_their_blocks_and_another_script_is_refused(place, tmp_path):
    words = ['--init_from=scratch', '--use_peft', '--architecture=diffusion', '--block_length=4']
    tune(*words, f'--dataset={place}/examples', f'--out_dir={tmp_path}/run')
    tune(f'--resume_from={tmp_path}/run', '--max_steps=8')
    assert load(tmp_path / 'run')['model_config']['block_length'] == (4,)
    with pytest.raises(UserError, match='is of another script'):
        run('train.py', f'--resume_from={place}/run', '--max_steps=9')


def test_copies_are_kept_up_to_their_limit(place, tmp_path):
    tune(*tuning(place, 'ar', f'--out_dir={tmp_path}/run', '--save_every=1', '--save_total_limit=2'))
    kept = {path.name for path in (tmp_path / 'run/checkpoints').iterdir()}
    assert 'checkpoint-6' in kept and len(kept) == 2  # and the one before, or the best


def test_a_run_that_is_finished_or_in_the_way_is_left_alone(place, capsys):
    before = fingerprints(place / 'run')
    with pytest.raises(SystemExit) as stop:
        run('finetune.py', f'--resume_from={place}/run')
    assert stop.value.code == 0 and 'is finished at' in capsys.readouterr().out
    with pytest.raises(UserError, match='already holds a run'):
        tune(*tuning(place, 'ar', f'--out_dir={place}/run'))
    assert fingerprints(place / 'run') == before


# ---------------------------------------------------------------------------- memory

PEAK = """
import re, runpy, sys
sys.argv = ['finetune.py', *sys.argv[1:]]
runpy.run_path('finetune.py', run_name='__main__')
print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
"""


def start_for_peak(place, base, out, *more):
    words = ['--max_steps=1', '--packing=False', '--eval_tokens=64', *more]
    arguments = [*TUNE, *tuning(place, base, *words), f'--out_dir={out}']
    command = [sys.executable, '-c', PEAK, *map(str, arguments)]
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}  # nothing that is freed is kept
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def estimate_and_peak(process):
    """Return the megabytes that a run says it takes, and those that its process took at most."""
    output = process.communicate()[0]
    assert process.returncode == 0
    estimate = float(re.search(r'memory, about: .*; (\S+) GB in all', output)[1]) * 1e3
    return estimate, int(re.search(r'peak (\d+)', output)[1]) * 1024 / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the peak is read from /proc')
def test_the_memory_estimate_is_near_the_peak(place, tmp_path):
    """Beside a run of next to nothing, so that what Python and torch themselves take is left out."""
    write_examples(tmp_path / 'examples', 8, 4, examples=lambda count: [('say', '', 'so ' * 75)] * count)
    write_base(tmp_path / 'base', 'ar', block_size=256, n_layer=2, n_head=4, n_embd=384)
    cases = {'full': [], 'nf4': ['--use_peft', '--load_in_4bit']}
    runs = {name: start_for_peak(tmp_path, 'base', tmp_path / name, *more) for name, more in cases.items()}
    nothing, least = estimate_and_peak(start_for_peak(place, 'ar', tmp_path / 'least'))
    for name, process in runs.items():
        estimate, peak = estimate_and_peak(process)
        assert 2 / 3 < (estimate - nothing) / (peak - least) < 1.5, (name, estimate - nothing, peak - least)


# ---------------------------------------------------------------------------- bad input

BAD = {
    '--dataset=nowhere': "no prepared data at 'nowhere'",
    '--dataset=': 'There is nothing to learn from; give --dataset=NAME',
    '--dataset=PLACE/plain': 'PLACE/plain has no train_masks.bin.*prepare/instruct.py',
    '--dataset=PLACE/without': 'train split of PLACE/without has no answer of at most',
    '--dataset=PLACE/other': 'another vocabulary',
    '--init_from=': 'init_from is empty; give --init_from=CHECKPOINT',
    '--init_from=nowhere.pt': 'nowhere.pt',
    '--init_from=PLACE/examples/config.json': 'config.json',
    '--architecture=nothing': "architecture='ar', no start for 'nothing'",
    '--anneal_steps=5': 'anneal_steps is 5, but the attention of this model does not change',
    '--block_size=2000': 'block_size is 2000; .*takes 8 to 64 tokens',
    '--learning_rate=0': 'learning_rate is 0, so nothing would be trained',
    '--max_steps=-1 --num_epochs=0': 'max_steps is -1, num_epochs 0.0: nothing to do',
    '--trust_remote_code': 'trust_remote_code=True is refused',
    '--use_peft --load_in_8bit --load_in_4bit': 'exclude each other; choose one',
    '--load_in_4bit': 'add --use_peft',
    '--optimizer=sgd': "optimizer is 'sgd'; choose adamw",
    '--dropout=1': 'dropout is 1.0; it must be at least 0 and below 1',
    '--gradient_checkpointing_kwargs={"use_reentrant":True}': 'reentrant',
}


@pytest.fixture(scope='module')
def damaged(place):
    """Beside the examples: plain/ without masks, without/ answers, and other/ with another vocabulary."""
    plain, without, other = (
        shutil.copytree(place / 'examples', place / name) for name in ('plain', 'without', 'other')
    )
    (plain / 'train_masks.bin').unlink()
    masks = np.fromfile(without / 'train_masks.bin', np.uint8)
    np.zeros_like(masks).tofile(without / 'train_masks.bin')
    (other / 'tokenizer.json').write_text(letter_tokenizer([*reversed(ASCII)]).to_json())
    return place


@pytest.mark.parametrize('arguments', BAD)
def test_a_bad_setting_is_refused_before_anything_is_written(damaged, tmp_path, monkeypatch, arguments):
    monkeypatch.setattr('lm.run_folder.ROOT', tmp_path)
    with pytest.raises(UserError, match=fill_in(BAD[arguments], PLACE=damaged)) as error:
        tune(*tuning(damaged), *fill_in(arguments, PLACE=damaged).split())
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


BAD_RESUMES = {
    '--block_size=32': 'has block_size=64, not 32',
    '--packing=False': 'has packing=True, not False',
    '--batch_size=8': '4 rows per step, not 8',
    '--init_from=other': "has init_from='.*/ar', not 'other'",
}


@pytest.mark.parametrize('argument', BAD_RESUMES)
def test_a_bad_resume_is_refused_and_the_run_is_unchanged(place, argument):
    before = fingerprints(place / 'run')
    with pytest.raises(UserError, match=BAD_RESUMES[argument]):
        run('finetune.py', f'--resume_from={place}/run', '--max_steps=9', argument)
    assert fingerprints(place / 'run') == before
