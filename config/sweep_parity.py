# What is learnt from examples and what never is: a pattern in 20 bits, and the parity of 50, from scratch.
#   python sweep.py config/sweep_parity.py
experiment_name = 'parity'
base_args = {'model': 'tiny', 'pool': 'mean', 'test_set_size': 2000, 'log_every': 100}
base_args |= {'optimizer': 'muon', 'learning_rate': 6e-3, 'schedule': 'linear'}
base_args |= {'device': 'cpu', 'dtype': 'float32', 'no_wandb': True}
zipped = {
    'target_func': ['fn_c', 'fn_a'],
    'sequence_length': [20, 50],
    'train_set_size': [4000, 200],
    'batch_size': [50, 20],
    'num_epochs': [6, 80],
}
grid = {'seed': [1, 2, 3]}
