"""Released diffusion models, llada, Dream and a2d: in and out as they are, sampled and tuned without their own code.

LOGITS was computed once by the public code of dllm (github.com/ZHZisZZ/dllm, commit ca176752; LLaDA's and Dream's are
copies of their authors') with the weights that `write_released` draws.
"""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import hf_model, write_llama_tokenizer
from helpers import run, tune

import hf
from lm import checkpoints, families, lora, prompts, quantize, runtime
from lm.configurator import UserError
from lm.tokenizer import CHARACTERS, DIFFUSION_FAMILIES, Tokenizer, byte_level
from model import Diffusion, ModelConfig

ROWS = 270
HF = dict(vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
HF.update(
    num_key_value_heads=2, max_position_embeddings=64, hidden_act='silu', rope_theta=1e6, rms_norm_eps=1e-6
)
LLADA = dict(  # with all keys of the released config.json
    **dict(
        vocab_size=ROWS, embedding_size=ROWS, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, mlp_ratio=4
    ),
    **dict(mlp_hidden_size=48, max_sequence_length=64, activation_type='silu', block_type='llama', rope=True),
    **dict(
        alibi=False, alibi_bias_max=8.0, attention_layer_norm=False, block_group_size=1, include_bias=False
    ),
    **dict(attention_layer_norm_with_affine=True, bias_for_layer_norm=False, attention_dropout=0.0),
    **dict(embedding_dropout=0.0, residual_dropout=0.0, flash_attention=False, include_qkv_bias=False),
    **dict(
        init_cutoff_factor=None, init_device='meta', init_fn='mitchell', init_std=0.02, input_emb_norm=False
    ),
    **dict(
        layer_norm_type='rms', layer_norm_with_affine=True, multi_query_attention=None, precision='amp_bf16'
    ),
    **dict(
        rms_norm_eps=1e-5, rope_full_precision=True, rope_theta=5e5, scale_logits=False, weight_tying=False
    ),
)
LLADA.update(
    auto_map={'AutoModel': 'modeling_llada.LLaDAModelLM'},
    mask_token_id=258,
    eos_token_id=257,
    pad_token_id=257,
)
DREAM = dict(HF, auto_map={'AutoModel': 'modeling_dream.DreamModel'}, mask_token_id=260, pad_token_id=256)
CONFIGS = {  # model_type: config.json
    'llada': LLADA,
    'Dream': dict(DREAM, eos_token_id=256, tie_word_embeddings=False, use_sliding_window=False),
    'a2d-qwen2': dict(HF, eos_token_id=258, tie_word_embeddings=False),
    'a2d-qwen3': dict(HF, eos_token_id=258, tie_word_embeddings=True, head_dim=16),
}
QWEN_TOKENS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|beginoftext|>', '<|mask|>']
LLADA_TOKENS = [
    '<|startoftext|>',
    '<|endoftext|>',
    '<|mdm_mask|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
]
LLADA_TOKENS += ['<|eot_id|>']
LLADA_CHAT = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    '{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}'
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MASKS = {'llada': 258, 'Dream': 260, 'a2d-qwen2': 260, 'a2d-qwen3': 260}
TOKENS = [[257, 84, 104, 101, 32, 'mask', 'mask', 'mask', 32, 115, 97, 116]]
LOGITS = {  # of the tokens 97 to 100 at position 6, which is masked; Dream's own are those at position 5
    'llada': [1.039118, -3.368629, 1.262498, -1.466453],
    'Dream': [3.78097, 3.170508, 0.855991, 0.711019],
    'a2d-qwen2': [3.06845, 3.177284, -0.007217, 0.625456],
    'a2d-qwen3': [3.124781, 0.053974, 1.398393, 2.947431],
}


def shapes(name):
    """{tensor: shape} as the released file has it."""
    if name == 'llada':
        trunk, head = 'model.transformer', {'model.transformer.ff_out.weight': (ROWS, 32)}
        outer, blocks = {'wte': (ROWS, 32), 'ln_f': (32,)}, 'blocks'
        block = dict.fromkeys(['q_proj', 'k_proj', 'v_proj', 'attn_out'], (32, 32)) | {'ff_out': (32, 48)}
        block |= dict.fromkeys(['ff_proj', 'up_proj'], (48, 32)) | dict.fromkeys(
            ['attn_norm', 'ff_norm'], (32,)
        )
    else:
        q, kv = (64, 32) if name == 'a2d-qwen3' else (32, 16)
        trunk, head = 'model', {} if name == 'a2d-qwen3' else {'lm_head.weight': (ROWS, 32)}
        outer, blocks = {'embed_tokens': (ROWS, 32), 'norm': (32,)}, 'layers'
        block = {'self_attn.q_proj': (q, 32), 'self_attn.k_proj': (kv, 32), 'self_attn.v_proj': (kv, 32)}
        block |= {'self_attn.o_proj': (32, q), 'mlp.gate_proj': (48, 32), 'mlp.up_proj': (48, 32)}
        block |= {'mlp.down_proj': (32, 48), 'input_layernorm': (32,), 'post_attention_layernorm': (32,)}
        if name == 'a2d-qwen3':
            block |= {'self_attn.q_norm': (16,), 'self_attn.k_norm': (16,)}
    found = head | {f'{trunk}.{part}.weight': shape for part, shape in outer.items()}
    for layer in range(2):
        found |= {f'{trunk}.{blocks}.{layer}.{part}.weight': shape for part, shape in block.items()}
        if name in ('Dream', 'a2d-qwen2'):
            found |= {
                f'model.layers.{layer}.self_attn.{x}_proj.bias': (32 if x == 'q' else 16,) for x in 'qkv'
            }
    return found


def write_released(name, folder, **changes):
    """Write a tiny model as it would be released: normal weights of seed 0 and deviation 0.3, drawn in the order of
    their names, gains around 1, and a tokenizer of bytes in the files that the real one has."""
    folder.mkdir(exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for tensor, shape in sorted(shapes(name).items()):
        is_gain = len(shape) == 1 and tensor.endswith('weight')
        tensors[tensor] = torch.randn(shape, generator=generator) * 0.3 + is_gain
    safetensors.torch.save_file(tensors, folder / 'model.safetensors')
    write_json(folder / 'config.json', {'model_type': name, **CONFIGS[name], **changes})
    vocab, special = {text: byte for byte, text in CHARACTERS.items()}, QWEN_TOKENS
    says = {'eos_token': '<|endoftext|>', 'bos_token': '<|beginoftext|>', 'mask_token': '<|mask|>'}
    says |= {'pad_token': '<|endoftext|>', 'chat_template': QWEN_CHAT}
    if name == 'llada':
        special, says['bos_token'], says['chat_template'] = LLADA_TOKENS, '<|startoftext|>', LLADA_CHAT
        del says['mask_token']
    if name == 'Dream':  # no tokenizer.json
        added = {256 + i: {'content': token, 'special': True} for i, token in enumerate(special)}
        says |= {'tokenizer_class': 'DreamTokenizer', 'added_tokens_decoder': added}
        write_json(folder / 'vocab.json', vocab)
        (folder / 'merges.txt').write_text('#version: 0.2\n')
    else:
        inner = byte_level(vocab, [])
        inner.add_special_tokens(special)
        inner.save(str(folder / 'tokenizer.json'))
    write_json(folder / 'tokenizer_config.json', says)
    return tensors


def write_json(path, value):
    path.write_text(json.dumps(value))


@pytest.mark.parametrize('name', CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_the_reference(name, tmp_path):
    write_released(name, tmp_path)
    model = checkpoints.load_model(checkpoints.load(tmp_path), 'cpu')
    tokens = torch.tensor([[MASKS[name] if token == 'mask' else token for token in row] for row in TOKENS])
    torch.testing.assert_close(
        model.logits(tokens)[0, 6, 97:101], torch.tensor(LOGITS[name]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize('name', CONFIGS)
def test_what_comes_in_goes_out_as_it_was(name, tmp_path, capsys):
    tensors = write_released(name, tmp_path / 'in')
    hf.main(['import', str(tmp_path / 'in'), f'--out={tmp_path / "ckpt.pt"}'])
    checkpoint = checkpoints.load(tmp_path / 'ckpt.pt')
    config, tokenizer = checkpoint['model_config'], Tokenizer(checkpoint['tokenizer'])
    assert checkpoint['architecture'] == 'diffusion' and config['mask_id'] == tokenizer.mask_id == MASKS[name]
    assert config['ignore_id'] == tokenizer.ignore_id == tokenizer.endoftext_id  # no row is added
    assert config['vocab_size'] == (262 if name == 'llada' else 261) and not tokenizer.added
    assert config['shift'] == (name == 'Dream')
    assert tokenizer.start_id == checkpoint['start_token'] == (256 if name == 'llada' else 259)

    hf.main(['export', str(tmp_path / 'ckpt.pt'), f'--out={tmp_path / "out"}'])
    assert f'family {name!r}, for the code of its authors; 270 tokens.' in capsys.readouterr().out
    written = safetensors.torch.load_file(tmp_path / 'out' / 'model.safetensors')
    assert written.keys() == tensors.keys() and all(
        torch.equal(written[key], tensors[key]) for key in tensors
    )
    exported = json.loads((tmp_path / 'out' / 'config.json').read_text())
    shape = {key: value for key, value in CONFIGS[name].items() if key in exported}
    odd = {key for key in shape if shape[key] != exported[key]} - {'eos_token_id', 'embedding_size'}
    assert not odd and exported['mask_token_id'] == MASKS[name]
    again = checkpoints.load(tmp_path / 'out')
    for key in ('tokenizer', 'model_config', 'architecture', 'start_token', 'prompt_format'):
        assert again[key] == checkpoint[key]


@pytest.mark.parametrize(
    'name, changes, said',
    [
        ('llada', {'rope': False}, 'rope=False; only True can be taken over exactly'),
        ('llada', {'rope_scaling': {'type': 'linear', 'factor': 4.0}}, 'of llada only None can be taken'),
        ('llada', {'activation_type': 'swiglu'}, "activation_type='swiglu'; only silu"),
        ('llada', {'alibi': True}, 'alibi=True; only None'),
        ('llada', {'attention_layer_norm': True}, 'attention_layer_norm=True; only None'),
        ('llada', {'num_experts': 64}, 'num_experts=64; only None'),
        ('Dream', {'block_size': 32}, 'block_size=32; only None'),
    ],
)
def test_what_a_config_says_that_is_not_known_is_refused(name, changes, said, tmp_path):
    write_released(name, tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        checkpoints.load(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize('blocks', [{'block_length': (4,)}, {'ar_weight': 1.0}])
def test_blocks_are_refused_where_the_padding_is_the_end_of_texts(blocks, tmp_path):
    write_released('llada', tmp_path)
    start = checkpoints.load(tmp_path)
    tokenizer = Tokenizer(start['tokenizer'])
    starts = (checkpoints.convert(start, tmp_path, 'diffusion', **x) for x in ({}, blocks))
    whole, parts = (ModelConfig(**one['model_config']) for one in starts)
    checkpoints.check_padding(whole, tokenizer)
    with pytest.raises(UserError, match='pads texts with their end'):
        checkpoints.check_padding(parts, tokenizer)


def test_a_switch_of_llada_that_is_left_out_is_refused(tmp_path):
    write_released('llada', tmp_path)
    write_json(tmp_path / 'config.json', {**LLADA, 'model_type': 'llada', 'block_type': None})
    with pytest.raises(UserError, match='block_type=None; only llama'):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize('always_asks', [False, True])  # for one more answer
def test_a_conversation_is_what_the_template_of_llada_says(always_asks, tmp_path):
    write_released('llada', tmp_path)
    checkpoint = checkpoints.load(tmp_path)
    tokenizer, form = Tokenizer(checkpoint['tokenizer']), checkpoint['prompt_format']
    form = form.replace('if add_generation_prompt', 'if true') if always_asks else form
    ids, loss_mask = prompts.encode(tokenizer, form, [('Hi', '', 'Ho')])
    ids = [prompts.start_of(form, tokenizer, checkpoint['start_token']), *ids]
    header, between, eot = '<|start_header_id|>', '<|end_header_id|>\n\n', '<|eot_id|>'
    text = f'<|startoftext|>{header}user{between}Hi{eot}{header}assistant{between}Ho{eot}'
    assert tokenizer.decode(ids, show_special=True) == text and sum(loss_mask) == 3
    assert prompts.stop_tokens(checkpoint, tokenizer) == [261, 257]


def test_the_tokenizer_of_dream_cuts_words_as_qwen_does(tmp_path):
    write_released('Dream', tmp_path)
    vocab = {text: byte for byte, text in CHARACTERS.items()} | {'12': 261, '.a': 262}
    settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    tokens = {i + 7: token for i, token in enumerate(settings['added_tokens_decoder'].values(), 256)}
    write_json(tmp_path / 'vocab.json', {**vocab, '12': 256, '.a': 257})
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n1 2\n. a\n')
    write_json(tmp_path / 'tokenizer_config.json', {**settings, 'added_tokens_decoder': tokens})
    with pytest.raises(UserError, match='cannot be token 263'):
        Tokenizer.load(tmp_path)
    tokens = {i - 5: token for i, token in tokens.items()}
    write_json(tmp_path / 'tokenizer_config.json', {**settings, 'added_tokens_decoder': tokens})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode('12') == [49, 50] and tokenizer.encode('.a') == [257]  # numbers by digits
    assert tokenizer.encode('e\u0301') == tokenizer.encode('\xe9') and tokenizer.mask_id == 262


@pytest.mark.parametrize(
    'name, options',
    [
        ('llada', '--sampler=blocks --block_length=4 --temperature=0 --chat --prompt=Hi'),
        ('Dream', '--sampler=entropy --threshold=0 --temperature=0.2 --top_p=0.95 --infill=a<mask:3>b'),
        ('a2d-qwen3', '--sampler=confidence --temperature=0 --prompt=Hi'),
    ],
)
def test_sampling_as_its_authors_recommend(name, options, tmp_path, capsys):
    write_released(name, tmp_path)
    run('sample.py', f'--checkpoint={tmp_path}', '--max_new_tokens=8', '--device=cpu', *options.split())
    assert 'diffusion' in capsys.readouterr().out


def test_a_step_of_tuning_pads_with_the_end_and_gives_the_family_back(tmp_path, prepare):
    write_released('llada', tmp_path / 'base')
    records = [{'instruction': f'Say {i}', 'output': f'{i}'} for i in range(40)]
    (tmp_path / 'data.json').write_text(json.dumps(records))
    base, settings = tmp_path / 'base', ['--val_fraction=0.2']
    folder = prepare('instruct.py', f'--source={tmp_path / "data.json"}', f'--tokenizer={base}', *settings)
    options = [
        '--max_steps=1',
        '--use_peft',
        '--load_in_4bit',
        '--peft_lora_r=2',
        f'--out_dir={tmp_path / "run"}',
    ]
    tuned = tune(f'--dataset={folder}', f'--init_from={base}', *options)
    tokens, loss_mask, _ = tuned['batches'].rows.read(0)
    assert tokens[-1] == 257 and loss_mask[-1] == 1  # padding, which is learnt
    hf.main(['export', str(tmp_path / 'run' / 'ckpt.pt'), f'--out={tmp_path / "tuned"}'])
    assert json.loads((tmp_path / 'tuned' / 'config.json').read_text())['model_type'] == 'llada'
    with pytest.raises(UserError, match='pads with its end; take --architecture=diffusion'):
        tune(f'--dataset={folder}', '--init_from=scratch', f'--out_dir={tmp_path / "ar"}')


def test_llada_8b_is_tuned_as_nf4_on_a_gpu_of_8_gb():
    shape = dict(vocab_size=126464, mask_id=126336, n_head=32, n_embd=4096, mlp_width=12288)
    switches = dict(norm='rms_gain', mlp='swiglu', qk_norm=False, tied=False, logit_softcap=0.0)

    def estimate(n_layer):
        with torch.device('meta'):
            model = Diffusion(
                ModelConfig(
                    **shape, **switches, n_layer=n_layer, block_size=4096, gradient_checkpointing=True
                )
            )
            quantize.quantize(model, bits=4)
            lora.add_lora(model, 16, 16.0, 0.0, ())
        lora.round_frozen(model)
        gpu = SimpleNamespace(dtype='bfloat16', device=torch.device('cuda'))
        return sum(runtime.memory_estimate(model, 1, 512, gpu).values())

    one, two = estimate(1), estimate(2)
    assert round((one + 31 * (two - one)) / 1e9, 1) == 8.1 < 8 * 2**30 / 1e9


def test_what_an_ar_model_has_as_a_mask_token_changes_nothing(tmp_path):
    for name, more in (('plain', {}), ('masked', {'mask_token': '</s>'})):
        hf_model('llama', tmp_path / name)
        write_llama_tokenizer(tmp_path / name)
        settings = {'bos_token': '<s>', 'eos_token': '</s>', **more}
        (tmp_path / name / 'tokenizer_config.json').write_text(json.dumps(settings))
    plain, masked = (checkpoints.load(tmp_path / name) for name in ('plain', 'masked'))
    assert all(plain[key] == masked[key] for key in ('tokenizer', 'start_token', 'model_config'))


def test_the_tokenizer_knows_the_families_that_have_a_mask():
    known = {name for name, (architecture, *_) in families.FAMILIES.items() if architecture == 'diffusion'}
    assert known == set(DIFFUSION_FAMILIES)
