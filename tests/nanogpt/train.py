"""A stand-in for nanoGPT's train.py: it prints what that prints, and leaves an untrained checkpoint."""

import os
import pickle
import sys

import torch

from model import GPT, GPTConfig

settings = dict(word[2:].split('=') for word in sys.argv[2:])
with open('data/shakespeare_char/meta.pkl', 'rb') as file:
    vocab_size = pickle.load(file)['vocab_size']
shape = {key: int(settings[key]) for key in ('n_layer', 'n_head', 'n_embd', 'block_size')}
args = dict(**shape, vocab_size=vocab_size, bias=False, dropout=0.0)
print('step 0: train loss 4.2000, val loss 4.2000')
for step in range(0, int(settings['max_iters']) + 1, int(settings['log_interval'])):
    print(f'iter {step}: loss 4.2000, time 1.00ms, mfu -100.00%')
torch.manual_seed(0)
os.makedirs('out-shakespeare-char', exist_ok=True)
torch.save({'model': GPT(GPTConfig(**args)).state_dict(), 'model_args': args}, 'out-shakespeare-char/ckpt.pt')
