"""Checkpoints: written whole or not at all, read in their old form too, and the runs that go on from them."""

import os
import shutil
import signal

import pytest
import torch
from conftest import largest_file, letter_tokenizer, random_model
from helpers import same

from lm import checkpoints, files, run_folder
from lm.configurator import Config, Key, UserError

SHAPE = dict(vocab_size=30, block_size=16, n_layer=2, n_head=2, n_embd=16, mask_id=28, ignore_id=29)


def make_checkpoint(architecture='ar', **changes):
    """A model of random weights and its checkpoint."""
    model = random_model(architecture, 0.4, **{**SHAPE, **changes})
    return model, {
        'architecture': architecture,
        'model_config': vars(model.config),
        'model_state_dict': model.state_dict(),
        'tokenizer': letter_tokenizer().to_json(),
        'start_token': 27,
        'global_step': 7,
    }


def some_tokens(length=16):
    return torch.randint(0, 28, (3, length), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------- files


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / 'ckpt.pt').write_text('old')

    def write(file):
        file.write(b'half of the ne')
        raise OSError('No space left on device')

    with pytest.raises(UserError, match='ckpt.pt could not be written .*No space left.*still is'):
        files.save_atomically(tmp_path / 'ckpt.pt', write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {'ckpt.pt': 'old'}


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    checkpoints.save(tmp_path / 'ckpt.pt', {'weights': torch.ones(3)})

    def write(file):
        file.write(b'half')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        files.save_atomically(tmp_path / 'ckpt.pt', write)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['weights'].tolist() == [1, 1, 1]
    checkpoints.save(tmp_path / 'ckpt.pt', {'weights': torch.zeros(3)})
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['weights'].tolist() == [0, 0, 0]


@pytest.mark.faults
@pytest.mark.parametrize('size', [0, 2000, 9000])
def test_a_checkpoint_that_a_full_disk_cuts_is_one_sentence_and_leaves_no_rest(tmp_path, size):
    checkpoints.save(tmp_path / 'ckpt.pt', {'weights': torch.ones(3)})
    with pytest.raises(
        UserError, match='ckpt.pt could not be written .*too large.*; what was there'
    ) as error:
        with largest_file(size):
            checkpoints.save(tmp_path / 'ckpt.pt', {'weights': torch.ones(5000)})
    assert '\n' not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['weights'].tolist() == [1, 1, 1]


@pytest.mark.faults
@pytest.mark.parametrize('place', range(6))
def test_a_bit_that_flips_in_a_weight_is_found(tmp_path, place):
    path, (model, checkpoint) = tmp_path / 'ckpt.pt', make_checkpoint()
    checkpoints.save(path, checkpoint)
    content, weights = bytearray(path.read_bytes()), model.embedding.weight.detach().numpy().tobytes()
    content[content.index(weights) + 700 * place] ^= 1 << place
    path.write_bytes(content)
    with pytest.raises(UserError, match='ckpt.pt is damaged .*checksum.*take another one of the run'):
        checkpoints.load(path)


EDITS = {  # what an entry becomes
    'global_step': 'seven',
    'train_config': None,
    'tokenizer': 5,
    'architecture': 'rnn',
    'start_token': -1,
    'model_config': {**SHAPE, 'n_layer': 10**9},
    'model_state_dict': {'embedding.weight': torch.ones(2, 3)},
    'ema_state_dict': {'embedding.weight': 'none'},
}


@pytest.mark.faults
@pytest.mark.parametrize('key', EDITS)
def test_an_edited_checkpoint_is_refused_in_one_sentence(tmp_path, key):
    checkpoints.save(tmp_path / 'ckpt.pt', {**make_checkpoint()[1], key: EDITS[key]})
    with pytest.raises(
        UserError, match='ckpt.pt was edited, is damaged or of other code .*; take another'
    ) as error:
        checkpoints.load(tmp_path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.faults
def test_a_checkpoint_is_known_by_its_run():
    names = ['out/a/ckpt.pt', 'out/a/best.pt', 'out/a', 'b.pt']
    assert [run_folder.name_of(name) for name in names] == ['a', 'a-best', 'a', 'b']


def test_a_name_of_a_run_under_out_is_suggested_and_the_hub_not_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        'huggingface_hub.snapshot_download', lambda *_, **__: pytest.fail('the hub was asked')
    )
    checkpoints.save(tmp_path / 'out/demo/ckpt.pt', make_checkpoint()[1])
    with pytest.raises(UserError, match='no checkpoint at demo; did you mean out/demo?'):
        checkpoints.load('demo')


def test_a_new_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    happened = []
    monkeypatch.setattr(os, 'fsync', lambda file: happened.append('fsync'))
    monkeypatch.setattr(os, 'replace', lambda source, target: happened.append('replace'))
    files.save_atomically(tmp_path / 'file', lambda file: happened.append('write'))
    assert happened == ['write', 'fsync', 'replace']


def test_a_checkpoint_cut_anywhere_or_of_another_kind_is_refused(tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoints.save(path, make_checkpoint()[1])
    whole = path.read_bytes()
    cut = (whole[:n] for n in range(1, len(whole), 4999))
    for content in [b'', b'{"a": 1}', b'.', b'not a checkpoint', *cut]:
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=f'{path} is damaged or no checkpoint of ours .*; take another'
        ) as error:
            checkpoints.load(path)
        assert 'weights_only' not in str(error.value)  # PyTorch's advice, which is unsafe
    for value in (5, [1], {'model': {}}):
        torch.save(value, path)
        with pytest.raises(UserError, match=f'{path} lacks .*tokenizer.*; give the ckpt.pt'):
            checkpoints.load(path)
    for edited in ({'came_with': 3}, {'later': 'seven'}):
        checkpoints.save(path, make_checkpoint()[1] | edited)
        with pytest.raises(UserError, match='was edited, is damaged or of other code'):
            checkpoints.load(path)
    with pytest.raises(UserError, match='no checkpoint at nowhere.pt; correct'):
        checkpoints.load('nowhere.pt')


@pytest.mark.parametrize('mmap', [False, True])
def test_a_run_folder_stands_for_its_checkpoint(tmp_path, mmap):
    model, checkpoint = make_checkpoint()
    checkpoints.save(tmp_path / 'ckpt.pt', checkpoint)
    loaded = checkpoints.load(tmp_path, mmap=mmap)
    assert loaded['format'] == checkpoints.CHECKPOINT_FORMAT
    assert same(loaded['model_state_dict'], dict(model.state_dict()))
    assert run_folder.run_of(tmp_path / 'ckpt.pt') == tmp_path
    assert run_folder.run_of(tmp_path / 'checkpoints/checkpoint-5/ckpt.pt') == tmp_path


def test_old_names_of_parameters_are_renamed_when_a_checkpoint_is_loaded(tmp_path):
    model, checkpoint = make_checkpoint('sdd', embedding_width=8)
    old_names = {
        'belief_proj.weight': 'believed.weight',
        'project_in.weight': 'widen.weight',
        'project_out.weight': 'narrow.weight',
    }
    old = {old_names.get(name, name): weight for name, weight in model.state_dict().items()}
    assert len(set(old) - set(model.state_dict())) == 3
    average = {name: weight + 1 for name, weight in old.items()}
    checkpoint.update(model_state_dict=old, ema_state_dict=average)
    checkpoints.save(tmp_path / 'ckpt.pt', checkpoint)
    loaded = checkpoints.load(tmp_path)
    assert same(loaded['model_state_dict'], dict(model.state_dict()))
    assert loaded['ema_state_dict'].keys() == model.state_dict().keys()


# ---------------------------------------------------------------------------- models


def test_a_model_to_use_has_the_average_where_there_is_one():
    _, checkpoint = make_checkpoint()
    weights = checkpoint['model_state_dict']
    average = {name: weight + 1 for name, weight in weights.items()}
    for state, expected in ((checkpoint, weights), ({**checkpoint, 'ema_state_dict': average}, average)):
        model = checkpoints.load_model(state, 'cpu')
        assert not model.training
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    'call, expected',
    [
        (lambda: checkpoints.size_of('huge'), "model_size is 'huge'; choose tiny, small"),
        (lambda: checkpoints.make_model('rnn', **SHAPE), "architecture is 'rnn'; choose ar or diffusion"),
        (
            lambda: checkpoints.make_model('ar', **{**SHAPE, 'n_head': 5}),
            'n_embd=16 is no even multiple of n_head=5; choose',
        ),
        (lambda: checkpoints.make_model('ar', **SHAPE, dropout=1.5), 'dropout is 1.5; it must be'),
    ],
)
def test_a_model_that_cannot_be_is_refused(call, expected):
    with pytest.raises(UserError, match=expected):
        call()


