"""The families of Hugging Face checkpoints: their tensor names and config.json in our terms, and back."""

import contextlib
import re

import torch

from lm.configurator import UserError, require
from model import ARCHITECTURES, ModelConfig, architecture_name

NATIVE = 'diffusion-lm'  # model_type of what no family can express, which only these scripts read

LAYOUTS = ('llama', 'opt', 'gpt2', 'llada')  # the columns of NAMES and KEYS
FAMILIES = {  # model_type: architecture, layout, its own class, fields of ModelConfig that differ from the layout's
    'gpt2': ('ar', 'gpt2', 'GPT2LMHeadModel', {}),
    'opt': ('ar', 'opt', 'OPTForCausalLM', {}),
    'llama': ('ar', 'llama', 'LlamaForCausalLM', {}),  # deepseek-coder, tinyllama, smollm too
    'mistral': ('ar', 'llama', 'MistralForCausalLM', {}),
    'qwen2': ('ar', 'llama', 'Qwen2ForCausalLM', {'qkv_bias': True}),  # 2.5 too
    'qwen3': ('ar', 'llama', 'Qwen3ForCausalLM', {'qk_norm': True}),
    'llada': ('diffusion', 'llada', 'LLaDAModelLM', {}),  # 1.5 too
    'Dream': ('diffusion', 'llama', 'DreamModel', {'qkv_bias': True, 'shift': True}),
    'a2d-qwen2': ('diffusion', 'llama', 'A2DQwen2LMHeadModel', {'qkv_bias': True}),
    'a2d-qwen3': ('diffusion', 'llama', 'A2DQwen3LMHeadModel', {'qk_norm': True}),
}
NAMES = {  # of our modules; those below 'unembedding' are in a block
    'embedding': (
        'model.embed_tokens',
        'model.decoder.embed_tokens',
        'transformer.wte',
        'model.transformer.wte',
    ),
    'positions': (None, 'model.decoder.embed_positions', 'transformer.wpe', None),
    'project_in': (None, 'model.decoder.project_in', None, None),
    'project_out': (None, 'model.decoder.project_out', None, None),
    'blocks': ('model.layers', 'model.decoder.layers', 'transformer.h', 'model.transformer.blocks'),
    'norm': ('model.norm', 'model.decoder.final_layer_norm', 'transformer.ln_f', 'model.transformer.ln_f'),
    'unembedding': ('lm_head', 'lm_head', 'lm_head', 'model.transformer.ff_out'),
    'attention_norm': ('input_layernorm', 'self_attn_layer_norm', 'ln_1', 'attn_norm'),
    'attention.q': ('self_attn.q_proj', 'self_attn.q_proj', 'attn.c_attn', 'q_proj'),
    'attention.k': ('self_attn.k_proj', 'self_attn.k_proj', 'attn.c_attn', 'k_proj'),
    'attention.v': ('self_attn.v_proj', 'self_attn.v_proj', 'attn.c_attn', 'v_proj'),
    'attention.out': ('self_attn.o_proj', 'self_attn.out_proj', 'attn.c_proj', 'attn_out'),
    'attention.q_norm': ('self_attn.q_norm', None, None, None),
    'attention.k_norm': ('self_attn.k_norm', None, None, None),
    'mlp_norm': ('post_attention_layernorm', 'final_layer_norm', 'ln_2', 'ff_norm'),
    'mlp.gate': ('mlp.gate_proj', None, None, 'ff_proj'),
    'mlp.up': ('mlp.up_proj', 'fc1', 'mlp.c_fc', 'up_proj'),
    'mlp.down': ('mlp.down_proj', 'fc2', 'mlp.c_proj', 'ff_out'),
}
KEYS = {  # of config.json, by field of ModelConfig
    'n_layer': ('num_hidden_layers', 'num_hidden_layers', 'n_layer', 'n_layers'),
    'n_head': ('num_attention_heads', 'num_attention_heads', 'n_head', 'n_heads'),
    'n_embd': ('hidden_size', 'hidden_size', 'n_embd', 'd_model'),
    'n_kv_head': ('num_key_value_heads', None, None, 'n_kv_heads'),
    'head_dim': ('head_dim', None, None, None),
    'block_size': (*2 * ('max_position_embeddings',), 'n_positions', 'max_sequence_length'),
    'mlp': (None, 'activation_function', 'activation_function', None),
    'mlp_width': ('intermediate_size', 'ffn_dim', 'n_inner', 'mlp_hidden_size'),
    'norm_eps': ('rms_norm_eps', None, 'layer_norm_epsilon', 'rms_norm_eps'),
    'norm_after': (None, 'do_layer_norm_before', None, None),  # the opposite
    'embedding_width': (None, 'word_embed_proj_dim', None, None),
    'rope_theta': ('rope_theta', None, None, 'rope_theta'),
    'rope_scaling': ('rope_scaling', None, None, None),
    'tied': ('tie_word_embeddings', 'tie_word_embeddings', 'tie_word_embeddings', 'weight_tying'),
}
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu': 'relu'}
DEFAULTS = dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6)  # of keys that may be missing
DEFAULTS.update(do_layer_norm_before=True, word_embed_proj_dim=None, n_inner=None, layer_norm_epsilon=1e-5)
KNOWN = dict(hidden_act=['silu'], attention_bias=[False], mlp_bias=[False], partial_rotary_factor=[1.0])
KNOWN.update(rope_type=['default', 'linear', 'llama3'], activation_function=[*ACTIVATIONS])
KNOWN.update(enable_bias=[True], layer_norm_elementwise_affine=[True], _remove_final_layer_norm=[False])
KNOWN.update(scale_attn_weights=[True], pretraining_tp=[1], add_cross_attention=[False])
KNOWN.update(scale_attn_by_inverse_layer_idx=[False])
LLADA = dict(activation_type='silu', block_type='llama', layer_norm_type='rms', layer_norm_with_affine=True)
LLADA.update(rope=True, rope_full_precision=True, block_group_size=1, mlp_ratio=4)  # each is to be said
KNOWN.update({key: [value] for key, value in LLADA.items()})
ABSENT = [None, False, 0, '', [], {}]  # values that say as little as a key that is missing
ROPE_NUMBERS = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
READ = {key for row in KEYS.values() for key in row if key} | {'vocab_size', 'embedding_size', *ROPE_NUMBERS}
NUMBERS = READ - {'rope_scaling', 'do_layer_norm_before', 'activation_function'}
NUMBERS -= {'tie_word_embeddings', 'weight_tying'}
LARGEST = 2**24  # of any number
SILENT = re.compile(  # keys without a say in the logits, or that with_rope_and_length reads
    '_.*|transformers.*|unsloth.*|summary_.*|.*_token_id|.*dropout|.*pdrop|layerdrop|(torch_)?dtype|model_type'
    '|architectures|use_cache|init.*_(range|std)|n_ctx|prefix|task_specific_params|id2label|label2id|return_dict'
    '|gradient_checkpointing|output_past|reorder_and_upcast_attn|is_llama_config|start_token'
    '|trained_here|prompt_format|rope_parameters|type|max_window_layers|layer_types|(use_)?sliding_window'
    '|do_sample|(min|max)_length|num_(beam.*|return_sequences)|.*_penalty|temperature|top_[kp]|typical_p'
    '|init_(device|fn)|init_cutoff_factor|alibi_bias_max|attention_layer_norm_with_affine|flash_attention|precision'
)
GPT = dict(norm='layer', position='learned', bias=True, qk_norm=False)
LLAMA = dict(mlp='swiglu', norm='rms_gain', qkv_bias=False, qk_norm=False)
FIELDS = dict(llama=LLAMA, opt={**GPT, 'norm_eps': 1e-5, 'position_offset': 2}, gpt2=GPT, llada=LLAMA)
DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
EXPORTED = dict(llama={'hidden_act': 'silu'}, opt={'dropout': 0.0}, gpt2=DROPOUT)  # keys that an export adds
DROPOUTS = dict.fromkeys(['residual_dropout', 'embedding_dropout', 'attention_dropout'], 0.0)
EXPORTED['llada'] = {**LLADA, **DROPOUTS, 'embedding_size': None}


