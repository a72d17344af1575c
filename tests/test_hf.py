"""hf.py: what it exports transformers reads, bit for bit, and what it sends to the hub is no secret."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
from conftest import (
    HF_MODELS,
    hf_model,
    hf_tokens,
    largest_file,
    letter_tokenizer,
    random_model,
    write_checkpoint,
    write_llama_tokenizer,
    write_small_checkpoint,
)

import hf
import model as models
from lm import checkpoints, configurator, lora, prompts
from lm.configurator import ROOT, UserError
from lm.prompts import FORMATS
from lm.tokenizer import CHARACTERS, ENDOFTEXT, IGNORE, Tokenizer, byte_level

transformers = pytest.importorskip('transformers', reason='transformers is not installed')

SHAPE = dict(block_size=16, n_layer=1, n_head=2, n_embd=16)
GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0.0)


def run(*words):
    hf.main([str(word) for word in words])


def load(path):
    return checkpoints.load_model(checkpoints.load(path), 'cpu')


def letter_model(architecture, **changes):
    """A model for the letter tokenizer, and the tokenizer."""
    tokenizer = letter_tokenizer()
    ids = dict(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)
    return random_model(architecture, 0.4, **ids, **{**SHAPE, **changes}), tokenizer


def assert_same_weights(theirs, folder):
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(weight, state[name]) for name, weight in theirs.state_dict().items())


# ---------------------------------------------------------------------------- import, export


@pytest.mark.parametrize('name', HF_MODELS)
def test_what_is_exported_has_the_same_bits(name, tmp_path, capsys):
    theirs = hf_model(name, tmp_path / 'in')
    run('import', tmp_path / 'in', '--out', tmp_path / 'ckpt.pt')
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    assert_same_weights(theirs, tmp_path / 'out')
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    assert torch.equal(theirs(hf_tokens()).logits, again(hf_tokens()).logits)
    assert type(again) is type(theirs) or name == 'mistral'  # without a window it is a llama
    assert 'for transformers' in capsys.readouterr().out


WATCHED = """
import re, sys, threading, time
sys.path[:0] = [{root!r}]
import hf

