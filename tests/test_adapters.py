"""finetune.py --use_peft: adapters are trained alone, merged as they were trained, and go on with their own base."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import load, same, tune, tuning, write_base, write_tuning

import hf
from lm import checkpoints
from lm.configurator import ROOT, UserError
from lm.folder import prepared


def test_blocks_that_are_none_are_those_of_the_base(place, tmp_path):
    words = ['--architecture=diffusion', '--block_length=None', '--ar_weight=None', '--max_steps=1']
    variables = tune(*tuning(place, 'ar', *words, f'--out_dir={tmp_path}/run'))
    assert variables['raw_model'].config.block_length == (0,)


def test_a_base_of_another_shape_is_a_sentence_where_its_adapter_goes_on(place, tmp_path):
    shutil.copytree(place / 'ar', tmp_path / 'base')
    words = [
        f'--dataset={place}/examples',
        f'--init_from={tmp_path}/base',
        '--use_peft',
        f'--out_dir={tmp_path}/run',
    ]
    tune(*words, '--max_steps=1')
    shutil.rmtree(tmp_path / 'base')
    write_base(tmp_path / 'base', 'ar', n_embd=32)
    with pytest.raises(UserError, match='base has another shape than in the run of .*; put its weights back'):
        tune(*words, '--max_steps=2', '--resume_from=auto')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return write_tuning(tmp_path_factory.mktemp('adapters'))


@pytest.mark.parametrize('more', [[], ['--load_in_4bit'], ['--load_in_8bit']], ids=str)
def test_adapters_are_trained_alone_and_the_checkpoint_has_them_merged(place, tmp_path, more):
    arguments = tuning(place, 'ar', '--use_peft', '--peft_lora_r=2', *more)
    variables = tune(*arguments, f'--out_dir={tmp_path}/run')
    base, tuned = load(place / 'ar')['model_state_dict'], load(tmp_path / 'run')
    assert base.keys() == tuned['model_state_dict'].keys()
    assert not same(base, tuned['model_state_dict'])
    assert same(base['embedding.weight'], tuned['model_state_dict']['embedding.weight'])
    assert sum(p.numel() for p in variables['trainable'].values()) < sum(w.numel() for w in base.values()) / 2
    logits = [
        model.eval().logits(torch.arange(20)[None])
        for model in (checkpoints.load_model(tuned, 'cpu'), variables['raw_model'])
    ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert (tmp_path / 'run/adapter').is_dir()


@pytest.mark.faults
def test_an_adapter_is_merged_into_the_blocks_that_it_was_trained_with(place, tmp_path):
    words = tuning(
        place, 'ar', '--use_peft', '--architecture=diffusion', '--block_length=(4,)', '--ar_weight=1'
    )
    with pytest.raises(UserError, match='Blocks of 7 do not fill rows of block_size='):
        tune(*words[:-2], '--block_length=(7,)', f'--out_dir={tmp_path}/no')
    tune(*words, f'--out_dir={tmp_path}/run')
    hf.main(['merge', f'{tmp_path}/run/adapter', f'--base={place}/ar', f'--out={tmp_path}/merged.pt'])
    merged, tuned = (
        checkpoints.load_model(checkpoints.load(tmp_path / x), 'cpu') for x in ('merged.pt', 'run')
    )
    for key in ('block_length', 'ar_weight', 'shift'):
        assert getattr(merged.config, key) == getattr(tuned.config, key)
    assert same(merged.state_dict(), tuned.state_dict())
    for base in ('run', 'run/best.pt'):  # which have it
        with pytest.raises(UserError, match=r'merged in already; export it, or give the base \S+/ar\.$'):
            hf.main(
                ['merge', f'{tmp_path}/run/adapter', f'--base={tmp_path}/{base}', f'--out={tmp_path}/b.pt']
            )
    with pytest.raises(UserError, match=r'on other weights than these; give its base as it was then, \S+/ar'):
        hf.main(['merge', f'{tmp_path}/run/adapter', f'--base={place}/run', f'--out={tmp_path}/b.pt'])


@pytest.mark.faults
def test_a_file_that_was_prepared_goes_on_by_its_own_name_and_one_that_changed_is_another(
    place, tmp_path, monkeypatch
):
    monkeypatch.setattr('lm.folder.ROOT', tmp_path)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'prepare').symlink_to(ROOT / 'prepare')
    records, out = tmp_path / 'my.json', tmp_path / 'run'
    records.write_text(json.dumps([{'instruction': f'Say {i}.', 'output': f'{i}'} for i in range(40)]))
    words = [f'--dataset={records}', f'--init_from={place}/ar', f'--out_dir={out}', '--resume_from=auto']
    tune(*words, '--max_steps=2')
    first = load(out)['train_config']['dataset']
    tune(*words, '--max_steps=4')
    assert load(out)['global_step'] == 4 and load(out)['train_config']['dataset'] == first
    records.write_text(records.read_text().replace('Say', 'Tell'))
    tune(f'--dataset={records}', f'--init_from={place}/ar', f'--out_dir={tmp_path}/other', '--max_steps=1')
    second = load(tmp_path / 'other')['train_config']['dataset']
    base = shutil.copytree(place / 'ar', tmp_path / 'base')
    words = ['', None, lambda: base]
    third, again = prepared(str(records), *words), prepared(str(records), *words)
    os.utime(base / 'ckpt.pt', (1, 1))  # trained again
    assert third == again and len({first, second, third, prepared(str(records), *words)}) == 4

    def let_the_first_rank_prepare(seconds):
        with monkeypatch.context() as first_rank:
            first_rank.setenv('LOCAL_RANK', '0')
            waited.append(prepared(str(records), *words))

    waited = []
    monkeypatch.setattr('lm.folder.time', SimpleNamespace(sleep=let_the_first_rank_prepare))
    monkeypatch.setenv('LOCAL_RANK', '1')
    records.write_text(records.read_text().replace('Tell', 'Ask'))
    assert prepared(str(records), *words) == waited[0]  # however long that takes


@pytest.mark.faults
def test_adapters_go_on_with_another_base_only_on_purpose(place, tmp_path):
    base, out = shutil.copytree(place / 'ar', tmp_path / 'base'), tmp_path / 'run'
    words = ['--use_peft', f'--init_from={base}', f'--dataset={place}/examples', f'--out_dir={out}']
    tune(*words)
    state = load(base)
    state['model_state_dict']['blocks.0.mlp.up.weight'][0, 0] += 1e-3
    torch.save(state, base / 'ckpt.pt')
    others = shutil.copytree(place / 'examples', tmp_path / 'others')
    for more in ([], [f'--dataset={others}']):
        with pytest.raises(
            UserError, match=f'the weights of {base} changed since the run of .*--changed_data'
        ):
            tune(*words, '--max_steps=8', '--resume_from=auto', *more)
    tune(*words, '--max_steps=8', '--resume_from=auto', '--changed_data')
    assert f'resumed with the weights of {base}=' in (out / 'logs.log').read_text()
