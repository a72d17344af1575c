"""hf.py: what transformers writes is read exactly, and what is written transformers reads."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import letter_tokenizer, random_model

import hf
import sampling
from lm import checkpoints, data, pretrained
from lm.configurator import ROOT, UserError
from lm.tokenizer import byte_level, spell

transformers = pytest.importorskip(
    'transformers', reason='transformers is not installed: make test installs it'
)
os.environ['TRANSFORMERS_VERBOSITY'] = 'error'
transformers.logging.set_verbosity_error()

VOCAB, LENGTH = 260, 128
OPT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=64,
    max_position_embeddings=LENGTH,
    vocab_size=VOCAB,
)
LLAMA = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    vocab_size=VOCAB,
)
LLAMA3_ROPE = dict(
    rope_type='llama3',
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    'gpt2': ('GPT2', dict(n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, vocab_size=VOCAB)),
    'opt': ('OPT', dict(**OPT, word_embed_proj_dim=32)),
    'opt-350m': ('OPT', dict(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
    'llama': ('Llama', dict(LLAMA)),
    'llama-3.2': ('Llama', dict(**LLAMA, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, head_dim=12)),
    'deepseek-coder': (
        'Llama',
        dict(
            **{**LLAMA, 'num_key_value_heads': 4},
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type='linear', rope_theta=1e5, factor=4.0),
        ),
    ),
    'tinyllama': ('Llama', dict(**LLAMA, rms_norm_eps=1e-5)),
    'smollm': (
        'Llama',
        dict(
            **{**LLAMA, 'num_attention_heads': 2, 'num_key_value_heads': 1},
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type='default', rope_theta=1e5),
            tie_word_embeddings=True,
        ),
    ),
    'mistral': ('Mistral', dict(**LLAMA, sliding_window=None)),
    'qwen2': ('Qwen2', dict(**LLAMA, tie_word_embeddings=True)),
    'qwen2-untied': ('Qwen2', dict(**LLAMA)),
    'qwen3': ('Qwen3', dict(**LLAMA, head_dim=16, tie_word_embeddings=True)),
}


def make(name, folder, **changes):
    """A random transformers model of a family, saved in `folder`: every weight is random, norms and biases too."""
    kind, shape = FAMILIES[name]
    config = getattr(transformers, kind + 'Config')(**{**shape, **changes})
    class_name = {'GPT2': 'GPT2LMHeadModel'}.get(kind, kind + 'ForCausalLM')
    model = getattr(transformers, class_name)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + 0.6 * (weight.dim() == 1))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def edit_json(path, **changes):
    """Changes a JSON file; None removes a key."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: x for key, x in value.items() if x is not None}))


def some_tokens(rows=2, length=60):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def ours(path):
    return checkpoints.load_model(checkpoints.load(path), 'cpu')


def run(*words):
    hf.main([str(word) for word in words])


# ---------------------------------------------------------------------------- the same model


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A model of transformers' and the folder that it is in."""
    folder = tmp_path / request.param
    return make(request.param, folder), folder


@torch.no_grad()
def test_logits_are_those_of_transformers_with_any_padding(family):
    theirs, folder = family
    model, rows, lengths = ours(folder), some_tokens(3), (60, 41, 7)
    whole = model.logits(rows)[..., :VOCAB]
    torch.testing.assert_close(whole, theirs(rows).logits, atol=1e-4, rtol=0)
    for side in ('left', 'right'):
        padded, seen = torch.zeros_like(rows), torch.zeros_like(rows)
        for i, length in enumerate(lengths):
            place = slice(60 - length, 60) if side == 'left' else slice(0, length)
            padded[i, place], seen[i, place] = rows[i, :length], 1
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logits = theirs(padded, attention_mask=seen, position_ids=positions).logits
        for i, length in enumerate(lengths):
            torch.testing.assert_close(whole[i, :length], logits[i][seen[i].bool()], atol=1e-4, rtol=0)


