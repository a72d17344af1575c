"""What finetune.py promises: runs of the script on a few letters, without network."""

import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer, random_model, several_scripts, signals_kept
from test_train import contents, free_ports, interrupt, load, metrics, same

import model as model_module
from lm import checkpoints, data, optim, prompts, rng
from lm.configurator import ROOT, UserError
from model import ARCHITECTURES, Isolated

ROOT = ROOT
ASCII = [chr(i) for i in range(32, 127)] + ['\n']
FORM = 'Ask {instruction}\n{#input}On {input}\n{/input}Say {output}'
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=64)
GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0)
TINY = (
    '--batch_size=4 --max_steps=6 --eval_every=3 --log_every=1 --learning_rate=0.01 --num_samples=1 '
    '--sample_tokens=4 --device=cpu --dtype=float32 --no_wandb'
).split()
CASES = {
    'ar': ['--gradient_accumulation_steps=2', '--dropout=0.1', '--warmup_steps=4'],
    'diffusion': ['--neftune_alpha=5', '--packing=False', '--optimizer=muon'],
    'sdd': ['--p_belief=((0.25,1.0),)', '--k_warmup_steps=6'],
}


def turns(count):
    """Examples with answers of very different length."""
    for i in range(count):
        yield f'say {i}', 'please' * (i % 2), 'so ' * (i % 7) + 'it is' * (i % 3) + '!'


def write_examples(folder, train=60, val=12, form=FORM, examples=turns):
    """A folder as prepare/instruct.py leaves it."""
    tokenizer, splits = letter_tokenizer(ASCII), {}
    folder.mkdir()
    for split, count in (('train', train), ('val', val)):
        encoded = [prompts.encode(tokenizer, form, [turn]) for turn in examples(count)]
        tokens, masks = (
            np.array(sum(parts, []), kind) for parts, kind in zip(zip(*encoded), (np.uint16, np.uint8))
        )
        tokens.tofile(folder / f'{split}_tokens.bin')
        masks.tofile(folder / f'{split}_masks.bin')
        np.cumsum([0] + [len(ids) for ids, _ in encoded]).astype(np.uint64).tofile(
            folder / f'{split}_index.bin'
        )
        splits[split] = {'tokens': len(tokens), 'documents': count, 'bytes': len(tokens)}
    (folder / 'tokenizer.json').write_text(tokenizer.to_json())
    (folder / 'config.json').write_text(
        json.dumps(
            {
                'format': 1,
                'name': folder.name,
                'vocab_size': tokenizer.vocab_size,
                'dtype': 'uint16',
                'splits': splits,
                'start_token': tokenizer.endoftext_id,
                'prompt_format': form,
            }
        )
    )
    return folder


def ids_of(tokenizer):
    return dict(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)


def write_base(path, architecture, letters=ASCII, **shape):
    """A checkpoint of random weights, as train.py leaves it."""
    tokenizer = letter_tokenizer(letters)
    model = random_model(architecture, 0.1, **{**SHAPE, **ids_of(tokenizer), **shape})
    path.mkdir()
    checkpoints.save(
        path / 'ckpt.pt',
        {
            'architecture': architecture,
            'global_step': 7,
            'model_state_dict': model.state_dict(),
            'model_config': vars(model.config),
            'train_config': {},
            'tokenizer': tokenizer.to_json(),
            'start_token': tokenizer.endoftext_id,
            'prompt_format': None,
        },
    )
    return path


