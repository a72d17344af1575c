# SST-2 from scratch, and from models pretrained on books, over three seeds; the dev set chooses the weights.
#   python prepare/text.py --input=books.jsonl --name=books --tokenizer=bpe --vocab_size=8192
#   python train.py config/books.py --out_dir=out/books-ar --max_steps=3000 --block_size=64 --batch_size=64
#   the same with --out_dir=out/books-diffusion --architecture=diffusion
#   python sweep.py config/sweep_sst2.py
experiment_name = 'sst2'
base_args = {'task': 'sentiment', 'train_langs': 'eng', 'pool': 'mean', 'block_size': 64, 'batch_size': 64,
             'dropout': 0.3, 'token_dropout': 0.3, 'weight_decay': 0.1, 'warmup_ratio': 0.1, 'schedule': 'linear',
             'num_epochs': 5, 'learning_rate': 5e-4, 'best_by': 'accuracy', 'eval_batches': 4, 'log_every': 100,
             'device': 'cpu', 'no_wandb': True}
zipped = {'architecture': ['ar', 'diffusion', 'ar', 'diffusion'],
          'init_from': [None, None, 'out/books-ar', 'out/books-diffusion'],
          'vocab_size': [8192, 8192, None, None]}  # from scratch the tokenizer is trained on the training texts
grid = {'seed': [1, 2, 3]}
metric = 'val.accuracy'
show = 'train.accuracy,val.accuracy,eng.accuracy'
