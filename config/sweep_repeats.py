# How often is text worth repeating, and for which kind of model? A sixteenth of a million to four million
# tokens of the books, one size, one constant rate: each evaluation, of averaged weights, is the end of a run of
# so many steps. Of 62,500 tokens an epoch is 30 steps: --eval_every=30 there. A run that overfits may be
# stopped; one that does not is made longer by
#   python train.py --resume_from=out/sweeps/repeats/RUN --max_steps=N
# In order:
#   python prepare/text.py --input=books.jsonl --name=books
#   python sweep.py config/sweep_repeats.py --jobs=2         # stop it, go on: what is finished stays
#   python benchmarks/study.py out/sweeps/repeats            # what it shows, in docs/study.csv and docs/study.svg
script = 'train.py'
experiment_name = 'repeats'
metric = 'best_val_loss'
base_args = {'dataset': 'books', 'block_size': 128, 'batch_size': 16, 'n_layer': 3, 'n_head': 3, 'n_embd': 96}
base_args |= {'optimizer': 'muon', 'learning_rate': 5e-3, 'schedule': 'constant', 'ema_decay': 0.998}
base_args |= {'warmup_steps': 49, 'max_steps': 2440, 'eval_every': 122, 'eval_tokens': 150_000}
base_args |= {'decay_embedding': True, 'no_wandb': True}  # as the first runs of docs/study.csv
zipped = {
    'architecture': ['ar', 'ar', 'ar', 'diffusion', 'diffusion', 'diffusion', 'diffusion', 'sdd'],
    'dropout': [0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.2, 0.0],
    'weight_decay': [0.1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.5, 0.1],
    'token_dropout': [None, None, 0.3, None, None, None, None, None],
    'block_length': [None, None, None, None, (4,), (4,), (4,), (4,)],
    'ar_weight': [None, None, None, None, None, 2.0, 2.0, 2.0],
    'p_belief': [None] * 7 + [((0.0, 0.5),)],
}
grid = {'unique_tokens': [62_500, 250_000, 1_000_000, 4_000_000], 'seed': [0]}