def tune(*arguments, tiny=TINY):
    """Runs the script in this process; returns its variables."""
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(sys, 'argv', ['finetune.py', *tiny, *map(str, arguments)])
        return runpy.run_path(str(ROOT / 'finetune.py'), run_name='__main__')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with prepared examples/, base models ar/, diffusion/ and sdd/, and a finished run of ar, run/."""
    path = tmp_path_factory.mktemp('finetune')
    write_examples(path / 'examples')
    for architecture in ARCHITECTURES:
        write_base(path / architecture, architecture)
    tune(f'--dataset={path}/examples', f'--init_from={path}/ar', f'--out_dir={path}/run')
    return path


def settings(place, architecture='ar', *more):
    return [f'--dataset={place}/examples', f'--init_from={place}/{architecture}', *more]


# ---------------------------------------------------------------------------- rows


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('mode', ['examples', 'packed examples'])
def test_each_example_comes_once_whole_and_only_answers_are_trained(place, architecture, mode):
    folder = data.Folder(place / 'examples')
    rows = data.make_rows(folder, 'train', architecture, 160, mode, training=True)
    start, ignore, seen = folder.config['start_token'], folder.tokenizer.ignore_id, []
    for row in range(rows.num_rows):
        tokens, trained, documents = rows.read(row)
        assert len(tokens) <= rows.row_length
        documents = np.zeros(len(tokens)) if documents is None else documents
        for number in np.unique(documents):
            ids, mask = tokens[documents == number], trained[documents == number]
            assert ids[0] == start and mask[0] == 0  # context of its own
            assert (mask[ids == ignore] == 1).all() and (architecture != 'ar' or ignore not in ids)
            ids, mask = ids[1:][ids[1:] != ignore].tolist(), mask[1:][ids[1:] != ignore].tolist()
            assert (
                ids.count(start) == 1 and ids[-1] == start and mask[-1] == 1
            )  # <|endoftext|> ends the answer
            seen.append((ids, mask))
    expected = [prompts.encode(folder.tokenizer, FORM, [turn]) for turn in turns(60)]
    assert sorted(seen) == sorted(expected)
    assert rows.num_rows == 60 if mode == 'examples' else rows.num_rows < 35


def test_filler_is_of_all_lengths_for_diffusion(place):
    rows = data.make_rows(
        data.Folder(place / 'examples'), 'train', 'diffusion', 64, 'examples', training=True
    )
    filler = np.array([(rows.read(row)[0] == rows.folder.tokenizer.ignore_id).sum() for row in range(60)])
    assert (filler < 3).any() and (filler > 20).any()


def test_best_fit_never_overfills_and_wastes_little():
    sizes = np.array([int(x) for x in rng.random_bits(1, np.arange(500)) % np.uint64(60) + np.uint64(1)])
    rows = data.best_fit(sizes, 64)
    assert sorted(sum(rows, [])) == list(range(500)) and all(sizes[row].sum() <= 64 for row in rows)
    assert len(rows) <= 1.03 * sizes.sum() / 64


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize(
    'changes',
    [{}, {'n_head': 4, 'n_kv_head': 2}, GPT2, {'shift': True}],
    ids=['native', 'grouped', 'gpt2', 'shift'],
)
@pytest.mark.parametrize('attend', ['attend_fused', 'attend_on_cpu'])
def test_packed_examples_have_the_loss_of_single_ones(place, monkeypatch, architecture, changes, attend):
    monkeypatch.setattr(model_module, 'attend_fused', getattr(model_module, attend))
    folder = data.Folder(place / 'examples')
    model = random_model(
        architecture, 0.4, **{**SHAPE, **ids_of(folder.tokenizer), 'block_size': 160, **changes}
    )
    rows = data.make_rows(folder, 'train', architecture, 160, 'packed examples', training=True)
    packed = [rows.read(row) for row in range(rows.num_rows - 4, rows.num_rows)]
    batch = data.stack(packed, data.row_noise(np.arange(4), 4, rows.row_length, ()), pin=False)
    nats = model.losses(*batch)[0]
    assert max(documents[-1] for _, _, documents in packed) >= 2  # several in a row
    for row, (tokens, trained, documents) in enumerate(packed):
        for number in range(documents[-1] + 1):
            where = np.flatnonzero(documents == number)
            noise = batch[2][row, np.append(0, 1 + where)][None]  # the row's level, the tokens' own numbers
            single = data.stack([(tokens[where], trained[where])], noise.numpy(), pin=False)
            expected = model.losses(*single)[0]
            assert expected.sum() > 0 or architecture != 'ar'
            torch.testing.assert_close(nats[row, where], expected[0], atol=1e-5, rtol=1e-5)


def test_isolated_positions_begin_anew():
    place = Isolated(torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 2, 2, 2, 2]]), causal=True)
    assert place.positions(6).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
    assert place.mask[0, 0].int().tolist()[4] == [0, 0, 0, 1, 1, 0]


def test_on_the_way_from_ar_an_example_sees_what_is_open_within_it():
    model = random_model('diffusion', 0.4, **SHAPE, vocab_size=99, mask_id=98).train()
    model.opening = data.opening(2, 4, 64, seed=0)
    documents = torch.tensor([0] * 5 + [1] * 7)[None]
    mask = Isolated(documents, model.sight(12)).mask[0, 0]
    together = documents[0, :, None] == documents[0]
    assert (
        torch.equal(mask, model.opening[:12, :12] & together)
        and 0 < mask.triu(1).sum() < together.triu(1).sum()
    )
    model.opening = data.opening(0, 4, 64, seed=0)
    assert torch.equal(Isolated(documents, model.sight(12)).mask, Isolated(documents, causal=True).mask)


@pytest.mark.parametrize('packing', [True, False])
def test_a_diffusion_models_prompt_is_never_hidden_answer_and_filler_are(place, packing):
    hidden, seen = model_module.Diffusion.hidden, []

    def watched(model, tokens, cache=None):
        seen.append((tokens, cache))
        return hidden(model, tokens, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module.Diffusion, 'hidden', watched)
        variables = tune(
            *settings(
                place,
                'diffusion',
                f'--packing={packing}',
                f'--out_dir={place}/hidden',
                '--overwrite',
                '--num_samples=0',
                '--max_steps=1',
            )
        )
    tokenizer = variables['tokenizer']
    (batch, *_), _ = variables['batches'].get(0)
    tokens, mask = batch[:2]
    corrupted = next(
        one
        for one, _ in seen
        if one.shape == tokens.shape
        and (one != tokens).any()
        and ((one == tokens) | (one == tokenizer.mask_id)).all()
    )
    masked = corrupted == tokenizer.mask_id
    assert not masked[mask == 0].any() and masked[(tokens == tokenizer.ignore_id) & (mask == 1)].any()
    assert masked[(tokens != tokenizer.ignore_id) & (mask == 1)].any()


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_it_learns_to_answer(place, tmp_path, architecture):
    tune(*settings(place, architecture, f'--out_dir={tmp_path}/run', '--max_steps=80', '--eval_every=80'))
    first, last = (float(row['val/loss']) for row in metrics(tmp_path / 'run') if row['val/loss'])
    assert last < first - 1


def test_the_loss_is_on_answers_alone_or_on_the_prompt_too(place, tmp_path):
    for flag, name in ((False, 'answers'), (True, 'all')):
        variables = tune(
            *settings(
                place,
                'ar',
                f'--train_on_prompt={flag}',
                f'--out_dir={tmp_path}/{name}',
                '--num_epochs=1',
                '--max_steps=0',
                '--packing=False',
                '--batch_size=60',
            )
        )
        folder, count = data.Folder(place / 'examples'), variables['batches'].get(0)[1]
        assert count == (folder.masks['train'].sum() if not flag else len(folder.tokens['train']))
        assert variables['step'] == variables['max_steps'] == 1


def test_a_token_of_the_hub_is_passed_on_and_never_written(place, tmp_path, monkeypatch):
    given, load = [], checkpoints.load
    monkeypatch.setattr(checkpoints, 'load', lambda path, *hub, **how: given.append(hub) or load(path))
    tune(*settings(place, 'ar', f'--out_dir={tmp_path}/run', '--token=secret', '--max_steps=1'))
    assert given == [('secret', '')]
    assert 'secret' not in (tmp_path / 'run/config.json').read_text() + str(
        load(tmp_path / 'run')['train_config']
    )


@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
def test_an_ar_model_learns_to_answer_in_another_architecture(place, tmp_path, architecture):
    tune(
        *settings(
            place,
            'ar',
            f'--architecture={architecture}',
            f'--out_dir={tmp_path}/run',
            '--max_steps=80',
            '--eval_every=80',
        )
    )
    first, last = (float(row['val/loss']) for row in metrics(tmp_path / 'run') if row['val/loss'])
    checkpoint = load(tmp_path / 'run')
    assert last < first - 1 and checkpoint['train_config']['anneal_steps'] == 8
    assert checkpoint['architecture'] == architecture and checkpoint['model_config']['shift']
    with pytest.raises(UserError, match="architecture='ar', which cannot start 'nothing'"):
        tune(*settings(place, 'ar', '--architecture=nothing'))
    with pytest.raises(UserError, match="anneal_steps is 5, but 'ar' never looks ahead"):
        tune(*settings(place, 'ar', '--anneal_steps=5'))


def test_sdd_logs_its_candidates_and_its_loss_without_them(place, tmp_path):
    variables = tune(
        *settings(
            place,
            'sdd',
            f'--out_dir={tmp_path}/run',
            '--p_belief=((0,1),)',
            '--k_schedule=(1,3)',
            '--k_warmup_steps=6',
        )
    )
    rows = metrics(tmp_path / 'run')
    assert [row['train/k'] for row in rows[1:]] == ['1'] * 3 + ['3'] * 3 and variables[
        'raw_model'
    ].config.k == 3
    looks = [(float(row['val/loss']), float(row['val/loss_k0'])) for row in rows if row['val/loss']]
    assert len(looks) == 3 and looks[-1][0] != looks[-1][1]
    assert any(row['train/ignore_acc'] for row in rows)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_the_loss_of_the_text_stands_beside_that_with_filler(place, tmp_path, architecture, capsys):
    variables = tune(
        *settings(place, architecture, f'--out_dir={tmp_path}/run', '--packing=False', '--max_steps=3')
    )
    row, model = metrics(tmp_path / 'run')[-1], variables['raw_model'].eval()
    if architecture == 'ar':  # has no filler
        assert not row['val/text_loss']
        return
    text = filler = count = 0
    for batch in data.evaluation_batches(variables['folder'], 'val', architecture, 64, 4, 'examples'):
        with torch.no_grad():
            nats, counted, _ = model.losses(*batch)
        is_filler, count = batch[0] == model.config.ignore_id, count + counted.sum()
        text, filler = text + nats[~is_filler].sum(), filler + nats[is_filler].sum()
    assert filler > 0
    assert float(row['val/text_loss']) == pytest.approx((text / count).item(), rel=1e-5)
    assert float(row['val/loss']) == pytest.approx(((text + filler) / count).item(), rel=1e-5)
    assert f'val/text_loss {float(row["val/text_loss"]):.4f}' in capsys.readouterr().out


def test_steps_win_over_epochs(place, tmp_path):
    variables = tune(*settings(place, 'ar', f'--out_dir={tmp_path}/a', '--num_epochs=50', '--max_steps=2'))
    assert variables['step'] == 2
    assert (variables['warmup'], optim.learning_rate_at(0, 2, 1, 0, 0, 'constant', 0)) == (0, 1)


def test_the_first_thing_shown_is_an_example_with_what_is_trained(place, tmp_path, capsys):
    tune(*settings(place, 'ar', f'--out_dir={tmp_path}/run'))
    output = capsys.readouterr().out
    assert output.startswith('--- an example; trained is what stands in «»\n<|endoftext|>Ask say ')
    assert re.search(
        r'Say «[so itis!]+<\|endoftext\|>»\n---\n60 examples of [\d,]+ tokens, '
        r'[\d,]+ of them trained, in [\d,]+ rows of 64',
        output,
    )
    assert re.search(r'memory, about: weights [\d.]+, gradients', output)
    assert len(re.findall(r'a held-out prompt and its answer at step \d\nAsk say 0', output)) == 3


def test_the_checkpoint_knows_the_format_and_chat_uses_it(place, monkeypatch, capsys):
    checkpoint = load(place / 'run')
    assert checkpoint['prompt_format'] == FORM and checkpoint['train_config']['learning_rate'] == 0.01
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'sample.py',
            f'--checkpoint={place}/run',
            '--chat',
            '--prompt=say 3',
            '--input=please',
            '--max_new_tokens=9',
            '--device=cpu',
            '--num_samples=2',
        ],
    )
    script = runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
    asked = []
    functions = script['answers'].__globals__
    monkeypatch.setitem(
        functions,
        'generate',
        lambda model, rows, *_, **settings: (
            asked.append((script['tokenizer'].decode(rows[0]), settings['stop_tokens'])) or rows
        ),
    )
    script['answers']([('say 3', 'please', None)], 1)
    assert asked == [('Ask say 3\nOn please\nSay ', [script['tokenizer'].endoftext_id])]
    assert capsys.readouterr().out.count('-' * 80) == 2


def test_a_conversation_goes_on_until_an_empty_line(place, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        'argv',
        ['sample.py', f'--checkpoint={place}/run', '--chat', '--max_new_tokens=5', '--device=cpu'],
    )
    monkeypatch.setattr(sys, 'stdin', io.StringIO('say 1\n\nsay 2\nsay 3\n'))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
    assert not end.value.code and len(re.findall('^> ', capsys.readouterr().out, re.M)) == 3


def test_early_stopping_ends_the_run_and_best_is_kept(place, tmp_path, capsys):
    arguments = settings(
        place,
        'ar',
        f'--out_dir={tmp_path}/run',
        '--max_steps=40',
        '--eval_every=2',
        '--learning_rate=3',
        '--warmup_steps=0',
        '--schedule=constant',
        '--early_stopping=2',
    )
    variables = tune(*arguments)
    step, best = variables['step'], variables['best_step']
    assert step == best + 4 < 40 and load(tmp_path / 'run', 'best.pt')['global_step'] == best
    assert f'stopped early at step {step}' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        tune(*arguments, '--resume_from=auto')
    assert stop.value.code == 0 and '--early_stopping=0 more patient' in capsys.readouterr().out


def test_checkpoints_are_kept_up_to_their_limit(place, tmp_path):
    tune(*settings(place, 'ar', f'--out_dir={tmp_path}/run', '--save_every=1', '--save_total_limit=2'))
    kept = {path.name for path in (tmp_path / 'run/checkpoints').iterdir()}
    assert {'checkpoint-5', 'checkpoint-6'} <= kept and len(kept) <= 3


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_a_stopped_run_goes_on_bit_identical(place, tmp_path, monkeypatch, case):
    arguments = settings(place, case, '--max_steps=8', '--eval_every=4', *CASES[case])
    tune(*arguments, f'--out_dir={tmp_path}/reference')
    rate = optim.learning_rate_at
    for moment in (2, 5):
        with monkeypatch.context() as patch:
            patch.setattr(
                optim,
                'learning_rate_at',
                lambda step, *rest: (
                    step == moment and os.kill(os.getpid(), signal.SIGTERM),
                    rate(step, *rest),
                )[1],
            )
            tune(*arguments, f'--out_dir={tmp_path}/run', '--resume_from=auto')
        assert load(tmp_path / 'run')['global_step'] == moment + 1
    tune(f'--resume_from={tmp_path}/run', tiny=[])  # the checkpoint knows the settings
    one, other = load(tmp_path / 'run'), load(tmp_path / 'reference')
    for part in ('model_state_dict', 'optimizer_state_dict', 'best_val_loss', 'best_step'):
        assert same(one[part], other[part]), part
    steps = {row['step'] for row in metrics(tmp_path / 'reference')}
    assert [row for row in metrics(tmp_path / 'run') if row['step'] in steps] == metrics(
        tmp_path / 'reference'
    )


# ---------------------------------------------------------------------------- gradients


def first_gradients(*arguments):
    """The gradients of a run's first step, as its loop is about to clip them, and its loss."""
    gradients = []

    def record(parameters, limit):
        gradients.extend(p.grad.clone() for p in parameters)
        return torch.zeros(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, 'clip_grad_norm_', record)
        variables = tune('--max_steps=1', '--eval_batches=1', '--num_samples=0', '--overwrite', *arguments)
    return torch.cat([gradient.flatten() for gradient in gradients]), variables['loss']


