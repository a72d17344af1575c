"""The folder of a run: numbered, refused where it holds another run, written by one process, with copies."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest

from lm import files, run_folder
from lm.configurator import UserError


def test_the_newest_copies_and_the_best_are_kept(tmp_path):
    (tmp_path / 'ckpt.pt').write_text('state')

    def copy(step, limit, best_step):
        options = {'save_every': 1, 'save_total_limit': limit}
        run_folder.copy_if_due(tmp_path, step, best_step, options, SimpleNamespace(is_main=True))

    def kept():
        return {
            int(path.parent.name.removeprefix('checkpoint-')): path.read_text()
            for path in (tmp_path / 'checkpoints').glob('*/ckpt.pt')
        }

    for step in (2, 4, 6, 8, 10):
        copy(step, 3, best_step=4)
    assert kept() == {4: 'state', 8: 'state', 10: 'state'}
    copy(12, 2, best_step=12)
    assert set(kept()) == {10, 12}
    (tmp_path / 'checkpoints/checkpoint-11').mkdir()  # a process was killed before it wrote it
    (tmp_path / 'checkpoints/checkpoint-mine').mkdir()
    copy(14, 3, best_step=0)
    assert set(kept()) == {10, 12, 14}
    copy(11, 3, best_step=0)  # of a run that went back
    assert set(kept()) == {10, 11}


@pytest.mark.faults
def test_overwrite_never_deletes_what_the_new_run_starts_from(tmp_path):
    (tmp_path / 'ckpt.pt').write_text('weights')
    for base in (tmp_path, tmp_path / 'ckpt.pt', tmp_path / 'checkpoints/checkpoint-1/ckpt.pt'):
        with pytest.raises(UserError, match='holds what the run starts from'):
            run_folder.open_run_folder(tmp_path, 'a', overwrite=True, init_from=str(base))
    assert (tmp_path / 'ckpt.pt').read_text() == 'weights'
    run_folder.open_run_folder(tmp_path, 'a', overwrite=True, init_from=f'{tmp_path}-other')
    assert not (tmp_path / 'ckpt.pt').exists()


def test_run_folders_are_numbered_and_the_suffix_comes_last(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, 'ROOT', tmp_path)
    for name, suffix, expected in (
        ('a', '', 'a-v1'),
        ('a', '', 'a-v2'),
        ('b', '', 'b-v1'),
        ('a', '', 'a-v3'),
        ('a', 'fixed-k8', 'a-v1-fixed-k8'),
        ('a', 'fixed-k8', 'a-v2-fixed-k8'),
    ):
        assert run_folder.open_run_folder('', name, suffix) == tmp_path / 'out' / expected
    (tmp_path / 'out/a-v2').rmdir()
    assert run_folder.open_run_folder('', 'a').name == 'a-v2'


@pytest.mark.faults
@pytest.mark.parametrize('where', ['file', 'file/run', '/proc/run'])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, where):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=f'{where} could not be written'):
        files.lock(tmp_path / where)
    monkeypatch.setattr(run_folder, 'ROOT', tmp_path / where)
    with pytest.raises(UserError, match=f'{where}/out/a-v1 could not be written'):
        run_folder.open_run_folder('', 'a')


@pytest.mark.faults
def test_a_run_folder_has_one_writer_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path):
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        held = files.lock(tmp_path)
        os.write(done, b'locked')
        signal.pause()
        held.close()
    assert os.read(ready, 6) == b'locked'
    (tmp_path / 'best.pt').write_text('precious')
    for call in (files.lock, lambda run: run_folder.open_run_folder(run, 'a', overwrite=True)):
        with pytest.raises(UserError, match=f'Another process writes {tmp_path}; let it end, or choose'):
            call(tmp_path)
    assert (tmp_path / 'best.pt').exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    files.lock(tmp_path).close()


def test_a_folder_that_holds_a_run_is_refused_unless_it_continues_or_is_overwritten(tmp_path):
    run = tmp_path / 'run'
    assert run_folder.open_run_folder(run, 'a') == run
    run.mkdir()
    assert run_folder.open_run_folder(run, 'a') == run  # an empty folder holds none
    for name in ('metrics.csv', 'notes.txt'):
        (run / name).write_text('precious')
    for run_dir in (None, tmp_path / 'another'):
        with pytest.raises(UserError, match=f'{run} already holds a run; .*--resume_from=auto.*--overwrite'):
            run_folder.open_run_folder(run, 'a', run_dir=run_dir)
    assert run_folder.open_run_folder(run, 'a', run_dir=run.resolve()) == run
    assert (run / 'metrics.csv').read_text() == 'precious'
    run_folder.open_run_folder(run, 'a', overwrite=True)
    assert {path.name for path in run.iterdir()} == {'notes.txt', 'logs.log'}  # what is not the run's stays


@pytest.mark.faults
def test_names_of_data_lead_to_no_other_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, 'ROOT', tmp_path)
    folder = run_folder.open_run_folder('', 'ar-../../evil-tiny', '/../b')
    assert folder.parent == tmp_path / 'out' and folder.name == 'ar-..-..-evil-tiny-v1--..-b'


@pytest.mark.faults
def test_a_copy_has_the_sharded_state_of_its_step(tmp_path):
    (tmp_path / 'ckpt.pt').write_bytes(b'x')
    for step in (50, 100):
        shutil.rmtree(tmp_path / 'sharded', ignore_errors=True)  # a run holds one state
        (tmp_path / f'sharded/step-{step}').mkdir(parents=True)
        (tmp_path / f'sharded/step-{step}/__0_0.distcp').write_text(str(step))
        options = {'save_every': 50, 'save_total_limit': None}
        run_folder.copy_if_due(tmp_path, step, 0, options, SimpleNamespace(is_main=True))
    states = sorted((tmp_path / 'checkpoints').glob('*/sharded/*/__0_0.distcp'))
    assert [path.read_text() for path in states] == ['100', '50']


def test_a_data_folder_is_no_place_for_a_run(make_folder):
    with pytest.raises(UserError, match='is a prepared data folder, no place for a run'):
        run_folder.open_run_folder(make_folder(), 'a', overwrite=True)
