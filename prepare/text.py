"""Prepare your own text: .txt (a file is one document), .jsonl (.gz, .zst), .json (a list of records), .parquet.

$ python prepare/text.py --input=books.jsonl --name=books
$ python prepare/text.py --input='notes/*.txt,diary.txt' --name=notes --tokenizer=char
$ python prepare/text.py --hub=HuggingFaceFW/fineweb-edu:sample-10BT --name=fineweb --val_fraction=0.0005
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lm.configurator import configure, require
from prepare import readers
from prepare.writer import write

input = ''  # files, folders or globs, with commas between them
hub = ''  # a data set of the Hugging Face hub in place of files, with :SUBSET where it has several
field = 'text'  # the field of a record that holds its text
name = ''  # of the folder under data/
output_dir = ''  # a path to write to instead
tokenizer = 'bpe'  # char, bytes, gpt2, bpe, or the path of a tokenizer.json or a prepared folder
vocab_size = 8192  # of a bpe, the three special tokens included
tokenizer_sample_mb = 100.0  # megabytes of the training text, from its start, that a bpe is trained on
max_seq_len = 0  # recorded: the block size that training takes when none is given; 0: none
val_fraction = 0.1  # share of documents for validation; of a single document its last characters
num_workers = 0  # processes that encode; 0 is one per core
on_error = 'stop'  # or skip: leave out, and count, what cannot be read
overwrite = False  # replace a finished folder that was prepared otherwise
config = configure(globals())

if __name__ == '__main__':
    path, _, subset = hub.partition(':')
    require(not (hub and input), f'hub={hub} stands in place of input={input}; give one of them.')
    write(readers.hub(path, subset or None, field) if hub else readers.files(input, field), config)