def test_a_checkpoint_of_another_architecture_or_vocabulary_is_refused():
    _, checkpoint = make_checkpoint()
    checkpoints.check_fits(checkpoint, 'ckpt.pt', 'ar', letter_tokenizer(), 'data/letters')
    with pytest.raises(UserError, match="architecture='ar', not 'diffusion'; use --architecture=ar"):
        checkpoints.check_fits(checkpoint, 'ckpt.pt', 'diffusion', letter_tokenizer(), 'data/letters')
    with pytest.raises(UserError, match=r'ckpt.pt .*vocabulary \(30 tokens\) than data/x \(6\)'):
        checkpoints.check_fits(checkpoint, 'ckpt.pt', 'ar', letter_tokenizer('abc'), 'data/x')


# ---------------------------------------------------------------------------- continuing a run


def settings(**given):
    """The variables and the Config of a script with some settings given."""
    defaults = dict(resume_from='', out_dir='', overwrite=False, batch_size=8, n_layer=4, init_from='')
    config = Config({name: Key(value, type(value)) for name, value in defaults.items()})
    config.update(given)
    config.given = set(given)
    return dict(config), config


@pytest.fixture
def saved(tmp_path):
    """A run folder whose checkpoint can be continued."""
    held = {'batch_size': 4, 'n_layer': 2, 'out_dir': 'elsewhere'}
    checkpoint = {**make_checkpoint()[1], 'optimizer_state_dict': {}, 'train_config': held}
    checkpoints.save(tmp_path / 'ckpt.pt', checkpoint)
    return tmp_path