def memory():  # without files that are mapped, which give way to whatever needs the room
    return int(re.search(r'RssAnon:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) << 10

def watch():
    while True:
        peak[0] = max(peak[0], memory())
        time.sleep(0.001)

hf.torch.nn.Embedding(2, 2, device='meta')  # PyTorch then imports its compiler: 60 MB that are no weights
hf.SHARD_BYTES = 20 << 20
before, peak = memory(), [0]
threading.Thread(target=watch, daemon=True).start()
hf.main(['import', '{folder}/in', '--out={folder}/ckpt.pt'])
hf.main(['export', '{folder}/ckpt.pt', '--out={folder}/out'])
print('grew by', peak[0] - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='the size of a process is read as Linux tells it')
def test_a_sharded_model_passes_through_memory_one_shard_at_a_time(tmp_path):
    shape = dict(vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=12)
    theirs = hf_model('llama', tmp_path / 'in', **shape)
    (tmp_path / 'in' / 'model.safetensors').unlink()
    theirs.save_pretrained(tmp_path / 'in', max_shard_size='20MB')
    sizes = [path.stat().st_size for path in (tmp_path / 'in').glob('*.safetensors')]
    code = WATCHED.format(root=str(ROOT), folder=tmp_path)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 2 * max(sizes) < sum(sizes) / 2
    assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) == len(sizes)
    assert_same_weights(theirs, tmp_path / 'out')


@pytest.mark.parametrize('rows', [258, 300], ids=['no spare rows', 'spare rows'])
def test_a_tokenizer_comes_and_goes_with_its_model(rows, tmp_path, capsys):
    theirs = hf_model('llama', tmp_path / 'in', vocab_size=rows)
    before = write_llama_tokenizer(tmp_path / 'in')
    run('import', tmp_path / 'in', '--out', tmp_path / 'ckpt.pt')
    checkpoint = checkpoints.load(tmp_path / 'ckpt.pt')
    tokenizer = Tokenizer(checkpoint['tokenizer'])
    assert (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id) == (257, 258, 259)
    assert tokenizer.vocab_size == checkpoint['model_config']['vocab_size'] == 260
    letters = [before.token_to_id(letter) for letter in '</s>']
    assert tokenizer.encode('the</s>') == before.encode('the').ids[1:] + letters
    assert checkpoint['start_token'] == 256 and tokenizer.decode([257, 258, 256]) == ''

    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    assert ('2 that were added' in capsys.readouterr().out) == (rows == 258)
    assert json.loads((tmp_path / 'out' / 'tokenizer.json').read_text()) == json.loads(before.to_str())
    assert_same_weights(theirs, tmp_path / 'out')
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert reader('the cat').input_ids == before.encode('the cat').ids and reader.eos_token_id == 257
    config = transformers.AutoConfig.from_pretrained(tmp_path / 'out')
    assert (config.bos_token_id, config.eos_token_id) == (256, 257)
    assert checkpoints.load(tmp_path / 'out')['tokenizer'] == checkpoint['tokenizer']


CHATML = FORMATS['chatml']


def chat_tokenizer(folder, adds_start=True, **settings):
    """The bytes, <s>, </s> and ChatML's markers; of several post-processors one puts <s> before a text, if any."""
    tokenizer = byte_level({character: byte for byte, character in CHARACTERS.items()}, [])
    tokenizer.add_special_tokens(['<s>', '</s>', '<|im_start|>', '<|im_end|>', '<|mask|>', '<pad>'])
    template = tokenizers.processors.TemplateProcessing('<s> $A', '<s> $A $B', [('<s>', 256)])
    byte_level_last = tokenizers.processors.ByteLevel(trim_offsets=False)
    parts = [byte_level_last, template] if adds_start else [byte_level_last]
    tokenizer.post_processor = tokenizers.processors.Sequence(parts)
    tokenizer.save(str(folder / 'tokenizer.json'))
    settings = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>', **settings}
    settings['tokenizer_class'] = (
        'PreTrainedTokenizerFast'  # without it transformers 5.0 to 5.3 take CodeLlama's
    )
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return tokenizer


TEMPLATES = {
    'with a start token': '{{ bos_token }}'
    '{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}'
    '{% if add_generation_prompt %}[assistant] {% endif %}',
    'without': "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}


@pytest.mark.parametrize('adds_start', [True, False])  # in tokenizer.json, or as tokenizer_config.json says
@pytest.mark.parametrize('template', TEMPLATES.values(), ids=TEMPLATES)
def test_a_folder_is_asked_by_its_own_chat_template(template, adds_start, tmp_path, capsys, monkeypatch):
    theirs = hf_model('llama', tmp_path, vocab_size=300)
    chat_tokenizer(tmp_path, adds_start, add_bos_token=True)
    (tmp_path / 'chat_template.jinja').write_text(template)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [dict(role='system', content='Be brief.'), dict(role='user', content='the cat?')]
    ids = reader.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors='pt', return_dict=False
    )
    checkpoint = checkpoints.load(tmp_path)
    tokenizer = Tokenizer(checkpoint['tokenizer'], start=checkpoint['start_token'])
    form = checkpoint['prompt_format']
    start = prompts.start_of(form, tokenizer, checkpoint['start_token'])
    asked = [start] + prompts.encode(tokenizer, form, [('the cat?', '', None)], 'Be brief.')[0]
    assert asked == ids[0].tolist()
    never = [tokenizer.mask_id, *range(tokenizer.ignore_id, 300)]
    written = theirs.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=299, suppress_tokens=never)
    options = '--chat --prompt=the~cat? --system=Be~brief. --temperature=0 --num_samples=1 --max_new_tokens=9'
    options = [option.replace('~', ' ') for option in options.split()] + ['--stop_at_end=False']
    monkeypatch.setattr(sys, 'argv', ['sample.py', f'--checkpoint={tmp_path}', '--device=cpu', *options])
    runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
    printed = capsys.readouterr().out
    answer = tokenizer.decode(written[0, len(asked) :]).strip()
    assert printed.split(80 * '-')[1].strip('\n') == configurator.printable(answer)
    assert 'default format' not in printed


@pytest.mark.faults
def test_a_template_that_writes_the_start_token_writes_the_folders_own(tmp_path):
    hf_model('llama', tmp_path, vocab_size=300)
    write_llama_tokenizer(tmp_path, says='nothing')
    template = '{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}'
    settings = {'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': False, 'chat_template': template}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    state = checkpoints.load(tmp_path)
    assert Tokenizer.load(tmp_path).start_id == state['start_token'] == 256  # <s>
    tokenizer = Tokenizer(state['tokenizer'], start=state['start_token'])
    assert prompts.start_of(state['prompt_format'], tokenizer, tokenizer.endoftext_id) == 256