def column(table, layout):
    """Return {name of ours: name in a layout} of NAMES or KEYS."""
    i = LAYOUTS.index(layout)
    return {ours: names[i] for ours, names in table.items() if names[i] is not None}


def hf_name(name, family):
    """Return where a family keeps our tensor `name`: (its name there, qkv_index, transposed).

    blocks.3.mlp.up.bias is transformer.h.3.mlp.c_fc.bias in gpt2. There linear layers are (in, out) and q, k, v
    are one; qkv_index is 0, 1 or 2 for these and None elsewhere. Without a family: our own name.
    """
    if family is None:
        return name, None, False
    layout = FAMILIES[family][1]
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
    """Return the fields of ModelConfig that a config.json `c` sets; UserError: they cannot say it."""
    family, known = c.get('model_type'), ', '.join(FAMILIES)
    require(family in FAMILIES, f'{path} is of the family {family!r}; choose one of {known}.')
    architecture, layout, _, fields = FAMILIES[family]
    defaults = {**DEFAULTS, **{key: known[0] for key, known in KNOWN.items()}}
    defaults['tie_word_embeddings'] = layout != 'llama'
    defaults['activation_function'] = 'relu' if layout == 'opt' else 'gelu_new'
    defaults |= dict.fromkeys(LLADA, None) | {'rms_norm_eps': 1e-5} if layout == 'llada' else {}
    c = {**defaults, **c}
    scaling = (c.get('rope_scaling') or c.get('rope_parameters')) if layout != 'llama' else None
    require(not scaling, f'{path} has rope_scaling={scaling!r}; of {family} only None can be taken exactly.')
    try:
        c = with_rope_and_length(c) if layout == 'llama' else c
        found = {field: c[key] for field, key in column(KEYS, layout).items()}
        rows = c.get('embedding_size') or c['vocab_size']
        found.update(logit_softcap=0.0, vocab_size=rows, pretrained_rows=rows)
        if architecture == 'diffusion':  # its auto_map names the code that computes what stands here
            found['mask_id'], c['auto_map'] = c.get('mask_token_id'), None
    except KeyError as error:
        raise UserError(f'{path}/config.json lacks {error}; download it again.') from error
    check_config(c, path)
    found.update(mlp=ACTIVATIONS[c['activation_function']], norm_after=not found.get('norm_after', True))
    return {key: value for key, value in {**found, **FIELDS[layout], **fields}.items() if value is not None}