def test_what_is_not_given_is_the_runs_own_and_what_differs_is_listed(saved):
    namespace, config = settings(resume_from=str(saved), batch_size=16)
    resumed = checkpoints.resume(namespace, config, fixed=['n_layer'])
    assert (namespace['n_layer'], namespace['batch_size'], namespace['out_dir']) == (2, 16, '')
    assert list(resumed.overrides) == [('batch_size', 4, 16)]
    assert resumed.path == saved / 'ckpt.pt' and resumed.run_dir == saved
    expected = 'has n_layer=2, not 4; leave --n_layer out'
    with pytest.raises(UserError, match=expected):
        checkpoints.resume(*settings(resume_from=str(saved), n_layer=4), ['n_layer'])


def test_auto_needs_an_out_dir_and_starts_afresh_without_a_checkpoint(saved, tmp_path):
    assert checkpoints.resume(*settings(), []) == checkpoints.Resumed()
    new = tmp_path / 'new'
    resumed = checkpoints.resume(*settings(resume_from='auto', out_dir=str(new)), [])
    assert resumed.checkpoint is None and resumed.run_dir == new
    resumed = checkpoints.resume(*settings(resume_from='auto', out_dir=str(saved)), [])
    assert resumed.checkpoint['architecture'] == 'ar'
    with pytest.raises(UserError, match='--resume_from=auto needs .*--out_dir=PATH'):
        checkpoints.resume(*settings(resume_from='auto'), [])


@pytest.mark.faults
def test_auto_without_a_checkpoint_goes_on_with_the_newest_copy_or_leaves_the_run_alone(saved, tmp_path):
    run = tmp_path / 'lost'
    words = dict(resume_from='auto', out_dir=str(run))
    for step in (2, 10):
        checkpoints.save(run / f'checkpoints/checkpoint-{step}/ckpt.pt', checkpoints.load(saved))
    (run / 'best.pt').write_text('precious')
    resumed = checkpoints.resume(*settings(**words), [])
    assert resumed.path == run / 'checkpoints/checkpoint-10/ckpt.pt' and resumed.run_dir == run
    shutil.rmtree(run / 'checkpoints')
    with pytest.raises(
        UserError, match='ckpt.pt of a run that left best.pt is not there; put it back.*--over'
    ):
        checkpoints.resume(*settings(**words), [])
    resumed = checkpoints.resume(*settings(**words, overwrite=True), [])
    assert run_folder.open_run_folder(run, 'a', run_dir=resumed.run_dir, overwrite=True) == run
    assert not (run / 'best.pt').exists()


def test_weights_alone_cannot_be_continued(tmp_path):
    checkpoints.save(tmp_path / 'best.pt', {**make_checkpoint()[1], 'train_config': {}})
    with pytest.raises(UserError, match='best.pt holds weights without.*--init_from=.*best.pt'):
        checkpoints.resume(*settings(resume_from=str(tmp_path / 'best.pt')), [])


@pytest.mark.parametrize('form, expected', [(None, '{{ messages }}'), ('{output}', '{output}')])
def test_a_run_keeps_how_the_model_that_it_started_from_is_asked(form, expected):
    """Pretraining goes on with plain text, and the export still writes the chat template that came in."""
    model = random_model('ar', 0.1, vocab_size=32, block_size=8, n_layer=1, n_head=1, n_embd=8)
    started = {'prompt_format': '{{ messages }}', 'came_with': {'pad_token': 3}}
    settings = {'seed': 0, 'learning_rate': 1.0}
    run = checkpoints.contents(model, 1, checkpoints.Best(), settings, started, letter_tokenizer(), 0, form)
    assert run['prompt_format'] == expected and run['came_with'] == {'pad_token': 3}
