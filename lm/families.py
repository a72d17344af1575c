"""The model families of Hugging Face checkpoints in our terms, and ours in theirs.

A family is a table of names and two functions: its config.json to the switches of ModelConfig, and back. gpt2,
opt, llama (with it deepseek-coder, tinyllama and smollm), mistral, qwen2 (and 2.5), qwen3.
"""

import contextlib
import re

import torch

from lm.configurator import UserError
from model import ModelConfig

NATIVE = 'diffusion-lm'  # the family of what no other can hold


# ---------------------------------------------------------------------------- names: ours, theirs

LLAMA = {
    'embedding': 'model.embed_tokens',
    'blocks': 'model.layers',
    'norm': 'model.norm',
    'unembedding': 'lm_head',
    'attention_norm': 'input_layernorm',
    'attention.q': 'self_attn.q_proj',
    'attention.k': 'self_attn.k_proj',
    'attention.v': 'self_attn.v_proj',
    'attention.out': 'self_attn.o_proj',
    'attention.q_norm': 'self_attn.q_norm',
    'attention.k_norm': 'self_attn.k_norm',
    'mlp_norm': 'post_attention_layernorm',
    'mlp.gate': 'mlp.gate_proj',
    'mlp.up': 'mlp.up_proj',
    'mlp.down': 'mlp.down_proj',
}
OPT = {
    'embedding': 'model.decoder.embed_tokens',
    'positions': 'model.decoder.embed_positions',
    'widen': 'model.decoder.project_in',
    'narrow': 'model.decoder.project_out',
    'blocks': 'model.decoder.layers',
    'norm': 'model.decoder.final_layer_norm',
    'unembedding': 'lm_head',
    'attention_norm': 'self_attn_layer_norm',
    'attention.q': 'self_attn.q_proj',
    'attention.k': 'self_attn.k_proj',
    'attention.v': 'self_attn.v_proj',
    'attention.out': 'self_attn.out_proj',
    'mlp_norm': 'final_layer_norm',
    'mlp.up': 'fc1',
    'mlp.down': 'fc2',
}
GPT2 = {
    'embedding': 'transformer.wte',
    'positions': 'transformer.wpe',
    'blocks': 'transformer.h',
    'norm': 'transformer.ln_f',
    'unembedding': 'lm_head',
    'attention_norm': 'ln_1',
    'attention.q': 'attn.c_attn',
    'attention.k': 'attn.c_attn',
    'attention.v': 'attn.c_attn',  # three in one
    'attention.out': 'attn.c_proj',
    'mlp_norm': 'ln_2',
    'mlp.up': 'mlp.c_fc',
    'mlp.down': 'mlp.c_proj',
}
NAMES = {'gpt2': GPT2, 'opt': OPT, 'llama': LLAMA, 'mistral': LLAMA, 'qwen2': LLAMA, 'qwen3': LLAMA}
CLASSES = {
    'gpt2': 'GPT2LMHeadModel',
    'opt': 'OPTForCausalLM',
    'llama': 'LlamaForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
}
BUFFERS = re.compile(r'(.*\.)?(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)')  # in old files, no weights
QKV = ('attention.q', 'attention.k', 'attention.v')
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu': 'relu'}


def their_name(name, family):
    """Where a family keeps one of our tensors: its name, the third of it (0, 1, 2) or None for all, and whether
    it lies there transposed. GPT-2's linear layers are (in, out), its queries, keys and values one of them.

    blocks.3.mlp.up.bias is transformer.h.3.mlp.c_fc.bias in gpt2."""
    names, (module, _, kind) = NAMES[family], name.rpartition('.')
    if not name.startswith('blocks.'):
        return f'{names[module]}.{kind}', None, False
    _, number, part = module.split('.', 2)
    third = QKV.index(part) if family == 'gpt2' and part in QKV else None
    transposed = family == 'gpt2' and kind == 'weight' and not part.endswith('_norm')
    return f'{names["blocks"]}.{number}.{names[part]}.{kind}', third, transposed


def bare(name):
    """A tensor's name without the prefix that old files and models without a head leave out."""
    return re.sub(r'^(transformer|model)\.', '', name)


# ---------------------------------------------------------------------------- config.json: theirs, ours


