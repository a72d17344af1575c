"""Prepare a sample of FineWeb or FineWeb-Edu (Penedo et al. 2024): filtered web pages, billions of tokens.

$ python prepare/fineweb.py --subset=edu-sample-10BT --num_workers=8 # streamed from the hub
$ python prepare/fineweb.py --input='sample/10BT/*.parquet'          # or from files of your own
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lm.configurator import check_choice, configure
from prepare.readers import files, hub
from prepare.writer import write

subset = 'sample-10BT'  # sample-10BT, -100BT or -350BT (billions of tokens), or edu- before these
input = ''  # files, folders or globs, with commas between them; the hub if not given
field = 'text'  # the field of a record that holds its text
name = ''  # of the folder under data/; fineweb-SUBSET if not given
output_dir = ''  # a path to write to instead
tokenizer = 'bpe'  # char, bytes, gpt2, bpe, or the path of a tokenizer.json or a prepared folder
vocab_size = 32000  # of a bpe, the three special tokens included
tokenizer_sample_mb = 100  # megabytes of the training text, from its start, that a bpe is trained on
max_seq_len = 1024  # recorded: the block size that training takes when none is given; cuts nothing
val_fraction = 0.0005  # share of the pages for validation, by hash
num_workers = 0  # processes that encode; 0 is one per core
on_error = 'stop'  # or skip: leave out, and count, what cannot be read
overwrite = False  # replace a finished folder that was prepared otherwise
config = configure(globals())

SUBSETS = [prefix + f'sample-{size}BT' for prefix in ('', 'edu-') for size in (10, 100, 350)]

if __name__ == '__main__':
    check_choice(config, 'subset', SUBSETS)
    config['name'] = name or f'fineweb-{subset}'
    path = 'HuggingFaceFW/fineweb' + '-edu' * subset.startswith('edu-')
    write(files(input, field) if input else hub(path, subset.removeprefix('edu-'), field), config)