def test_what_a_folder_says_beside_its_model_goes_out_as_it_came(tmp_path):
    hf_model('llama', tmp_path / 'in', vocab_size=300)
    before = chat_tokenizer(tmp_path / 'in', chat_template='{{ messages[0].content }}')
    (tmp_path / 'in' / 'generation_config.json').write_text('{"eos_token_id": [257, 259]}')
    run('import', tmp_path / 'in', '--out', tmp_path / 'ckpt.pt')
    checkpoint = checkpoints.load(tmp_path / 'ckpt.pt')
    assert Tokenizer(checkpoint['tokenizer']).mask_id == 260  # the model's own

    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'tokenizer.json').read_text()) == json.loads(before.to_str())
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert reader('the cat').input_ids == before.encode('the cat').ids and reader.pad_token == '<pad>'
    assert reader.apply_chat_template([dict(role='user', content='hi')], tokenize=False) == 'hi'
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / 'out')
    assert (ends.eos_token_id, ends.pad_token_id, ends.bos_token_id) == ([257, 259], 261, 256)
    again = checkpoints.load(tmp_path / 'out')
    assert all(again[key] == checkpoint[key] for key in ('tokenizer', 'start_token', 'came_with'))
    (tmp_path / 'in' / 'generation_config.json').write_text('{"eos_token_id": 259}')
    assert checkpoints.load(tmp_path / 'in')['came_with']['end_tokens'] == [259]


@pytest.mark.parametrize(
    'form, expected', [(None, IGNORE), ('{{ messages }}', IGNORE), (prompts.DEFAULT, ENDOFTEXT)]
)
def test_a_text_of_an_export_begins_as_its_format_was_trained(tmp_path, form, expected):
    tokenizer = letter_tokenizer()
    came_with = {'bos_token': tokenizer.ignore_id, 'added_tokens': []}  # any special token but the start
    words = dict(prompt_format=form, came_with=came_with)
    write_small_checkpoint(tmp_path / 'ckpt.pt', 'ar', tokenizer, **words)
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'tokenizer_config.json').read_text())['bos_token'] == expected


@pytest.mark.faults
def test_a_start_token_that_only_the_settings_add_is_added_by_the_export_too(tmp_path):
    hf_model('llama', tmp_path / 'in', vocab_size=300)
    tokenizer = chat_tokenizer(tmp_path / 'in', add_bos_token=True)
    tokenizer.post_processor = tokenizers.processors.ByteLevel()
    tokenizer.save(str(tmp_path / 'in' / 'tokenizer.json'))
    run('export', tmp_path / 'in', '--out', tmp_path / 'out')
    for folder in ('in', 'out'):
        assert checkpoints.load(tmp_path / folder)['start_token'] == 256
    settings = json.loads((tmp_path / 'out' / 'tokenizer_config.json').read_text())
    assert settings['add_bos_token'] and settings['bos_token'] == '<s>'


@pytest.mark.faults
@pytest.mark.parametrize('form', FORMATS.values(), ids=FORMATS)
def test_a_tuned_model_goes_out_with_its_chat_template_and_stops_where_its_answers_end(form, tmp_path):
    hf_model('llama', tmp_path / 'in', vocab_size=300)
    chat_tokenizer(tmp_path / 'in')
    checkpoint = {**checkpoints.load(tmp_path / 'in'), 'prompt_format': form}
    checkpoints.save(tmp_path / 'ckpt.pt', checkpoint)
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    tokenizer, reader = (
        Tokenizer(checkpoint['tokenizer']),
        transformers.AutoTokenizer.from_pretrained(tmp_path / 'out'),
    )
    messages = [('system', 'Be "kind".'), ('user', 'Say\na.'), ('assistant', 'a'), ('user', 'b?')]
    messages = [dict(role=role, content=content) for role, content in messages]
    turns = [('Say\na.', '', 'a'), ('b?', '', None)]
    for system, theirs in (('Be "kind".', messages), ('', messages[1:])):
        ids = prompts.encode(tokenizer, form, turns, system)[0]
        assert reader.apply_chat_template(theirs, return_dict=False) == [256, *ids]
    end = prompts.end_of(form, tokenizer)[0]
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / 'out').eos_token_id
    assert end in (ends if isinstance(ends, list) else [ends]) and (end == 259) == (form == CHATML)
    assert checkpoints.load(tmp_path / 'out')['prompt_format'] == form


