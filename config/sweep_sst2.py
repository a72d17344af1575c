# SST-2 from scratch, and from models pretrained on books, over three seeds; both know the same words. The settings are
# the best of ten random draws by the dev set; the weights are the last, not those of a lucky evaluation.
#   python classify.py --task=sentiment --train_langs=eng --vocab_size=8192 --max_steps=1 --out_dir=out/sst2-words
#   sed -E "s/[“”]//g; s/[‘’]/'/g; s/([,.;:!?])/ \1/g; s/(n't|'(s|m|d|ll|re|ve))\b/ \1/g" books.jsonl | tr A-Z a-z > plain.jsonl
#   python prepare/text.py --input=plain.jsonl --name=books-plain --tokenizer=out/sst2-words
#   python train.py config/books.py --dataset=books-plain --max_steps=5000 --block_size=64 --batch_size=64 \
#       --eval_every=1000 --out_dir=out/plain-ar
#   the same with --architecture=diffusion --out_dir=out/plain-diffusion
#   python sweep.py config/sweep_sst2.py --jobs=2
experiment_name = 'sst2'
base_args = {'task': 'sentiment', 'train_langs': 'eng', 'pool': 'mean', 'block_size': 64, 'batch_size': 64}
base_args |= {'warmup_ratio': 0.1, 'schedule': 'linear', 'label_smoothing': 0.1}
base_args |= {'eval_every': 10**6, 'eval_examples': 1024, 'log_every': 100, 'device': 'cpu', 'no_wandb': True}
zipped = {
    'architecture': ['ar'] * 3 + ['diffusion'] * 3,
    'n_layer': [1, None, None] * 2,  # None: 4, as the pretrained ones have
    'n_embd': [64, None, None] * 2,
    'n_head': [2, None, None] * 2,
    'init_from': [None, None, 'out/plain-ar', None, None, 'out/plain-diffusion'],
    'vocab_size': [8192, 8192, None] * 2,  # of the tokenizer, which is learned from the training texts
    'learning_rate': [0.001539, 0.0006775, 0.0006775, 0.0006775, 0.002786, 0.00225],
    'num_epochs': [8, 5, 5, 5, 5, 6],
    'token_dropout': [0.4126, 0.4054, 0.4054, 0.4054, 0.3917, 0.1545],
    'dropout': [0.2, 0.0, 0.0, 0.0, 0.0, 0.2],
    'weight_decay': [0.453, 0.8575, 0.8575, 0.8575, 0.1022, 0.2589],
}
grid = {'seed': [1, 2, 3]}
metric = 'val.accuracy'
show = 'train.accuracy,val.accuracy,eng.accuracy'