def read_gpt2(c):
    only(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return dict(
        n_layer=c['n_layer'],
        n_head=c['n_head'],
        n_embd=c['n_embd'],
        block_size=c['n_positions'],
        mlp_width=c.get('n_inner'),
        mlp=activation(c, 'activation_function', 'gelu_new'),
        norm='layer',
        norm_eps=c.get('layer_norm_epsilon', 1e-5),
        position='learned',
        bias=True,
        qk_norm=False,
        tied=c.get('tie_word_embeddings', True),
    )


def write_gpt2(c):
    return dict(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        n_positions=c.block_size,
        n_inner=c.mlp_width,
        activation_function=activation_name(c),
        layer_norm_epsilon=c.norm_eps or 1e-5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def read_opt(c):
    only(c, enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    return dict(
        n_layer=c['num_hidden_layers'],
        n_head=c['num_attention_heads'],
        n_embd=c['hidden_size'],
        block_size=c['max_position_embeddings'],
        position='learned',
        position_offset=2,
        mlp_width=c['ffn_dim'],
        mlp=activation(c, 'activation_function', 'relu'),
        norm='layer',
        norm_eps=1e-5,
        norm_after=not c.get('do_layer_norm_before', True),
        bias=True,
        qk_norm=False,
        embedding_width=c.get('word_embed_proj_dim'),
        tied=c.get('tie_word_embeddings', True),
    )


def write_opt(c):
    return dict(
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        hidden_size=c.n_embd,
        dropout=0.0,
        max_position_embeddings=c.block_size,
        ffn_dim=c.mlp_width,
        activation_function=activation_name(c),
        do_layer_norm_before=not c.norm_after,
        word_embed_proj_dim=c.embedding_width,
    )


def read_llama(c):
    """llama, mistral, qwen2 and qwen3; transformers 5 writes rope_parameters, what came before it rope_scaling."""
    only(c, hidden_act='silu', attention_bias=False, mlp_bias=False)
    rope = c.get('rope_parameters') or {
        'rope_theta': c.get('rope_theta', 10000.0),
        **(c.get('rope_scaling') or {}),
    }
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ('default', 'linear', 'llama3') or rope.get('partial_rotary_factor', 1.0) != 1:
        raise UserError(
            f'Its rotary positions are {rope}; only the kinds default, linear and llama3 are known here.'
        )
    scaling = {
        key: rope[key]
        for key in ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
        if key in rope
    }
    block_size = c['max_position_embeddings']
    if c.get('sliding_window') and (c['model_type'] == 'mistral' or c.get('use_sliding_window')):
        block_size = min(block_size, c['sliding_window'])  # up to there a window changes nothing
    return dict(
        n_layer=c['num_hidden_layers'],
        n_head=c['num_attention_heads'],
        n_embd=c['hidden_size'],
        n_kv_head=c.get('num_key_value_heads'),
        head_dim=c.get('head_dim'),
        block_size=block_size,
        mlp_width=c['intermediate_size'],
        mlp='swiglu',
        norm='rms_gain',
        norm_eps=c.get('rms_norm_eps', 1e-6),
        rope_theta=float(rope['rope_theta']),
        rope_scaling=None if kind == 'default' else {'rope_type': kind, **scaling},
        qkv_bias=c['model_type'] == 'qwen2',
        qk_norm=c['model_type'] == 'qwen3',
        tied=c.get('tie_word_embeddings', False),
    )


def write_llama(c):
    return dict(
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        hidden_size=c.n_embd,
        hidden_act='silu',
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        max_position_embeddings=c.block_size,
        intermediate_size=c.mlp_width,
        rms_norm_eps=c.norm_eps or torch.finfo(torch.float32).eps,
        rope_theta=c.rope_theta,
        rope_scaling=c.rope_scaling,
    )


READERS = {
    'gpt2': read_gpt2,
    'opt': read_opt,
    **dict.fromkeys(('llama', 'mistral', 'qwen2', 'qwen3'), read_llama),
}
WRITERS = {'gpt2': write_gpt2, 'opt': write_opt, **dict.fromkeys(('llama', 'qwen2', 'qwen3'), write_llama)}


def only(c, **wanted):
    for key, value in wanted.items():
        if c.get(key, value) != value:
            raise UserError(f'It has {key}={c[key]!r}; only {value!r} is known here.')


def activation(c, key, default):
    name = c.get(key, default)
    if name not in ACTIVATIONS:
        raise UserError(f'It has {key}={name!r}; only {", ".join(ACTIVATIONS)} are known here.')
    return ACTIVATIONS[name]


def activation_name(c):
    return next((theirs for theirs, ours in ACTIVATIONS.items() if ours == c.mlp), 'none')


def switches(c, path):
    """The fields of ModelConfig that a family's config.json `c` sets."""
    if c['model_type'] not in READERS:
        raise UserError(f'{path} is of the family {c["model_type"]!r}; choose one of {", ".join(READERS)}.')
    try:
        found = {'logit_softcap': 0.0, **READERS[c['model_type']](c), 'pretrained_rows': c['vocab_size']}
    except KeyError as error:
        raise UserError(f'{path}/config.json lacks {error}; download it again.') from error
    except UserError as error:
        raise UserError(f'{path} cannot be taken over exactly. {error}') from error
    return {key: value for key, value in found.items() if value is not None}


def family_of(architecture, config):
    """The family whose config.json says all that `config` says, with that config.json; or None, None.

    Found by writing it in each family's words and reading it again: what comes back equal is exact.
    """
    chosen = {
        **vars(config),
        'dropout': 0.0,
        'gradient_checkpointing': False,
        'selective_checkpointing': False,
        'shift': False,
    }
    if config.position == 'learned':
        chosen['rope_theta'] = 10000.0  # has no meaning there
    for family in WRITERS if architecture == 'ar' else ():
        theirs = {'model_type': family, **WRITERS[family](config), 'tie_word_embeddings': config.tied}
        with contextlib.suppress(UserError):  # an activation that the family has no word for
            ours = switches({**theirs, 'vocab_size': config.pretrained_rows}, family)
            again = ModelConfig(config.vocab_size, mask_id=config.mask_id, ignore_id=config.ignore_id, **ours)
            again.norm_eps = again.norm_eps if config.norm_eps else None  # PyTorch's own, said in a number
            if vars(again) == chosen:
                return family, theirs
    return None, None