@pytest.fixture
def run_folder(tmp_path):
    """A finished run of an ar model that transformers can read: best.pt, and another ckpt.pt."""
    folder = tmp_path / 'run'
    folder.mkdir()
    settings = {
        'dataset': '/home/me/data/letters',
        'init_from': 'owner/base',
        'out_dir': '/home/me/out',
        'learning_rate': 2e-5,
        'wandb_project': 'mine',
        'block_size': None,
    }
    for file, layers in (('best.pt', 1), ('ckpt.pt', 2)):
        model, tokenizer = letter_model('ar', n_layer=layers, **GPT2)
        result = dict(best_step=3, best_val_loss=1.25, train_config=settings)
        write_checkpoint(folder / file, model, tokenizer, **result)
    return folder


@pytest.mark.faults
def test_the_best_weights_of_a_run_are_exported(run_folder, tmp_path, capsys):
    run('export', run_folder, '--out', tmp_path / 'out')
    assert transformers.AutoConfig.from_pretrained(tmp_path / 'out').n_layer == 1
    assert 'best.pt, of the family' in capsys.readouterr().out


def test_a_folder_that_is_exported_again_keeps_what_others_put_there(run_folder, tmp_path):
    for name in ('out.tmp', 'target'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'README.md').write_text('mine')
    (tmp_path / 'out').symlink_to(tmp_path / 'target')
    (tmp_path / 'target/config.json').write_text('{"model_type": "gpt2"}')
    for name in (
        'model-00001-of-00002.safetensors',
        'chat_template.jinja',
        'added_tokens.json',
        'merges.txt',
    ):
        (tmp_path / 'target' / name).write_text('of another model')
    run('export', run_folder, '--out', tmp_path / 'out', '--overwrite')
    names = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert (tmp_path / 'out').is_symlink() and 'README.md' in names and len(names) == 6
    assert (tmp_path / 'out.tmp/README.md').read_text() == 'mine'
    weights = tmp_path / 'out/model.safetensors'
    assert weights.stat().st_mode == (tmp_path / 'out/config.json').stat().st_mode


def test_sample_reads_a_folder(tmp_path, capsys, monkeypatch):
    hf_model('llama', tmp_path, vocab_size=300)
    write_llama_tokenizer(tmp_path)
    options = f'--checkpoint={tmp_path} --device=cpu --num_samples=1 --max_new_tokens=9'.split()
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--prompt=the cat', *options])
    runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
    assert '\nthe cat' in capsys.readouterr().out


def test_a_gpt2_of_our_own_training_is_one_for_transformers(tmp_path):
    model, tokenizer = letter_model('ar', **GPT2)
    write_checkpoint(tmp_path / 'ckpt.pt', model, tokenizer)
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    assert theirs.config.model_type == 'gpt2' and theirs.config.vocab_size == 28
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(theirs(tokens).logits, model.logits(tokens)[..., :28], atol=1e-4, rtol=0)


class Fourth(models.Diffusion):
    bound = 'none'


@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd', 'fourth'])
def test_every_architecture_exports_and_comes_back(architecture, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, 'fourth', Fourth)  # as a reader of model.py would add it
    model, tokenizer = letter_model(architecture, embedding_width=8)
    prompt_format = 'Q: {instruction}'
    settings = dict(start_token=5, prompt_format=prompt_format, best_val_loss=1.0, best_step=1)
    write_checkpoint(tmp_path / 'ckpt.pt', model, tokenizer, **settings)
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    assert "'diffusion-lm'" in (output := capsys.readouterr().out) and 'transformers cannot read' in output

    run('import', tmp_path / 'out', '--out', tmp_path / 'again.pt')
    again, tokens = checkpoints.load(tmp_path / 'again.pt'), torch.arange(16)[None]
    assert (again['start_token'], again['prompt_format']) == (5, prompt_format)
    assert (again['architecture'], again['tokenizer']) == (architecture, tokenizer.to_json())
    assert torch.equal(checkpoints.load_model(again, 'cpu').logits(tokens), model.logits(tokens))