def division_cases(place, out, ranks):
    """Eight rows a step, however they are divided."""
    for architecture, packing in (('ar', True), ('ar', False), ('diffusion', True), ('sdd', True)):
        for accumulation in (1, 4) if packing else (2,):
            yield settings(
                place,
                architecture,
                f'--packing={packing}',
                f'--out_dir={out}',
                f'--batch_size={8 // (accumulation * ranks)}',
                f'--gradient_accumulation_steps={accumulation}',
            )


def run_rank(rank, ports, place, path):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    results = []
    with several_scripts():
        for port, case in zip(ports, division_cases(place, path / 'ranks', 2)):
            os.environ['MASTER_PORT'] = str(port)
            results.append(first_gradients(*case))
        if rank == 0:
            torch.save(results, path / 'gradients.pt')


@pytest.mark.slow
def test_the_loss_is_exact_for_any_number_of_micro_steps_and_ranks(place, tmp_path):
    """Answers are of very different length, so that a mean of means would be something else."""
    one = [first_gradients(*case) for case in division_cases(place, tmp_path / 'run', 1)]
    torch.multiprocessing.spawn(run_rank, (free_ports(7), place, tmp_path), nprocs=2)
    two = torch.load(tmp_path / 'gradients.pt', weights_only=True)
    for reference, cases in (
        (one[0], [one[1], two[0], two[1]]),
        (one[2], [two[2]]),
        (one[3], [one[4], *two[3:5]]),
        (one[5], [one[6], *two[5:]]),
    ):
        assert reference[0].norm() > 0.1
        for gradients, loss in cases:
            assert (gradients - reference[0]).abs().max() < 1e-6
            assert math.isclose(loss, reference[1], rel_tol=1e-6)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_frozen_bottom_layers_let_the_gradient_through_to_those_above(place, architecture):
    folder = data.Folder(place / 'examples')
    model = random_model(
        architecture, 0.1, gradient_checkpointing=True, **SHAPE, **ids_of(folder.tokenizer)
    ).train()
    frozen = [model.embedding.weight, *model.blocks[0].parameters()]
    for weight in frozen:
        weight.requires_grad_(False)
    batch = data.Batches(folder, architecture, 64, 4, mode='packed examples').get(0)[0][0]
    model(*batch)[0].backward()
    assert all(weight.grad is None for weight in frozen)
    assert all(weight.grad.abs().max() > 0 for weight in model.blocks[1].parameters())