def test_greedy_text_is_that_of_transformers(family):
    theirs, folder = family
    model, prompts = ours(folder), [row.tolist() for row in some_tokens(2, 9)]
    prompts[1] = prompts[1][:5]
    rows = sampling.generate(model, prompts, 64, temperature=0)
    assert rows == sampling.generate(model, prompts, 64, temperature=0, use_cache=False)
    for prompt, row in zip(prompts, rows):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0)
        assert row == expected[0].tolist() and len(row) == len(prompt) + 64


def test_what_is_exported_has_the_same_bits(family, tmp_path, capsys):
    theirs, folder = family
    run('import', folder, '--out', tmp_path / 'ckpt.pt')
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert torch.equal(theirs(some_tokens()).logits, again(some_tokens()).logits)
    assert type(again) is type(theirs) or 'mistral' in str(folder)  # without a window it is a llama
    assert 'for transformers' in capsys.readouterr().out


@pytest.mark.parametrize(
    'name, old',
    [
        ('llama-3.2', dict(rope_theta=500.0, rope_scaling={**LLAMA3_ROPE, 'rope_theta': None})),
        ('deepseek-coder', dict(rope_theta=1e5, rope_scaling=dict(type='linear', factor=4.0))),
        ('smollm', dict(rope_theta=1e5, rope_scaling=None)),
    ],
)
def test_old_and_new_keys_of_rotary_positions_say_the_same(name, old, tmp_path):
    make(name, tmp_path)
    new = ours(tmp_path)
    if old['rope_scaling']:
        old['rope_scaling'].pop('rope_theta', None)
    edit_json(tmp_path / 'config.json', rope_parameters=None, **old)
    assert 'rope_parameters' not in (tmp_path / 'config.json').read_text()
    assert torch.equal(ours(tmp_path).rope, new.rope)
    plain = checkpoints.make_model(
        'ar', vocab_size=9, n_head=1, n_embd=new.config.head_dim, block_size=LENGTH
    )
    assert not torch.equal(plain.rope, new.rope)


def test_rotary_positions_stay_exact_in_bfloat16(tmp_path):
    make('llama', tmp_path)
    model = ours(tmp_path)
    rope = model.rope.clone()
    assert torch.equal(model.bfloat16().rope, rope) and model.embedding.weight.dtype == torch.bfloat16


