"""A ckpt.pt of nanoGPT's as one of ours: GPT-2's blocks, with q, k and v in one matrix there."""

import re

import torch

from lm.configurator import UserError
from lm.data import SPECIAL_TOKENS
from model import ModelConfig

NAMES = {
    'ln_1': 'attention_norm',
    'attn.c_proj': 'attention.out',
    'ln_2': 'mlp_norm',
    'mlp.c_fc': 'mlp.up',
    'mlp.c_proj': 'mlp.down',
}


def load(path, tokenizer):
    """The checkpoint, a dict as `checkpoints.load` returns it. tokenizer: the data.Tokenizer it was trained
    with, which it does not hold itself. Rows of the vocabulary that it lacks start at the mean of the others."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        args, weights = saved['model_args'], saved['model']
        config = {key: args[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias')}
    except Exception as error:  # damaged bytes make it fail in a dozen ways
        raise UserError(
            f"{path} is no ckpt.pt of nanoGPT's ({type(error).__name__}: {str(error)[:80]}); correct the "
            'path, or leave --tokenizer out, which our own checkpoints hold.'
        ) from error
    config.update(
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        ignore_id=tokenizer.ignore_id,
        norm='layer',
        position='learned',
        mlp='gelu',
        qk_norm=False,
        logit_softcap=0.0,
    )
    state = {}
    for name, weight in weights.items():
        state.update(ours(name.removeprefix('_orig_mod.').removeprefix('transformer.'), weight))
    known, rows = len(state['embedding.weight']), ModelConfig(**config).padded_vocab_size
    if known < tokenizer.vocab_size - len(SPECIAL_TOKENS):
        raise UserError(
            f'{path} has {known} tokens and the tokenizer {tokenizer.vocab_size}; give the one that it '
            'was trained with as --tokenizer.'
        )
    embedding = state['embedding.weight']
    state['embedding.weight'] = torch.cat([embedding, embedding.mean(0, True).expand(rows, -1)])[
        :rows
    ].clone()
    return {
        'architecture': 'ar',
        'model_config': config,
        'model_state_dict': state,
        'train_config': {},
        'tokenizer': tokenizer.to_json(),
        'start_token': tokenizer.endoftext_id,
        'prompt_format': None,
        'global_step': saved.get('iter_num', 0),
    }


def ours(name, weight):
    """[(our name, tensor)] for a tensor of nanoGPT's."""
    block = re.fullmatch(r'h\.(\d+)\.(.+)\.(weight|bias)', name)
    if block and block[2] == 'attn.c_attn':
        return [
            (f'blocks.{block[1]}.attention.{letter}.{block[3]}', part.clone())
            for letter, part in zip('qkv', weight.chunk(3))
        ]
    if block and block[2] in NAMES:
        return [(f'blocks.{block[1]}.{NAMES[block[2]]}.{block[3]}', weight)]
    if name == 'lm_head.weight' or name.endswith('attn.bias'):  # tied to wte; the mask of old versions
        return []
    return [
        ({'wte': 'embedding', 'wpe': 'positions', 'ln_f': 'norm'}.get(part, part) + '.' + kind, weight)
        for part, kind in [name.rsplit('.', 1)]
    ]