def test_checkpointing_changes_no_gradient(place, tmp_path):
    gradients = [
        first_gradients(
            *settings(
                place, 'ar', f'--gradient_checkpointing={flag}', '--dropout=0.1', f'--out_dir={tmp_path}/run'
            )
        )[0]
        for flag in (True, False)
    ]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_neftune_disturbs_training_only_and_by_its_size(place, tmp_path):
    variables = tune(
        *settings(place, 'ar', f'--out_dir={tmp_path}/run', '--neftune_alpha=5', '--max_steps=1')
    )
    embedding, tokens = variables['raw_model'].embedding, torch.arange(50)[None]
    plain = embedding.weight[:50][None]
    embedding.eval()
    assert torch.equal(embedding(tokens), plain)
    embedding.train()
    noise = embedding(tokens) - plain
    limit = 5 / math.sqrt(50 * SHAPE['n_embd'])
    assert (
        0.9 * limit < noise.abs().max() <= limit * 1.001
        and abs(noise.std() - limit / math.sqrt(3)) < 0.02 * limit
    )


def test_scratch_is_allowed_with_a_warning(place, tmp_path, capsys):
    tune(
        f'--dataset={place}/examples',
        '--init_from=scratch',
        '--architecture=diffusion',
        '--block_size=64',
        '--max_steps=1',
        '--num_samples=0',
        f'--out_dir={tmp_path}/run',
    )
    assert 'warning: init_from=scratch' in capsys.readouterr().out
    assert load(tmp_path / 'run')['architecture'] == 'diffusion'