def test_a_window_limits_the_block(tmp_path, capsys):
    theirs = make('mistral', tmp_path, sliding_window=40)
    model = ours(tmp_path)
    assert model.config.block_size == 40 and 'sliding_window' in capsys.readouterr().err
    rows = some_tokens(2, 40)
    torch.testing.assert_close(model.logits(rows)[..., :VOCAB], theirs(rows).logits, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------- files


def to_bin(folder, zipped=True):
    """The folder's weights as a .bin file instead."""
    tensors = {}
    for path in folder.glob('*.safetensors'):
        tensors.update(hf.safetensors.torch.load_file(path))
        path.unlink()
    torch.save(tensors, folder / 'pytorch_model.bin', _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize('form', ['bin', 'old bin', 'sharded', 'without prefix', 'with buffers'])
def test_weights_come_in_any_form(form, tmp_path):
    theirs = make('gpt2', tmp_path)
    if 'bin' in form:
        to_bin(tmp_path, zipped=form == 'bin')
    elif form == 'sharded':
        (tmp_path / 'model.safetensors').unlink()
        theirs.save_pretrained(tmp_path, max_shard_size='20kB')
        assert len(list(tmp_path.glob('*.safetensors'))) > 3
    else:
        tensors = hf.safetensors.torch.load_file(tmp_path / 'model.safetensors')
        tensors = {name.removeprefix('transformer.'): tensor for name, tensor in tensors.items()}
        if form == 'with buffers':
            tensors.update({f'h.{i}.attn.bias': torch.ones(1, 1, 8, 8) for i in range(2)})
        hf.safetensors.torch.save_file(tensors, tmp_path / 'model.safetensors')
    rows = some_tokens()
    torch.testing.assert_close(
        ours(tmp_path).logits(rows)[..., :VOCAB], theirs(rows).logits, atol=1e-4, rtol=0
    )


def test_a_bin_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    make('gpt2', tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    torch.save({'transformer.wte.weight': Payload()}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='pytorch_model.bin is damaged or holds more than weights'):
        checkpoints.load(tmp_path)
    assert not (tmp_path / 'ran').exists()


def test_export_is_in_shards_with_an_index(tmp_path, monkeypatch):
    theirs = make('llama', tmp_path / 'in')
    monkeypatch.setattr(hf, 'SHARD_BYTES', 40_000)
    run('import', tmp_path / 'in', '--out', tmp_path / 'ckpt.pt')
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    files = sorted((tmp_path / 'out').glob('model-*.safetensors'))
    assert len(files) > 2 and all(file.stat().st_size < 44_000 for file in files)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in theirs.state_dict().items())
    assert torch.equal(
        ours(tmp_path / 'out').logits(some_tokens()), ours(tmp_path / 'in').logits(some_tokens())
    )


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
before, peak = memory(), [0]
threading.Thread(target=watch, daemon=True).start()
hf.SHARD_BYTES = 20 << 20
hf.main({words!r})
print('grew by', peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='the size of a process is read as Linux tells it')
def test_a_sharded_model_passes_through_memory_for_one_shard(tmp_path):
    make(
        'llama',
        tmp_path / 'in',
        vocab_size=64,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
    ).save_pretrained(tmp_path / 'in', max_shard_size='20MB')
    (tmp_path / 'in' / 'model.safetensors').unlink()
    sizes = [path.stat().st_size for path in (tmp_path / 'in').glob('*.safetensors')]
    assert len(sizes) > 5
    for words in (
        ['import', f'{tmp_path}/in', f'--out={tmp_path}/ckpt.pt'],
        ['export', f'{tmp_path}/ckpt.pt', f'--out={tmp_path}/out'],
    ):
        code = WATCHED.format(root=str(ROOT), words=words)
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1]) < 2 * max(sizes) < sum(sizes) / 3
    checkpoint, again = checkpoints.load(tmp_path / 'ckpt.pt'), checkpoints.load(tmp_path / 'out')
    original = checkpoints.load(tmp_path / 'in')['model_state_dict']
    for name, weight in original.items():
        assert torch.equal(weight, checkpoint['model_state_dict'][name]), name
        assert torch.equal(weight, again['model_state_dict'][name]), name


# ---------------------------------------------------------------------------- tokenizers


def write_tokenizer(folder, end='</s>', start='<s>', config=True):
    """A byte-level tokenizer of 256 bytes, <s> and </s>, which puts <s> before a text by itself."""
    tokenizer = byte_level({spell(bytes([byte])): byte for byte in range(256)}, [])
    tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f'{start} $A', pair=f'{start} $A $B', special_tokens=[(start, 256)]
    )
    tokenizer.save(str(folder / 'tokenizer.json'))
    if config:
        (folder / 'tokenizer_config.json').write_text(
            json.dumps(
                {
                    'tokenizer_class': 'PreTrainedTokenizerFast',
                    'bos_token': start,
                    'eos_token': {'content': end},
                }
            )
        )
    return tokenizer