def check_config(c, path):
    """Raise a UserError for what a config.json says that is not known at its default, and for impossible numbers."""
    for key, value in c.items():
        if key in KNOWN or key not in READ and not SILENT.fullmatch(key):
            exact = f'only {" or ".join(map(str, KNOWN.get(key, [None])))} can be taken over exactly'
            require(value in KNOWN.get(key, ABSENT), f'{path} has {key}={value!r}; {exact}.')
        elif key in NUMBERS:
            fits = value is None or type(value) in (int, float) and 0 < value <= LARGEST
            require(fits, f'{path} has {key}={value!r}; it has to be above 0 and at most {LARGEST:,}.')


def with_rope_and_length(c):
    """Return a config.json of llama's layout with the same keys for all versions of transformers."""
    rope = c.get('rope_parameters') or c.get('rope_scaling') or {}  # the former since transformers 5
    theta = float(rope.get('rope_theta', c.get('rope_theta', 10000.0)))
    kind = rope.get('rope_type', rope.get('type', 'default'))
    scaling = {'rope_type': kind, **{key: rope[key] for key in ROPE_NUMBERS if key in rope}}
    length, window = c['max_position_embeddings'], c.get('sliding_window', 4096)  # as transformers has it
    if kind == 'llama3':  # as transformers has it where it is missing
        scaling.setdefault(ROPE_NUMBERS[-1], c.get(ROPE_NUMBERS[-1]) or length)
    slides = c['model_type'] == 'mistral' or 'sliding_attention' in (c.get('layer_types') or ())
    if window and (slides or c.get('use_sliding_window')):
        length = min(length, window)  # up to there a window changes nothing
    rope = {**rope, 'rope_type': kind, 'rope_scaling': None if kind == 'default' else scaling}
    return {**c, **rope, 'rope_theta': theta, 'max_position_embeddings': length}


