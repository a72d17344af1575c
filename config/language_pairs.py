# Which language helps which: A+B→A, A+B→B, A→A, A→B, B→A, B→B, on texts as written and in phonemes.
#   python sweep.py config/language_pairs.py --submit=slurm --template=config/slurm.sh --dry_run
_a, _b = 'rus', 'pol'
_both = f'{_a},{_b}'
experiment_name = f'{_a}-{_b}-sentiment'
base_args = {'task': 'sentiment', 'tokenizer': 'tokenizers/{model_type}'}
base_args |= {'checkpoint_prefix': 'checkpoints', 'model_prefix': '{model_type}'}
base_args |= {'num_epochs': 2, 'batch_size': 32}
base_args |= {'learning_rate': 2.5e-5, 'warmup_ratio': 0.05, 'schedule': 'linear'}
zipped = {'train_langs': [_both, _both, _a, _a, _b, _b], 'eval_langs': [_a, _b, _a, _b, _a, _b]}
grid = {'model_type': ['normal', 'ipa']}
metric = f'{_a}.macro_f1'