@pytest.mark.parametrize('rows', [258, 300], ids=['no spare rows', 'spare rows'])
def test_a_tokenizer_comes_and_goes_with_its_model(rows, tmp_path, capsys):
    theirs = make('llama', tmp_path / 'in', vocab_size=rows)
    before = write_tokenizer(tmp_path / 'in')
    run('import', tmp_path / 'in', '--out', tmp_path / 'ckpt.pt')
    checkpoint = checkpoints.load(tmp_path / 'ckpt.pt')
    tokenizer = data.Tokenizer(checkpoint['tokenizer'])
    assert (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id) == (257, 258, 259)
    assert tokenizer.vocab_size == checkpoint['model_config']['vocab_size'] == 260
    assert checkpoint['start_token'] == 256 and tokenizer.encode('the</s>') == before.encode('the').ids[
        1:
    ] + [before.token_to_id(letter) for letter in '</s>']
    assert tokenizer.decode([257, 258, 256]) == ''
    assert data.Tokenizer(tokenizer.to_json()).to_json() == data.Tokenizer.load(tmp_path / 'in').to_json()

    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    said = capsys.readouterr().out
    assert ('2 that were added' in said) == (rows == 258)
    assert json.loads((tmp_path / 'out' / 'tokenizer.json').read_text()) == json.loads(before.to_str())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in theirs.state_dict().items())
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert reader('the cat').input_ids == before.encode('the cat').ids
    assert (reader.eos_token_id, again.generation_config.eos_token_id, again.config.bos_token_id) == (
        257,
        257,
        256,
    )
    assert checkpoints.load(tmp_path / 'out')['tokenizer'] == checkpoint['tokenizer']


@pytest.mark.parametrize(
    'settings, end',
    [
        ({'config.json': {'eos_token_id': [256, 257]}}, 256),
        ({'special_tokens_map.json': {'eos_token': '</s>'}, 'config.json': {'eos_token_id': 256}}, 257),
        (
            {'tokenizer_config.json': {'eos_token': '<s>'}, 'special_tokens_map.json': {'eos_token': '</s>'}},
            256,
        ),
        ({}, 258),
    ],
)
def test_the_end_of_a_text_is_what_the_folder_says(settings, end, tmp_path):
    write_tokenizer(tmp_path, config=False)
    for name, value in settings.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert data.Tokenizer.load(tmp_path).endoftext_id == end


def test_the_older_pair_of_files_is_read(tmp_path):
    merges = [('t', 'h'), ('th', 'e')]
    vocab = {token: i for i, token in enumerate(['<s>', '<pad>', '</s>', *'acehtĠ', 'th', 'the'])}
    (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(map(' '.join, merges)) + '\n')
    (tmp_path / 'tokenizer_config.json').write_text(
        json.dumps({'bos_token': '</s>', 'eos_token': '</s>', 'add_bos_token': True})
    )
    tokenizer = data.Tokenizer.load(tmp_path)
    assert tokenizer.encode('the cat') == [vocab[token] for token in ('the', 'Ġ', 'c', 'a', 't')]
    assert tokenizer.decode(tokenizer.encode('the cat') + [2]) == 'the cat'
    assert tokenizer.endoftext_id == pretrained.start_of(tmp_path, tokenizer) == 2


def test_a_folder_without_a_tokenizer_comes_with_a_warning(tmp_path, capsys, monkeypatch):
    make('qwen2', tmp_path / 'in')
    run('import', tmp_path / 'in', '--out', tmp_path / 'ckpt.pt')
    assert 'warning:' in (said := capsys.readouterr().err) and 'tokenizer.json' in said
    assert checkpoints.load(tmp_path / 'ckpt.pt')['tokenizer'] is None
    monkeypatch.setattr(sys, 'argv', ['sample.py', f'--checkpoint={tmp_path}/ckpt.pt'])
    with pytest.raises(UserError, match='came without a tokenizer.json.*import it again'):
        runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')


def test_sample_reads_a_folder(tmp_path, capsys, monkeypatch):
    make('llama', tmp_path, vocab_size=300)
    write_tokenizer(tmp_path)
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'sample.py',
            f'--checkpoint={tmp_path}',
            '--prompt=the cat',
            '--device=cpu',
            '--num_samples=1',
            '--max_new_tokens=9',
        ],
    )
    runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
    assert '\nthe cat' in capsys.readouterr().out


