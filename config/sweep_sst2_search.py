# Which settings suit SST-2, from scratch and from models pretrained on books: the same random draws for all,
# judged on the dev set alone. The best ones are in config/sweep_sst2.py, which says how to pretrain.
#   python sweep.py config/sweep_sst2_search.py --jobs=2
include('sweep_sst2.py')
experiment_name = 'sst2-search'
base_args = {**base_args, 'seed': 0}
zipped = {
    'architecture': ['ar'] * 4 + ['diffusion'] * 4,
    'n_layer': [1, 1, None, None] * 2,  # from scratch a smaller model may be the better one
    'n_embd': [64, 128, None, None] * 2,
    'n_head': [2, 4, None, None] * 2,
    'vocab_size': [8192, 8192, 8192, None] * 2,
    'init_from': [None, None, None, 'out/plain-ar', None, None, None, 'out/plain-diffusion'],
}
grid = {}
sampled = {
    'learning_rate': (3e-4, 3e-3, 'log'),
    'num_epochs': (3, 8),
    'token_dropout': (0.1, 0.6),
    'dropout': [0.0, 0.2],
    'weight_decay': (0.01, 1.0, 'log'),
    'label_smoothing': [0.0, 0.1],
}
num_trials = 10
show = 'train.accuracy,val.loss,val.accuracy'
