"""How fast does a model write here, beside nanoGPT and beside aaholmes/diffusion-llm, on the CPU?

python benchmarks/sample.py --peer=nanoGPT                          # five minutes on two idle cores
python benchmarks/sample.py --what=diffusion --peer=diffusion-llm

ar         nanoGPT's sampling loop, which computes the whole text for each token, and ours with its very weights
diffusion  the peer's sampler of masked diffusion and ours, the same shape, steps and rows
"""

import importlib
import math
import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks.timing import (
    Target,
    compare_rates,
    describe_machine,
    find_peer,
    finish,
    load_nanogpt,
    seconds,
)
from lm import checkpoints, pretrained, runtime
from lm.configurator import check_choice, check_range, configure
from sampling import generate

what = 'ar'  # ar, diffusion
peer = ''  # path of a clone, which is only read
runs = 5  # pairs of runs
new_tokens = 512  # ar: tokens generated
block_size = 1024  # ar
rows = 8  # diffusion: texts at once
length = 128  # diffusion: tokens of each
steps = 50  # diffusion: forward passes
config = configure(globals())

SHAPES = {  # the second is nanoGPT's for a GPU
    '0.8M': dict(n_layer=4, n_head=4, n_embd=128, vocab_size=65, block_size=block_size),
    '10M': dict(n_layer=6, n_head=6, n_embd=384, vocab_size=65, block_size=block_size),
}
GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0.0)
OPTIONS = dict(temperature=0.8, top_k=200)  # the defaults of nanoGPT's sample.py
VOCABULARY = 8192  # of diffusion-llm


def compare_ar():
    module, start, targets = load_nanogpt(peer), torch.zeros(1, 1, dtype=torch.long), []
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        theirs = module.GPT(module.GPTConfig(**shape, dropout=0.0)).eval()
        ours = with_weights_of(theirs, shape)
        greedy = zip(theirs.generate(start, 64, top_k=1)[0], generate(ours, [[0]], 64, temperature=0)[0])
        same = sum(int(a) == b for a, b in greedy) / 65
        sides = {
            'nanoGPT': lambda model=theirs: seconds(lambda: model.generate(start, new_tokens, **OPTIONS)),
            'ours': lambda model=ours: seconds(lambda: generate(model, [[0]], new_tokens, **OPTIONS)),
        }
        ratio = compare_rates(name, sides, new_tokens, runs)
        targets.append(Target(f"{name}: share of greedy tokens equal to nanoGPT's", same, '>=', 1.0))
        targets.append(Target(f"{name}: our tokens/s / nanoGPT's, median of {runs}", ratio, '>=', 8.0))
    return targets


def with_weights_of(theirs, shape):
    """Return our model with the weights of nanoGPT's; its padding rows are never drawn."""
    rows = len(theirs.transformer['wte'].weight)
    ours = checkpoints.make_model('ar', **shape, **GPT2, pretrained_rows=rows).eval()
    tensors = pretrained.gpt2_layout(theirs.state_dict())
    ours.load_state_dict(pretrained.load_state_dict(tensors, 'gpt2', type(ours), ours.config, 'the peer'))
    return ours


def compare_diffusion():
    find_peer(peer, 'src/core/diffusion.py', 'aaholmes/diffusion-llm')
    sys.path.append(str(Path(peer).resolve()))
    models, process = map(importlib.import_module, ('src.core.model', 'src.core.diffusion'))
    shape = models.MODEL_CONFIGS['tiny']
    torch.manual_seed(0)
    theirs = models.create_model('tiny', vocab_size=VOCABULARY, max_seq_len=length).eval()
    sampler = process.DiscreteDiffusion(vocab_size=VOCABULARY, mask_token_id=3)
    size = dict(n_layer=shape.n_layers, n_head=shape.n_heads, n_embd=shape.d_model)
    ours = checkpoints.make_model(
        'diffusion', **size, **GPT2, vocab_size=VOCABULARY, block_size=length, mask_id=3
    )
    peer_options, prompts = dict(num_steps=steps, device='cpu'), [[0]] * rows
    sides = {
        'diffusion-llm': lambda: seconds(lambda: sampler.sample(theirs, rows, length, **peer_options)),
        'ours': lambda: seconds(lambda: generate(ours, prompts, length - 1, steps=steps)),
    }
    ratio = compare_rates('masked diffusion', sides, rows * length, runs, warmup=1)
    return [Target(f"our tokens/s / diffusion-llm's, median of {runs}", ratio, '>=', 2.0)]


def main():
    check_choice(config, 'what', ('ar', 'diffusion'))
    check_range(config, 1, math.inf, 'runs', 'rows', 'steps')
    check_range(config, 2, math.inf, 'length')
    check_range(config, 64, block_size, 'new_tokens')
    runtime.Runtime('cpu', 'float32')  # as each script of ours starts: what it sets for the machine counts
    describe_machine()
    finish(compare_ar() if what == 'ar' else compare_diffusion())


if __name__ == '__main__':
    main()