# ---------------------------------------------------------------------------- our own family


@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
def test_the_native_trunk_is_a_family_of_its_own(architecture, tmp_path, capsys):
    tokenizer = letter_tokenizer()
    model = random_model(
        architecture,
        0.4,
        vocab_size=tokenizer.vocab_size,
        block_size=16,
        n_layer=2,
        n_head=2,
        n_embd=16,
        mask_id=tokenizer.mask_id,
        ignore_id=tokenizer.ignore_id,
    )
    checkpoints.save(
        tmp_path / 'ckpt.pt',
        {
            'architecture': architecture,
            'model_state_dict': model.state_dict(),
            'model_config': vars(model.config),
            'tokenizer': tokenizer.to_json(),
            'start_token': 5,
            'prompt_format': 'Q: {instruction}',
        },
    )
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    assert "'diffusion-lm'" in (said := capsys.readouterr().out) and 'transformers cannot read' in said
    again = checkpoints.load(tmp_path / 'out')
    assert (again['start_token'], again['prompt_format'], again['architecture']) == (
        5,
        'Q: {instruction}',
        architecture,
    )
    assert again['tokenizer'] == tokenizer.to_json()
    tokens = torch.arange(16)[None]
    assert torch.equal(checkpoints.load_model(again, 'cpu').logits(tokens), model.logits(tokens))


def test_a_gpt2_of_our_own_training_is_one_for_transformers(tmp_path):
    tokenizer = letter_tokenizer()
    model = random_model(
        'ar',
        0.4,
        vocab_size=tokenizer.vocab_size,
        block_size=16,
        n_layer=2,
        n_head=2,
        n_embd=16,
        norm='layer',
        position='learned',
        mlp='gelu',
        bias=True,
        qk_norm=False,
        logit_softcap=0.0,
        mask_id=tokenizer.mask_id,
        ignore_id=tokenizer.ignore_id,
    )
    checkpoints.save(
        tmp_path / 'ckpt.pt',
        {
            'architecture': 'ar',
            'model_state_dict': model.state_dict(),
            'model_config': vars(model.config),
            'tokenizer': tokenizer.to_json(),
            'start_token': tokenizer.endoftext_id,
            'prompt_format': None,
        },
    )
    run('export', tmp_path / 'ckpt.pt', '--out', tmp_path / 'out')
    theirs, tokens = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out'),
        torch.arange(16)[None],
    )
    assert theirs.config.model_type == 'gpt2' and theirs.config.vocab_size == tokenizer.vocab_size - 2
    torch.testing.assert_close(
        theirs.eval()(tokens).logits, model.logits(tokens)[..., :28], atol=1e-4, rtol=0
    )


# ---------------------------------------------------------------------------- mistakes


def without(folder, *names, **extra):
    tensors = hf.safetensors.torch.load_file(folder / 'model.safetensors')
    tensors = {name: tensor for name, tensor in tensors.items() if name not in names}
    hf.safetensors.torch.save_file({**tensors, **extra}, folder / 'model.safetensors')


