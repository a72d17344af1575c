# SST-2 from scratch, and from models pretrained on books, over three seeds; the dev set chooses the weights.
#   python prepare/text.py --input=books.jsonl --name=books --tokenizer=bpe --vocab_size=8192
#   python train.py config/books.py --out_dir=out/books-ar --max_steps=3000
#   python train.py config/books.py --out_dir=out/books-diffusion --max_steps=3000 --architecture=diffusion
#   python sweep.py config/sweep_sst2.py
experiment_name = 'sst2'
base_args = {'task': 'sentiment', 'train_langs': 'eng', 'pool': 'mean', 'block_size': 64, 'batch_size': 32,
             'dropout': 0.3, 'weight_decay': 0.1, 'warmup_ratio': 0.1, 'schedule': 'linear', 'best_by': 'accuracy',
             'eval_batches': 4, 'log_every': 100, 'device': 'cpu', 'dtype': 'float32', 'no_wandb': True}
zipped = {'architecture': ['ar', 'diffusion', 'ar', 'diffusion'],
          'init_from': [None, None, 'out/books-ar', 'out/books-diffusion'],
          'vocab_size': [8192, 8192, None, None],  # from scratch the tokenizer is trained on the training texts
          'num_epochs': [6, 6, 3, 3], 'learning_rate': [5e-4, 5e-4, 3e-4, 3e-4]}
grid = {'seed': [1, 2, 3]}
metric = 'val.accuracy'
show = 'train.accuracy,val.accuracy,eng.accuracy'
