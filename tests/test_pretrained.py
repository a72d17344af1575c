"""lm/pretrained.py: what transformers and nanoGPT write is read exactly, or refused in a sentence."""

import json
import os

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import (
    HF_MODELS,
    HF_VOCAB,
    LETTERS,
    LLAMA3_ROPE,
    hf_model,
    hf_tokens,
    letter_tokenizer,
    random_model,
)

import sampling
from lm import checkpoints, families, pretrained, prompts
from lm.configurator import ROOT, UserError
from lm.tokenizer import Tokenizer

GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0.0)


def load(path):
    return checkpoints.load_model(checkpoints.load(path), 'cpu')


def edit_json(path, **changes):
    """Changes a JSON file; None removes a key."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: x for key, x in value.items() if x is not None}))


def assert_same_logits(folder, theirs, rows):
    torch.testing.assert_close(
        load(folder).logits(rows)[..., :HF_VOCAB], theirs(rows).logits, atol=1e-4, rtol=0
    )


# ---------------------------------------------------------------------------- the same model


@pytest.mark.parametrize('name', HF_MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, tmp_path):
    assert_same_logits(tmp_path, hf_model(name, tmp_path), hf_tokens())


@pytest.mark.parametrize('name', ['gpt2', 'opt-350m', 'llama-3.2', 'qwen3'])
def test_greedy_text_is_that_of_transformers(name, tmp_path):
    theirs = hf_model(name, tmp_path)
    prompts = [hf_tokens(1, length)[0].tolist() for length in (9, 5)]
    rows = sampling.generate(load(tmp_path), prompts, 20, temperature=0)
    for prompt, row in zip(prompts, rows, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert row == expected[0].tolist()


@pytest.mark.parametrize(
    'name, old',
    [
        ('llama-3.2', dict(rope_theta=500.0, rope_scaling={**LLAMA3_ROPE, 'rope_theta': 1.0})),
        ('deepseek-coder', dict(rope_theta=1e5, rope_scaling=dict(type='linear', factor=4.0))),
        ('smollm', dict(rope_theta=1e5, rope_scaling=None)),
    ],
)
def test_old_and_new_keys_of_rotary_positions_say_the_same(name, old, tmp_path):
    hf_model(name, tmp_path)
    new = load(tmp_path)
    if old['rope_scaling']:
        old['rope_scaling'].pop('rope_theta', None)
    edit_json(tmp_path / 'config.json', rope_parameters=None, **old)
    assert torch.equal(load(tmp_path).rope, new.rope)
    shape = dict(vocab_size=9, n_head=1, n_embd=new.config.head_dim, block_size=128)
    assert not torch.equal(checkpoints.make_model('ar', **shape).rope, new.rope)


@pytest.mark.faults
def test_what_transformers_takes_for_granted_is_taken_or_refused(tmp_path):
    hf_model('llama-3.2', tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['rope_parameters']['original_max_position_embeddings']
    fields = families.config_from_hf(config, 'here')
    assert fields['rope_scaling']['original_max_position_embeddings'] == config['max_position_embeddings']
    (tmp_path / 'model.safetensors.index.json').write_text(
        '{"weight_map": {"a": "b"}}'
    )  # of an earlier model
    load(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / 'model.safetensors')
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'] + 1
    safetensors.torch.save_file(tensors, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(UserError, match='has a head of its own; set tie_word_embeddings to false'):
        load(tmp_path)


def test_rotary_positions_stay_exact_in_bfloat16(tmp_path):
    hf_model('llama', tmp_path)
    model = load(tmp_path)
    rope = model.rope.clone()
    assert torch.equal(model.bfloat16().rope, rope) and model.embedding.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_a_sliding_window_limits_the_block(tmp_path):
    theirs = hf_model('mistral', tmp_path, sliding_window=40)
    assert load(tmp_path).config.block_size == 40
    assert_same_logits(tmp_path, theirs, hf_tokens(2, 40))
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['sliding_window']  # for transformers then 4096
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'max_position_embeddings': 5000}))
    assert load(tmp_path).config.block_size == 4096


@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_a_checkpoint_of_nanogpt_is_the_same_model(bias, tmp_path):
    tokenizer = letter_tokenizer()
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, bias=bias)
    model = random_model('ar', 0.4, vocab_size=tokenizer.vocab_size - 2, **{**GPT2, **shape})
    state = {}
    for name, weight in model.state_dict().items():
        their_name, qkv_index, transposed = families.hf_name(name, 'gpt2')
        state.setdefault(f'_orig_mod.{their_name}', []).append(weight)
    state = {name: torch.cat(weights) for name, weights in state.items()}
    state['_orig_mod.lm_head.weight'] = state['_orig_mod.transformer.wte.weight']
    args = dict(shape, dropout=0.0, vocab_size=len(state['_orig_mod.lm_head.weight']))
    torch.save({'model': state, 'model_args': args, 'iter_num': 5}, tmp_path / 'ckpt.pt')

    loaded = checkpoints.load_model(checkpoints.load(tmp_path / 'ckpt.pt', tokenizer=tokenizer), 'cpu')
    tokens = torch.randint(0, 27, (2, 9))
    torch.testing.assert_close(loaded.hidden(tokens), model.hidden(tokens))
    with pytest.raises(UserError, match='has 64 tokens, the tokenizer 303; give its own'):
        checkpoints.load(tmp_path / 'ckpt.pt', tokenizer=letter_tokenizer([chr(i) for i in range(32, 332)]))
    torch.save({'model': state, 'model_args': {}}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match="is no whole ckpt.pt of nanoGPT's"):
        checkpoints.load(tmp_path / 'ckpt.pt', tokenizer=tokenizer)


@pytest.mark.parametrize(
    'model, billions', [('llama3', 0.97), ('deepseek', 1.21), ('qwen0.6B', 0.44), ('qwen1.7B', 1.41)]
)
def test_the_published_shapes_have_their_number_of_parameters(model, billions):
    ids = dict(vocab_size=3, mask_id=1, ignore_id=2)
    with torch.device('meta'):
        trunk = checkpoints.make_model('ar', **ids, **families.published_config(model, 51))
    assert round(trunk.num_parameters() / 1e9, 2) == billions


# ---------------------------------------------------------------------------- files


def rewrite(folder, change):
    tensors = safetensors.torch.load_file(folder / 'model.safetensors')
    safetensors.torch.save_file(change(tensors), folder / 'model.safetensors')


@pytest.mark.parametrize('form', ['bin', 'sharded', 'without prefix'])
@torch.no_grad()
def test_weights_are_read_in_any_form(form, tmp_path):
    theirs, path = hf_model('gpt2', tmp_path), tmp_path / 'model.safetensors'
    if form == 'bin':
        torch.save(safetensors.torch.load_file(path), tmp_path / 'pytorch_model.bin')
        path.unlink()
    elif form == 'sharded':
        path.unlink()
        theirs.save_pretrained(tmp_path, max_shard_size='20kB')
        assert len(list(tmp_path.glob('*.safetensors'))) > 3
    else:  # as in the published gpt2, with its buffers
        mask = {f'h.{i}.attn.bias': torch.ones(1, 1, 8, 8) for i in range(2)}
        rewrite(tmp_path, lambda x: {**{n.removeprefix('transformer.'): t for n, t in x.items()}, **mask})
    assert_same_logits(tmp_path, theirs, hf_tokens())


def test_a_bin_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    hf_model('gpt2', tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    torch.save({'transformer.wte.weight': Payload()}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='pytorch_model.bin cannot be read as weights'):
        checkpoints.load(tmp_path)
    assert not (tmp_path / 'ran').exists()


def without(folder, *names, **extra):
    rewrite(folder, lambda x: {**{n: t for n, t in x.items() if n not in names}, **extra})


def edit_config(folder, **changes):
    edit_json(folder / 'config.json', **changes)


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
        lambda f: edit_config(f, intermediate_size=64),
        r'of another shape: .*gate_proj.weight \(48, 32\)',
    ),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), 'holds no weights'),
    'damaged weights': (
        lambda f: (f / 'model.safetensors').write_bytes(b'abc'),
        'model.safetensors cannot be read as weights',
    ),
    'another family': (lambda f: edit_config(f, model_type='bloom'), "of the family 'bloom'; choose"),
    'an unknown rope': (
        lambda f: edit_config(f, rope_parameters=dict(rope_type='yarn', rope_theta=1e4, factor=2.0)),
        'rope_type=.yarn.; only default or linear or llama3 can be taken over exactly',
    ),
    'biases': (lambda f: edit_config(f, attention_bias=True), 'attention_bias=True; only False can'),
    'a key that is missing': (lambda f: edit_config(f, hidden_size=None), "config.json lacks 'hidden_size'"),
    'a config cut short': (lambda f: (f / 'config.json').write_text('{"model_type": '), 'cannot be read'),
    'a config in another encoding': (
        lambda f: (f / 'config.json').write_bytes(b'{"model_type": "\xe9"}'),
        'cannot be read',
    ),
    'a shard that is missing': (
        lambda f: (
            (f / 'model.safetensors').rename(f / 'other')
            and (f / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "part-1.safetensors"}}')
        ),
        'part-1.safetensors cannot be read as weights',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_folder_that_does_not_fit_is_refused_in_a_sentence(mistake, tmp_path):
    hf_model('llama', tmp_path)
    spoil, message = MISTAKES[mistake]
    spoil(tmp_path)
    with pytest.raises(UserError, match='(?s)' + message):
        checkpoints.load(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(
    'changes, said',
    [
        ({'logit_scale': 2.0}, 'logit_scale=2.0; only None can be taken over exactly'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config=.*only None'),
        ({'pretraining_tp': 2}, 'pretraining_tp=2; only 1'),
        (
            {'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4, 'mrope_section': [2]}},
            'mrope_section',
        ),
        ({'rope_parameters': {'rope_type': 'linear', 'factor': 0.0}}, 'factor=0.0; it has to be above 0'),
        ({'rope_theta': -1, 'rope_parameters': None}, 'rope_theta=-1.0; it has to be'),
        ({'num_hidden_layers': '2'}, "num_hidden_layers='2'; it has to be"),
        ({'rms_norm_eps': 'small'}, "rms_norm_eps='small'; it has to be"),
        ({'max_position_embeddings': 10**9}, 'max_position_embeddings=1000000000; it has to be'),
    ],
)
def test_what_a_config_says_that_is_not_known_at_its_default_is_refused(changes, said, tmp_path):
    hf_model('llama', tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        checkpoints.load(tmp_path)


BEFORE_5 = dict(
    do_sample=False, min_length=0, max_length=20, num_beams=1, num_beam_groups=1, num_return_sequences=1
)
BEFORE_5 |= dict(
    temperature=1.0, top_k=50, top_p=1.0, typical_p=1.0, repetition_penalty=1.0, length_penalty=1.0
)


@pytest.mark.faults
@pytest.mark.parametrize('name', HF_MODELS)
def test_every_default_of_transformers_is_known(name, tmp_path):
    theirs = hf_model(name, tmp_path)
    (tmp_path / 'config.json').write_text(theirs.config.to_json_string(use_diff=False))
    edit_config(tmp_path, **BEFORE_5)
    checkpoints.load(tmp_path)


@pytest.mark.faults
def test_a_window_of_some_layers_limits_the_block(tmp_path):
    hf_model('qwen2', tmp_path)
    edit_config(tmp_path, layer_types=['full_attention', 'sliding_attention'], sliding_window=40)
    assert load(tmp_path).config.block_size == 40


# ---------------------------------------------------------------------------- tokenizers


@pytest.mark.faults
def test_a_tied_embedding_may_stand_in_the_file_as_the_head(tmp_path):
    theirs = hf_model('llama', tmp_path, tie_word_embeddings=True)
    path = tmp_path / 'model.safetensors'
    tensors = safetensors.torch.load_file(path)
    tensors['lm_head.weight'] = tensors.pop('model.embed_tokens.weight')
    safetensors.torch.save_file(tensors, path)
    held = checkpoints.load(tmp_path)['model_state_dict']['embedding.weight']
    assert torch.equal(held[: len(tensors['lm_head.weight'])], theirs.lm_head.weight)


@pytest.mark.parametrize(
    'settings, end',
    [
        ({'config.json': {'eos_token_id': [5, 6]}}, 5),
        ({'special_tokens_map.json': {'eos_token': 'z'}, 'config.json': {'eos_token_id': 5}}, 25),
        ({'tokenizer_config.json': {'eos_token': {'content': 'y'}}, 'config.json': {'eos_token_id': 5}}, 24),
        ({}, 27),
    ],
)
def test_the_end_of_a_text_is_what_the_folder_says(settings, end, tmp_path):
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary)).save(str(tmp_path / 'tokenizer.json'))
    for name, value in settings.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert Tokenizer.load(tmp_path).endoftext_id == end


def test_the_older_pair_of_tokenizer_files_is_read(tmp_path):
    merges = [('t', 'h'), ('th', 'e')]
    vocab = {token: i for i, token in enumerate(['<s>', '<pad>', '</s>', *'acehtĠ', 'th', 'the'])}
    (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(map(' '.join, merges)) + '\n')
    settings = {'bos_token': '</s>', 'eos_token': '</s>', 'add_bos_token': True}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode('the cat') == [vocab[token] for token in ('the', 'Ġ', 'c', 'a', 't')]
    assert tokenizer.decode(tokenizer.encode('the cat') + [2]) == 'the cat'
    assert tokenizer.endoftext_id == tokenizer.start_id == 2
    (tmp_path / 'added_tokens.json').write_text('{"<|im_end|>": 12, "<|im_start|>": 11}')
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "<|im_end|>"}')
    assert Tokenizer.load(tmp_path).endoftext_id == 12 and Tokenizer.load(tmp_path).mask_id == 13


def test_a_model_without_a_tokenizer_says_so_when_it_needs_one(tmp_path):
    hf_model('qwen2', tmp_path)
    checkpoint = checkpoints.load(tmp_path)
    with pytest.raises(UserError, match='came without a tokenizer.json.*import it again'):
        Tokenizer(checkpoint['tokenizer'])


# ---------------------------------------------------------------------------- the hub


def test_the_hub_is_asked_with_token_and_revision(tmp_path, monkeypatch):
    import huggingface_hub

    hf_model('qwen2', tmp_path)
    asked = []

    def download(name, token, revision, allow_patterns):
        asked.append((name, token, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    checkpoints.load('owner/name', token='secret', revision='v2')
    assert asked == [('owner/name', 'secret', 'v2')]


@pytest.mark.parametrize('failed_at', [0, 1])
def test_a_hub_that_fails_in_the_middle_is_one_sentence(tmp_path, monkeypatch, failed_at):
    import httpx
    import huggingface_hub

    (tmp_path / 'config.json').write_text('{}')  # no safetensors, so that .bin files are asked for as well
    calls = []

    def broken(*_, **how):
        calls.append(how)
        if len(calls) > failed_at:
            raise httpx.RemoteProtocolError('peer closed connection without sending complete message body')
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', broken)
    with pytest.raises(UserError, match=r'no model by that name \(peer closed connection.*\)'):
        checkpoints.load('owner/name')


@pytest.mark.faults
def test_an_index_leads_to_no_other_folder(tmp_path):
    index = {'weight_map': {'model.embed_tokens.weight': '../secret.safetensors'}}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match=r'leads out of its folder, to .*\.\./secret'):
        pretrained.open_tensors(tmp_path)


# ---------------------------------------------------------------------------- a real model

REAL = ROOT / 'data' / 'smollm2'


@pytest.mark.skipif(not REAL.is_dir(), reason=f'there is no {REAL}, a folder of SmolLM2-135M-Instruct')
def test_a_real_model_is_transformers_own_and_chats_the_same():
    checkpoint = checkpoints.load(REAL)
    tokenizer, model = Tokenizer(checkpoint['tokenizer']), checkpoints.load_model(checkpoint, 'cpu')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    ids = tokenizer.encode((ROOT / 'docs' / 'guide.md').read_text(encoding='utf-8'))[:1024]
    with torch.inference_mode():
        logits, expected = model.logits(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
    torch.testing.assert_close(logits[..., : expected.size(-1)], expected, atol=1e-4, rtol=0)

    form, question = checkpoint['prompt_format'], 'Explain in one sentence why the sky is blue.'
    chat = transformers.AutoTokenizer.from_pretrained(REAL).apply_chat_template(
        [{'role': 'user', 'content': question}],
        add_generation_prompt=True,
        return_tensors='pt',
        return_dict=True,
    )
    prompt = [prompts.start_of(form, tokenizer, checkpoint['start_token'])]
    prompt += prompts.encode(tokenizer, form, [(question, '', None)])[0]
    assert prompt == chat['input_ids'][0].tolist()
    (row,) = sampling.generate(
        model, [prompt], 48, temperature=0, stop_tokens=prompts.stop_tokens(checkpoint, tokenizer)
    )
    assert row == theirs.generate(**chat, max_new_tokens=48, do_sample=False)[0].tolist()