def test_an_export_with_names_of_an_earlier_version_is_read(tmp_path):
    model, tokenizer = letter_model('sdd', embedding_width=8)
    write_checkpoint(tmp_path / 'ckpt.pt', model, tokenizer)
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    path, old = tmp_path / 'out' / 'model.safetensors', {}
    for name, tensor in safetensors.torch.load_file(path).items():
        for now, before in (('belief_proj', 'believed'), ('project_in', 'widen'), ('project_out', 'narrow')):
            name = name.replace(now, before)
        old[name] = tensor
    assert {'believed.weight', 'widen.weight', 'narrow.weight'} < old.keys()
    safetensors.torch.save_file(old, path)
    tokens = torch.arange(16)[None]
    assert torch.equal(load(tmp_path / 'out').logits(tokens), model.logits(tokens))


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    'words, said',
    [
        (['import', 'IN', '--out=OUT/there.pt'], 'already there; replace it with --overwrite'),
        (['import', 'IN', '--out=OUT', '--overwrite'], 'is there and no checkpoint; choose another'),
        (['import', 'IN', '--out=OUT/no/ckpt.pt'], 'a folder that does not exist'),
        (['import', '~/nothing', '--out=OUT/a.pt'], f'no checkpoint at {Path.home()}/nothing'),
        (['import', 'nobody/nothing', '--out=OUT/a.pt'], 'no checkpoint at nobody/nothing, and the hub'),
        (['import', 'OUT/there.pt', '--out=OUT/a.pt'], 'use it as it is, or export a checkpoint of ours'),
        (['import', 'RUN', '--out=OUT/a.pt'], 'run is no Hugging Face folder'),
        (['export', 'OUT/there.pt', '--out=IN', '--overwrite'], 'there.pt is damaged'),
        (['export', 'OUT/there.pt', '--out=OUT', '--overwrite'], 'no exported model; choose another'),
        (['export', 'OUT/there.pt', '--out=RUN', '--overwrite'], 'no exported model; choose another'),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(words, said, tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'config.json').write_text('{"model_type": "llama"}')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'there.pt').write_text('mine')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text('{"max_steps": 5}')
    for name in ('in', 'out', 'run'):
        words = [word.replace(name.upper(), f'{tmp_path}/{name}') for word in words]
    with pytest.raises(UserError, match=said):
        run(*words)
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['there.pt']
    assert all((tmp_path / name / 'config.json').is_file() for name in ('in', 'run'))


def test_a_checkpoint_with_its_adapter_beside_is_not_exported(tmp_path):
    model, tokenizer = letter_model('ar')
    lora.add_lora(model, 2, 2)
    write_checkpoint(tmp_path / 'ckpt.pt', model, tokenizer)
    with pytest.raises(
        UserError, match='ckpt.pt was edited, is damaged or of other code .*state_dict for Autoregressive'
    ):
        run('export', tmp_path / 'ckpt.pt', f'--out={tmp_path}/out')
    assert not list(tmp_path.glob('out*'))


@pytest.mark.faults
def test_an_export_that_a_full_disk_cuts_is_one_sentence_and_leaves_no_rest(tmp_path):
    model, tokenizer = letter_model('ar')
    write_checkpoint(tmp_path / 'ckpt.pt', model, tokenizer)
    with pytest.raises(UserError, match='exported could not be written .*; what was there before'):
        with largest_file(3000):
            run('export', tmp_path / 'ckpt.pt', f'--out={tmp_path}/exported')
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']


def test_code_of_a_model_is_refused_by_every_script(monkeypatch):
    for script in ('train.py', 'finetune.py', 'classify.py', 'sample.py', 'evaluate.py'):
        monkeypatch.setattr(sys, 'argv', [script, '--trust_remote_code=True'])
        with pytest.raises(UserError, match='trust_remote_code=True is refused'):
            runpy.run_path(str(ROOT / script), run_name='__main__')


def test_names_of_the_hub_and_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('out').mkdir()
    for name in ('gpt2', 'Qwen/Qwen2.5-0.5B', 'facebook/opt-350m'):
        assert checkpoints.is_pretrained(name), name
    for name in ('run.pt', 'out/run', 'out', '/abs/olute', 'a/b/c', Path('gpt2')):
        assert not checkpoints.is_pretrained(name), name