# ---------------------------------------------------------------------------- adapters


@pytest.mark.parametrize('more', [[], ['--use_dora'], ['--load_in_4bit'], ['--load_in_8bit']], ids=str)
def test_adapters_are_trained_alone_and_the_checkpoint_has_them_merged(place, tmp_path, more):
    arguments = settings(place, 'ar', '--use_peft', '--peft_lora_r=4', *more)
    variables = tune(*arguments, f'--out_dir={tmp_path}/reference')
    base, tuned = load(place / 'ar')['model_state_dict'], load(tmp_path / 'reference')
    assert base.keys() == tuned['model_state_dict'].keys()
    assert not same(base, tuned['model_state_dict'])
    assert same(base['embedding.weight'], tuned['model_state_dict']['embedding.weight'])
    assert sum(p.numel() for p in variables['trainable'].values()) < sum(w.numel() for w in base.values()) / 2
    model = checkpoints.load_model(tuned, 'cpu')
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(
        model.logits(tokens), variables['raw_model'].eval().logits(tokens), atol=1e-4, rtol=1e-4
    )
    assert (tmp_path / 'reference/adapter').is_dir()


@pytest.mark.slow
@pytest.mark.parametrize('more', [[], ['--architecture=sdd', '--p_belief=((0,1),)']], ids=['ar', 'converted'])
def test_adapters_resume_bit_identical(place, tmp_path, monkeypatch, more):
    arguments = settings(place, 'ar', '--use_peft', '--peft_lora_r=4', *more)
    tune(*arguments, f'--out_dir={tmp_path}/reference')
    rate = optim.learning_rate_at
    with monkeypatch.context() as patch:
        patch.setattr(
            optim,
            'learning_rate_at',
            lambda step, *rest: (step == 2 and os.kill(os.getpid(), signal.SIGTERM), rate(step, *rest))[1],
        )
        tune(*arguments, f'--out_dir={tmp_path}/run')
    tune(f'--resume_from={tmp_path}/run', tiny=[])
    tuned = load(tmp_path / 'reference')['model_state_dict']
    assert same(load(tmp_path / 'run')['model_state_dict'], tuned)
    changed = (tuned['embedding.weight'] != load(place / 'ar')['model_state_dict']['embedding.weight']).any(1)
    ids = ids_of(letter_tokenizer(ASCII))
    assert (
        changed.nonzero().flatten().tolist() == [ids['mask_id'], ids['ignore_id']]
        if more
        else not changed.any()
    )
    assert not more or (tuned['believed.weight'] != torch.eye(SHAPE['n_embd'])).any()


