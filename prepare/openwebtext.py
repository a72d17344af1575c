"""Prepare OpenWebText (Gokaslan and Cohen 2019), eight million pages, about nine billion GPT-2 tokens.

$ python prepare/openwebtext.py --vocab_size=32000 --num_workers=8   # streamed from the hub
$ python prepare/openwebtext.py --tokenizer=gpt2 --input=openwebtext # or from a folder of files
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lm.configurator import configure
from prepare.readers import files, hub
from prepare.writer import write

input = ''  # files, folders or globs, with commas between them; the hub if not given
field = 'text'  # the field of a record that holds its text
name = 'openwebtext'  # of the folder under data/
output_dir = ''  # a path to write to instead
tokenizer = 'bpe'  # char, bytes, gpt2, bpe, or the path of a tokenizer.json or a prepared folder
vocab_size = 32000  # of a bpe, the three special tokens included
tokenizer_sample_mb = 100.0  # megabytes of the training text, from its start, that a bpe is trained on
max_seq_len = 1024  # recorded: the block size that training takes when none is given; cuts nothing
val_fraction = 0.0005  # share of the pages for validation, by hash: four million tokens, as in nanoGPT
num_workers = 0  # processes that encode; 0 is one per core
on_error = 'stop'  # or skip: leave out, and count, what cannot be read
overwrite = False  # replace a finished folder that was prepared otherwise
config = configure(globals())

if __name__ == '__main__':
    write(files(input, field) if input else hub('Skylion007/openwebtext', None, field), config)