MISTAKES = {
    'a missing tensor': (
        lambda f: without(f, 'model.layers.1.mlp.up_proj.weight'),
        r'missing: model.layers.1.mlp.up_proj.weight\)',
    ),
    'a tensor left over': (
        lambda f: without(f, **{'model.layers.0.extra.weight': torch.ones(2)}),
        r'left over: layers.0.extra.weight\)',
    ),
    'a tied head that is not there': (lambda f: without(f, 'lm_head.weight'), 'missing: lm_head.weight'),
    'another shape': (
        lambda f: edit_json(f / 'config.json', intermediate_size=64),
        r'of another shape: .*gate_proj.weight \(48, 32\)',
    ),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), 'holds no weights'),
    'damaged weights': (
        lambda f: (f / 'model.safetensors').write_bytes(b'abc'),
        'model.safetensors is damaged',
    ),
    'another family': (
        lambda f: edit_json(f / 'config.json', model_type='bloom'),
        "of the family 'bloom'; choose",
    ),
    'an unknown rope': (
        lambda f: edit_json(
            f / 'config.json', rope_parameters=dict(rope_type='yarn', rope_theta=1e4, factor=2.0)
        ),
        'cannot be taken over exactly.*yarn',
    ),
    'biases': (lambda f: edit_json(f / 'config.json', attention_bias=True), 'attention_bias=True'),
    'a config cut short': (lambda f: (f / 'config.json').write_text('{"model_type": '), 'cannot be read'),
    'a shard that is missing': (
        lambda f: (f / 'model.safetensors.index.json').write_text(
            json.dumps({'weight_map': {'a': 'model-00001-of-00002.safetensors'}})
        ),
        'lacks model-00001-of-00002.safetensors',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_folder_that_does_not_fit_is_refused_in_a_sentence(mistake, tmp_path):
    make('llama', tmp_path / 'in')
    spoil, said = MISTAKES[mistake]
    spoil(tmp_path / 'in')
    with pytest.raises(UserError, match='(?s)' + said):
        run('import', tmp_path / 'in', '--out', tmp_path / 'ckpt.pt')
    assert not (tmp_path / 'ckpt.pt').exists() and not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize(
    'words, said',
    [
        (['import', 'IN', '--out=OUT/there.pt'], 'already there; replace it with --overwrite'),
        (['import', 'IN', '--out=OUT'], 'is a folder; give the path of the ckpt.pt'),
        (['import', 'IN', '--out=OUT/no/ckpt.pt'], 'a folder that does not exist'),
        (['import', 'IN', '--out=OUT/a.pt', '--trust_remote_code'], 'trust_remote_code=True is refused'),
        (
            ['import', 'nobody/nothing', '--out=OUT/a.pt'],
            'no checkpoint at nobody/nothing, and the Hugging Face hub',
        ),
        (['export', 'OUT/there.pt', '--out=IN', '--overwrite'], 'there.pt is damaged'),
        (['export', 'OUT/there.pt', '--out=OUT', '--overwrite'], 'no exported model; choose another'),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(words, said, tmp_path):
    make('gpt2', tmp_path / 'in')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'there.pt').write_text('mine')
    words = [word.replace('IN', f'{tmp_path}/in').replace('OUT', f'{tmp_path}/out') for word in words]
    with pytest.raises(UserError, match=said):
        run(*words)
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['there.pt']
    assert (tmp_path / 'in' / 'model.safetensors').is_file()


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


def test_the_hub_is_asked_with_token_and_revision(tmp_path, monkeypatch):
    import huggingface_hub

    make('qwen2', tmp_path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        'snapshot_download',
        lambda name, **how: asked.append((name, how['token'], how['revision'])) or str(tmp_path),
    )
    checkpoints.load('owner/name', token='secret', revision='v2')
    assert asked == [('owner/name', 'secret', 'v2')]


@pytest.mark.parametrize('failed_at', [0, 1])
def test_a_hub_that_fails_in_the_middle_is_one_sentence(tmp_path, monkeypatch, failed_at):
    import httpx
    import huggingface_hub

    make('qwen2', tmp_path)
    (tmp_path / 'model.safetensors').unlink()  # so that .bin files are asked for as well
    calls = []

    def broken(*_, **how):
        calls.append(how)
        if len(calls) > failed_at:
            raise httpx.RemoteProtocolError('peer closed connection without sending complete message body')
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', broken)
    with pytest.raises(UserError, match=r'no model by that name \(peer closed connection.*\)'):
        hf.main(['import', 'owner/name', f'--out={tmp_path / "model.pt"}'])
    assert not (tmp_path / 'model.pt').exists()