@pytest.mark.parametrize('trained', [True, False])
def test_adapters_on_control_tokens_that_were_never_trained_come_with_a_warning(
    place, tmp_path, capsys, trained
):
    vocab_size = ids_of(letter_tokenizer(ASCII))['vocab_size']
    base = write_base(tmp_path / 'base', 'ar', pretrained_rows=vocab_size + 20)
    checkpoint, end = load(base), letter_tokenizer(ASCII).endoftext_id
    embedding = checkpoint['model_state_dict']['embedding.weight']
    embedding[vocab_size:] *= 0.05  # as they were when pretraining began, and never since
    embedding[end] *= 1 if trained else 0.05
    checkpoints.save(base / 'ckpt.pt', checkpoint)
    for more in (['--use_peft'], []):
        tune(
            f'--dataset={place}/examples',
            f'--init_from={base}',
            f'--out_dir={tmp_path}/run',
            '--overwrite',
            '--max_steps=1',
            '--num_samples=0',
            *more,
        )
        warned = 'never been trained on <|endoftext|>, which adapters' in capsys.readouterr().out
        assert warned == (bool(more) and not trained)


PEAK = """
import re, runpy, sys
sys.argv = ['finetune.py', *sys.argv[1:]]
runpy.run_path('finetune.py', run_name='__main__')
print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
"""


