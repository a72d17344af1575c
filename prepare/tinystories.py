"""Prepare TinyStories (Eldan and Li 2023), two million short stories in the words of small children.

    $ python prepare/tinystories.py                                      # streamed from the hub
    $ python prepare/tinystories.py --input=TinyStoriesV2-GPT4-train.txt # or from files of your own

The validation split is ours, by a hash of each story, not the hub's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lm.configurator import configure
from prepare.readers import files, hub
from prepare.writer import write

input = ''  # files, folders or globs, with commas between them; the hub if not given
field = 'text'  # the field of a record that holds its text
name = 'tinystories'  # of the folder under data/
output_dir = ''  # a path to write to instead
tokenizer = 'bpe'  # char, bytes, gpt2, bpe, or the path of a tokenizer.json or a prepared folder
vocab_size = 8192  # of a bpe, the three special tokens included
tokenizer_sample_mb = 100.0  # megabytes of the training text, from its start, that a bpe is trained on
max_seq_len = 512  # recorded: the block size that training takes when none is given; cuts nothing
val_fraction = 0.01  # share of the stories for validation, by hash
num_workers = 0  # processes that encode; 0 is one per core
on_error = 'stop'  # or skip: leave out, and count, what cannot be read
overwrite = False  # replace a finished folder that was prepared otherwise
config = configure(globals())

if __name__ == '__main__':
    end = '<|endoftext|>'  # between the stories of the data set's .txt files
    write(files(input, field, end) if input else hub('roneneldan/TinyStories', None, field), config)
