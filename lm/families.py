"""The families of Hugging Face checkpoints: their tensor names and config.json in our terms, and back.

gpt2, opt, llama (also deepseek-coder, tinyllama and smollm), mistral, qwen2 (also 2.5) and qwen3. At the end, the
shapes of published models, to train them from scratch.
"""

import contextlib
from dataclasses import replace

import torch

from lm.configurator import UserError, require
from model import ARCHITECTURES, ModelConfig

NATIVE = 'diffusion-lm'  # model_type of what no family can express, which only these scripts read

LAYOUTS = ('llama', 'opt', 'gpt2')  # the columns of NAMES and KEYS
FAMILIES = {  # model_type: layout, class in transformers, fields of ModelConfig that differ from the layout's
    'gpt2': ('gpt2', 'GPT2LMHeadModel', {}),
    'opt': ('opt', 'OPTForCausalLM', {}),
    'llama': ('llama', 'LlamaForCausalLM', {}),
    'mistral': ('llama', 'MistralForCausalLM', {}),
    'qwen2': ('llama', 'Qwen2ForCausalLM', {'qkv_bias': True}),
    'qwen3': ('llama', 'Qwen3ForCausalLM', {'qk_norm': True}),
}
NAMES = {  # of our modules; those below 'unembedding' are in a block
    'embedding': ('model.embed_tokens', 'model.decoder.embed_tokens', 'transformer.wte'),
    'positions': (None, 'model.decoder.embed_positions', 'transformer.wpe'),
    'project_in': (None, 'model.decoder.project_in', None),
    'project_out': (None, 'model.decoder.project_out', None),
    'blocks': ('model.layers', 'model.decoder.layers', 'transformer.h'),
    'norm': ('model.norm', 'model.decoder.final_layer_norm', 'transformer.ln_f'),
    'unembedding': ('lm_head', 'lm_head', 'lm_head'),
    'attention_norm': ('input_layernorm', 'self_attn_layer_norm', 'ln_1'),
    'attention.q': ('self_attn.q_proj', 'self_attn.q_proj', 'attn.c_attn'),
    'attention.k': ('self_attn.k_proj', 'self_attn.k_proj', 'attn.c_attn'),
    'attention.v': ('self_attn.v_proj', 'self_attn.v_proj', 'attn.c_attn'),
    'attention.out': ('self_attn.o_proj', 'self_attn.out_proj', 'attn.c_proj'),
    'attention.q_norm': ('self_attn.q_norm', None, None),
    'attention.k_norm': ('self_attn.k_norm', None, None),
    'mlp_norm': ('post_attention_layernorm', 'final_layer_norm', 'ln_2'),
    'mlp.gate': ('mlp.gate_proj', None, None),
    'mlp.up': ('mlp.up_proj', 'fc1', 'mlp.c_fc'),
    'mlp.down': ('mlp.down_proj', 'fc2', 'mlp.c_proj'),
}
KEYS = {  # of config.json, by field of ModelConfig
    'n_layer': ('num_hidden_layers', 'num_hidden_layers', 'n_layer'),
    'n_head': ('num_attention_heads', 'num_attention_heads', 'n_head'),
    'n_embd': ('hidden_size', 'hidden_size', 'n_embd'),
    'n_kv_head': ('num_key_value_heads', None, None),
    'head_dim': ('head_dim', None, None),
    'block_size': ('max_position_embeddings', 'max_position_embeddings', 'n_positions'),
    'mlp': (None, 'activation_function', 'activation_function'),
    'mlp_width': ('intermediate_size', 'ffn_dim', 'n_inner'),
    'norm_eps': ('rms_norm_eps', None, 'layer_norm_epsilon'),
    'norm_after': (None, 'do_layer_norm_before', None),  # the opposite
    'embedding_width': (None, 'word_embed_proj_dim', None),
    'rope_theta': ('rope_theta', None, None),
    'rope_scaling': ('rope_scaling', None, None),
    'tied': ('tie_word_embeddings', 'tie_word_embeddings', 'tie_word_embeddings'),
}
DEFAULTS = {  # of keys that may be missing
    'llama': dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, tie_word_embeddings=False),
    'opt': dict(activation_function='relu', do_layer_norm_before=True, word_embed_proj_dim=None),
    'gpt2': dict(n_inner=None, activation_function='gelu_new', layer_norm_epsilon=1e-5),
}
REQUIRED = {  # keys that have to have this value
    'llama': dict(hidden_act='silu', attention_bias=False, mlp_bias=False),
    'opt': dict(enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False),
    'gpt2': dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
}
EXPORTED = {  # keys that an export has besides
    'llama': dict(hidden_act='silu'),
    'opt': dict(dropout=0.0),
    'gpt2': dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
GPT = dict(norm='layer', position='learned', bias=True, qk_norm=False)
FIELDS = {  # of ModelConfig, the same for all models of a layout
    'llama': dict(mlp='swiglu', norm='rms_gain', qkv_bias=False, qk_norm=False),
    'opt': dict(GPT, norm_eps=1e-5, position_offset=2),
    'gpt2': GPT,
}
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu': 'relu'}


def column(table, layout):
    """Return {name of ours: name in a layout} of NAMES or KEYS."""
    i = LAYOUTS.index(layout)
    return {ours: names[i] for ours, names in table.items() if names[i] is not None}


def hf_name(name, family):
    """Return where a family keeps our tensor `name`: (its name there, qkv_index, transposed).

    blocks.3.mlp.up.bias is transformer.h.3.mlp.c_fc.bias in gpt2. There linear layers are (in, out) and queries, keys
    and values are one of them; qkv_index is 0, 1 or 2 for these and None elsewhere. Without a family: our own name.
    """
    if family is None:
        return name, None, False

    layout = FAMILIES[family][0]
    names = column(NAMES, layout)
    module, _, kind = name.rpartition('.')
    if not name.startswith('blocks.'):
        return f'{names[module]}.{kind}', None, False

    _, layer, module = module.split('.', 2)
    qkv = ('attention.q', 'attention.k', 'attention.v')
    qkv_index = qkv.index(module) if layout == 'gpt2' and module in qkv else None
    transposed = layout == 'gpt2' and kind == 'weight' and not module.endswith('_norm')
    return f'{names["blocks"]}.{layer}.{names[module]}.{kind}', qkv_index, transposed


def config_from_hf(c, path):
    """Return the fields of ModelConfig that a config.json `c` sets. UserError: it says what we cannot express."""
    family, known = c['model_type'], ', '.join(FAMILIES)
    require(family in FAMILIES, f'{path} is of the family {family!r}; choose one of {known}.')
    layout, _, fields = FAMILIES[family]
    c = {'tie_word_embeddings': True, **REQUIRED[layout], **DEFAULTS[layout], **c}
    try:
        for key, value in REQUIRED[layout].items():
            require(c[key] == value, f'It has {key}={c[key]!r}; only {value!r} is known here.')
        if layout == 'llama':
            c.update(rope_and_length(c))
        found = {field: from_hf(key, c[key]) for field, key in column(KEYS, layout).items()}
        found.update(logit_softcap=0.0, pretrained_rows=c['vocab_size'])
    except KeyError as error:
        raise UserError(f'{path}/config.json lacks {error}; download it again.') from error
    except UserError as error:
        raise UserError(f'{path} cannot be taken over exactly. {error}') from error
    return {key: value for key, value in {**found, **FIELDS[layout], **fields}.items() if value is not None}


def from_hf(key, value):
    if key == 'activation_function':
        known = ', '.join(ACTIVATIONS)
        require(value in ACTIVATIONS, f'It has {key}={value!r}; only {known} are known here.')
        return ACTIVATIONS[value]
    return not value if key == 'do_layer_norm_before' else value


def rope_and_length(c):
    """Return rotary positions and the length under the same keys for all versions of transformers."""
    theta_and_scaling = {'rope_theta': c.get('rope_theta', 10000.0), **(c.get('rope_scaling') or {})}
    rope = c.get('rope_parameters') or theta_and_scaling  # the former since transformers 5
    kind = rope.get('rope_type', rope.get('type', 'default'))
    known = kind in ('default', 'linear', 'llama3') and rope.get('partial_rotary_factor', 1.0) == 1
    require(known, f'Its rotary positions are {rope}; only default, linear and llama3 are known here.')
    numbers = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
    scaling = {'rope_type': kind, **{key: rope[key] for key in numbers if key in rope}}

    length, window = c['max_position_embeddings'], c.get('sliding_window')
    if window and (c['model_type'] == 'mistral' or c.get('use_sliding_window')):
        length = min(length, window)  # up to there a window changes nothing
    return {
        'rope_theta': float(rope['rope_theta']),
        'rope_scaling': None if kind == 'default' else scaling,
        'max_position_embeddings': length,
    }


def config_to_hf(config, family):
    """Return a family's config.json for a ModelConfig, as far as it can say it, without the vocabulary."""
    layout, hf_class, _ = FAMILIES[family]
    default_eps = 1e-5 if config.norm == 'layer' else torch.finfo(torch.float32).eps  # PyTorch's
    values = {
        **vars(config),
        'mlp': next((theirs for theirs, ours in ACTIVATIONS.items() if ours == config.mlp), None),
        'norm_eps': config.norm_eps or default_eps,
        'norm_after': not config.norm_after,
    }
    keys = {key: values[field] for field, key in column(KEYS, layout).items()}
    return {'model_type': family, 'architectures': [hf_class], **keys, **EXPORTED[layout]}


def family_of(architecture, config):
    """Return the family that can express a model exactly, and its config.json; (None, None) where there is none.

    architecture: a model class or its name. A family fits if `config`, written in its words and read again, is the
    same, apart from fields that have no meaning in a causal language model or outside of training.
    """
    if not ARCHITECTURES.get(architecture, architecture).hf_causal_lm:
        return None, None

    unused = dict(dropout=0.0, k=ModelConfig.k, shift=False)
    unused.update(gradient_checkpointing=False, selective_checkpointing=False)
    if config.position == 'learned':
        unused['rope_theta'] = ModelConfig.rope_theta
    wanted = replace(config, **unused)
    for family in FAMILIES:
        c = config_to_hf(config, family)
        with contextlib.suppress(UserError):  # an activation that the family does not have
            fields = config_from_hf({**c, 'vocab_size': config.pretrained_rows}, family)
            ids = dict(mask_id=config.mask_id, ignore_id=config.ignore_id)
            found = ModelConfig(config.vocab_size, **ids, **fields)
            found.norm_eps = config.norm_eps and found.norm_eps
            if found == wanted:
                return family, c
    return None, None


# ---------------------------------------------------------------------------- shapes of published models

SHAPE = (
    'model_type num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim '
    'vocab_size rms_norm_eps rope_theta tie_word_embeddings'
).split()
SHAPES = {
    'llama3': ('llama', 16, 2048, 8192, 32, 8, 64, 128256, 1e-5, 5e5, True),  # Llama-3.2-1B
    'deepseek': ('llama', 24, 2048, 5504, 16, 16, 128, 32256, 1e-6, 1e5, False),  # deepseek-coder-1.3b-base
    'qwen0.6B': ('qwen3', 28, 1024, 3072, 16, 8, 128, 151936, 1e-6, 1e6, True),  # Qwen3-0.6B
    'qwen1.7B': ('qwen3', 28, 2048, 6144, 16, 8, 128, 151936, 1e-6, 1e6, True),  # Qwen3-1.7B
}
PUBLISHED = {name: dict(zip(SHAPE, shape)) for name, shape in SHAPES.items()}  # as in their config.json
PUBLISHED['deepseek']['rope_scaling'] = dict(rope_type='linear', factor=4.0)
PUBLISHED['llama3']['rope_scaling'] = dict(
    rope_type='llama3', factor=32.0, original_max_position_embeddings=8192
)
PUBLISHED['llama3']['rope_scaling'].update(low_freq_factor=1.0, high_freq_factor=4.0)
FINETUNED = {
    'llama3_finetune': 'meta-llama/Llama-3.2-1B',
    'qwen3_finetune': 'Qwen/Qwen3-1.7B',
    'deepseek_finetune': 'deepseek-ai/deepseek-coder-1.3b-base',
}


def published_config(model, block_size):
    """Return ModelConfig's fields for a model of PUBLISHED, without its vocabulary: that is of the data."""
    shape = config_from_hf({**PUBLISHED[model], 'max_position_embeddings': block_size}, model)
    del shape['pretrained_rows']
    return {**shape, 'tied': True}  # a head of its own would be trained for few tokens only