def estimate_and_peak(place, base, out, *more):
    """Megabytes that a run says it takes, and those that its process took at most."""
    arguments = [
        *TINY,
        f'--dataset={place}/examples',
        f'--init_from={base}',
        f'--out_dir={out}',
        '--max_steps=1',
        '--batch_size=4',
        '--packing=False',
        '--num_samples=0',
        '--eval_batches=1',
        *more,
    ]
    run = subprocess.run(
        [sys.executable, '-c', PEAK, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'},
    )  # nothing that is freed is kept
    assert run.returncode == 0, run.stderr
    estimate = float(re.search(r'memory, about: .*; (\S+) GB in all', run.stdout)[1]) * 1e3
    return estimate, int(re.search(r'peak (\d+)', run.stdout)[1]) * 1024 / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the peak is read from /proc')
def test_the_memory_estimate_is_near_the_peak(place, tmp_path):
    """Beside a run of next to nothing, so that what Python and torch themselves take is left out."""
    write_examples(tmp_path / 'examples', 8, 4, examples=lambda count: [('say', '', 'so ' * 160)] * count)
    write_base(tmp_path / 'base', 'ar', block_size=512, n_layer=4, n_head=4, n_embd=384)
    nothing, least = estimate_and_peak(place, place / 'ar', tmp_path / 'least')
    for name, more in (('full', []), ('lora', ['--use_peft']), ('nf4', ['--use_peft', '--load_in_4bit'])):
        estimate, peak = estimate_and_peak(tmp_path, tmp_path / 'base', tmp_path / name, *more)
        assert 2 / 3 < (estimate - nothing) / (peak - least) < 1.5, (name, estimate - nothing, peak - least)


# ---------------------------------------------------------------------------- bad input

BAD = {
    '--dataset=nowhere': "no prepared data at 'nowhere'",
    '--dataset=': 'nothing to learn from; give --dataset',
    '--dataset=PLACE/plain': 'PLACE/plain has no train_masks.bin.*prepare/instruct.py',
    '--dataset=PLACE/untrained': 'train split of PLACE/untrained has no answer of at most',
    '--dataset=PLACE/other': 'another vocabulary',
    '--init_from=': 'no model to start from; give --init_from',
    '--init_from=nowhere.pt': 'nowhere.pt',
    '--init_from=PLACE/examples/config.json': 'config.json',
    '--block_size=2000': 'block_size is 2000; choose at least 8 and at most the 64',
    '--learning_rate=0': 'learning_rate is 0, so nothing would be trained',
    '--max_steps=-1 --num_epochs=0': 'max_steps is -1 and num_epochs is 0.0, so nothing would be trained',
    '--trust_remote_code': 'trust_remote_code=True is refused',
    '--use_peft --load_in_8bit --load_in_4bit': 'both given; choose one',
    '--load_in_4bit': 'add --use_peft',
    '--optimizer=sgd': "optimizer is 'sgd'; choose adamw",
    '--dropout=1': 'dropout is 1.0; it must be at least 0 and below 1',
    '--gradient_checkpointing_kwargs={"use_reentrant":True}': 'reentrant',
}


@pytest.mark.parametrize('arguments', BAD)
def test_a_bad_setting_is_refused_before_anything_is_written(place, tmp_path, monkeypatch, arguments):
    monkeypatch.setattr('lm.checkpoints.ROOT', tmp_path)
    for name, change in (('plain', 'train_masks.bin'), ('untrained', 'train_masks.bin')):
        if not (place / name).exists():
            shutil.copytree(place / 'examples', place / name)
            size = (place / name / change).stat().st_size
            (place / name / change).unlink() if name == 'plain' else (place / name / change).write_bytes(
                bytes(size)
            )
    if not (place / 'other').exists():
        other = shutil.copytree(place / 'examples', place / 'other')
        tokenizer = letter_tokenizer([*reversed(ASCII)])
        (other / 'tokenizer.json').write_text(tokenizer.to_json())
    with pytest.raises(UserError, match=BAD[arguments].replace('PLACE', str(place))) as error:
        tune(*settings(place), *arguments.replace('PLACE', str(place)).split())
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


BAD_RESUMES = {
    '--block_size=32': 'has block_size=64, so it cannot go on with 32',
    '--packing=False': 'has packing=True, so it cannot go on with False',
    '--batch_size=8': '4 rows per step, not 8',
    '--init_from=other': "has init_from='.*/ar', so it cannot go on with 'other'",
}


@pytest.mark.parametrize('argument', BAD_RESUMES)
def test_a_bad_resume_is_refused_and_the_run_is_unchanged(place, argument):
    before = contents(place / 'run')
    with pytest.raises(UserError, match=BAD_RESUMES[argument]):
        tune(f'--resume_from={place}/run', '--max_steps=9', argument, tiny=[])
    assert contents(place / 'run') == before


def test_a_run_that_is_finished_or_in_the_way_is_left_alone(place, capsys):
    before = contents(place / 'run')
    with pytest.raises(SystemExit) as stop:
        tune(f'--resume_from={place}/run', tiny=[])
    assert stop.value.code == 0 and 'the run is finished' in capsys.readouterr().out
    with pytest.raises(UserError, match='already holds a run'):
        tune(*settings(place, 'ar', f'--out_dir={place}/run'))
    assert contents(place / 'run') == before


def test_a_run_killed_before_its_first_step_starts_again(place, tmp_path, monkeypatch):
    arguments = settings(place, 'ar', f'--out_dir={tmp_path}/run', '--resume_from=auto')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optim, 'learning_rate_at', interrupt)
        tune(*arguments)
    assert load(tmp_path / 'run')['global_step'] == 0
    tune(*arguments)
    assert [row['step'] for row in metrics(tmp_path / 'run')] == list('0123456')