def config_to_hf(config, family):
    """Return a family's config.json for a ModelConfig, as far as it can say it, without the vocabulary."""
    architecture, layout, hf_class, _ = FAMILIES[family]
    activation = next((hf for hf, ours in ACTIVATIONS.items() if ours == config.mlp), None)
    eps = config.norm_eps or (1e-5 if config.norm == 'layer' else torch.finfo(torch.float32).eps)  # PyTorch's
    values = {**vars(config), 'mlp': activation, 'norm_after': not config.norm_after, 'norm_eps': eps}
    keys = {key: values[field] for field, key in column(KEYS, layout).items()}
    keys |= {'mask_token_id': config.mask_id} if architecture == 'diffusion' else {}
    return {'model_type': family, 'architectures': [hf_class], **keys, **EXPORTED[layout]}


def family_of(architecture, config):
    """Return the family that can express a model exactly, and its config.json; (None, None) if there is none.

    architecture: a model class or its name. A family fits if `config`, written in its words and read again, is the
    same, apart from fields without a meaning there or outside of training. No family of diffusion models knows our
    <|ignore|>, which comes after <|mask|>; they are padded with their end, which comes before it.
    """
    name = architecture if isinstance(architecture, str) else architecture_name(architecture)
    kind = vars(ARCHITECTURES[name]).get('family_of', '')  # a subclass computes something else
    if kind == 'diffusion' and config.ignore_id is not None and config.ignore_id > config.mask_id:
        return None, None
    unused = 'dropout k gradient_checkpointing mask_id ignore_id'.split() + ['shift'] * (kind == 'ar')
    unused += ['rope_theta'] * (config.position == 'learned')
    for family in [name for name, row in FAMILIES.items() if row[0] == kind]:
        c = config_to_hf(config, family)
        with contextlib.suppress(UserError):  # an activation that the family does not have
            fields = config_from_hf({**c, 'vocab_size': config.pretrained_rows}, family)
            found = vars(ModelConfig(**{**fields, 'vocab_size': config.vocab_size}))
            found['norm_eps'] = config.norm_eps and found['norm_eps']
            if all(found[field] == value for field, value in vars(config).items() if field not in unused):
                return family, c
    return None, None


SHAPE = 'n_layer n_embd mlp_width n_head n_kv_head head_dim norm_eps rope_theta rope_scaling'.split()
LINEAR = dict(rope_type='linear', factor=4.0)
LLAMA3 = dict(rope_type='llama3', factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3['original_max_position_embeddings'] = 8192
PUBLISHED = {  # family, SHAPE
    'llama3': ('llama', 16, 2048, 8192, 32, 8, 64, 1e-5, 5e5, LLAMA3),  # Llama-3.2-1B
    'deepseek': ('llama', 24, 2048, 5504, 16, 16, 128, 1e-6, 1e5, LINEAR),  # deepseek-coder-1.3b-base
    'qwen0.6B': ('qwen3', 28, 1024, 3072, 16, 8, 128, 1e-6, 1e6, None),  # Qwen3-0.6B
    'qwen1.7B': ('qwen3', 28, 2048, 6144, 16, 8, 128, 1e-6, 1e6, None),  # Qwen3-1.7B
}
FINETUNED = {
    'llama3_finetune': 'meta-llama/Llama-3.2-1B',
    'qwen3_finetune': 'Qwen/Qwen3-1.7B',
    'deepseek_finetune': 'deepseek-ai/deepseek-coder-1.3b-base',
}


def published_config(model, block_size):
    """Return ModelConfig's fields for a model of PUBLISHED, with the vocabulary of the data, so with a tied head."""
    family, *shape = PUBLISHED[model]
    fields = {**LLAMA, **FAMILIES[family][-1], **dict(zip(SHAPE, shape))}
    return {**fields, 'block_size': block_size, 'logit_softcap': 0.0}
