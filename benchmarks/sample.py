"""How fast does a model write here, and in a clone of nanoGPT, on the CPU?

    python benchmarks/sample.py --peer=nanoGPT                          # five minutes on two idle cores

nanoGPT's sampling loop computes the whole text anew for each token; ours, with its very weights, keeps a cache.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks.timing import CPU, compare_rates, describe_machine, finish, load_nanogpt
from lm import checkpoints, pretrained, runtime
from lm.configurator import check_range, configure
from lm.runtime import seconds
from sampling import generate

peer = ''  # path of a clone of nanoGPT, which is only read
runs = 5  # pairs of runs
new_tokens = 512  # tokens generated
block_size = 1024
config = configure(globals())

SHAPES = {  # the second is nanoGPT's for a GPU
    '0.8M': dict(n_layer=4, n_head=4, n_embd=128, vocab_size=65, block_size=block_size),
    '10M': dict(n_layer=6, n_head=6, n_embd=384, vocab_size=65, block_size=block_size),
}
GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0.0)
OPTIONS = dict(temperature=0.8, top_k=200)  # the defaults of nanoGPT's sample.py


def with_weights_of(theirs, shape):
    """Return our model with the weights of nanoGPT's; its padding rows are never drawn."""
    rows = len(theirs.transformer['wte'].weight)
    ours = checkpoints.make_model('ar', **shape, **GPT2, pretrained_rows=rows).eval()
    tensors = pretrained.gpt2_layout(theirs.state_dict())
    ours.load_state_dict(pretrained.load_state_dict(tensors, 'gpt2', type(ours), ours.config, 'the peer'))
    return ours


def main():
    check_range(config, 1, math.inf, 'runs')
    check_range(config, 64, block_size, 'new_tokens')
    module, start, targets = load_nanogpt(peer), torch.zeros(1, 1, dtype=torch.long), []
    runtime.Runtime('cpu', 'float32')  # as each script of ours starts: what it sets for the machine counts
    describe_machine()
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        theirs = module.GPT(module.GPTConfig(**shape, dropout=0.0)).eval()
        ours = with_weights_of(theirs, shape)
        greedy = zip(theirs.generate(start, 64, top_k=1)[0], generate(ours, [[0]], 64, temperature=0)[0])
        same = sum(int(a) == b for a, b in greedy) / 65
        sides = {
            'nanoGPT': partial(seconds, partial(theirs.generate, start, new_tokens, **OPTIONS), CPU),
            'ours': partial(seconds, partial(generate, ours, [[0]], new_tokens, **OPTIONS), CPU),
        }
        ratio = compare_rates(name, sides, new_tokens, runs)
        targets.append((f"{name}: share of greedy tokens equal to nanoGPT's", same, '>=', 1.0))
        targets.append((f"{name}: our tokens/s / nanoGPT's, median of {runs}", ratio, '>=', 8.0))
    finish(targets)


if __name__ == '__main__':
    main()
