"""Prepare instruction data: prompts to be read, answers to be learned.

    $ python prepare/instruct.py --source=alpaca_1k.json --name=alpaca --tokenizer=out/base/ckpt.pt
    $ python prepare/instruct.py --source=dolly --tokenizer=gpt2 --prompt_format=chatml
    $ python prepare/instruct.py --source=stories --name=story_requests --vocab_size=1536

Records of Alpaca (instruction, input, output), Dolly (context, response), prompt and completion, `messages`,
ShareGPT's `conversations`, or plain text (--field=text). Fields that were not read are counted and named. Or requests
for stories of prepare/grammar.py, and these; the validation split has pairs of choices that training has not.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lm import prompts
from lm.configurator import check_choice, check_range, configure, require
from lm.records import READERS, suffix_of
from prepare import grammar, story_tasks
from prepare.examples import Document, Examples, conversation, unread_of
from prepare.readers import Source, files, hub
from prepare.writer import model_at, write

source = ''  # alpaca, dolly, stories, a data set of the Hugging Face hub, or files: .json, .jsonl, .parquet
field = ''  # of records that are plain text: the field that holds it
prompt_format = ''  # default, alpaca, qa, chatml, llama3; empty: of the tokenizer's model, or default
max_seq_len: int = None  # tokens of the longest example; None: what the tokenizer's model reads, at most 1024
max_examples = 0  # the first ones only; 0: all, of stories 20,000
name = ''  # of the folder under data/; the source's if not given
output_dir = ''  # a path to write to instead
tokenizer = 'bpe'  # a checkpoint or the path of a tokenizer.json or its folder; or char, bytes, gpt2, bpe
vocab_size = 8192  # of a bpe, the three special tokens included
tokenizer_sample_mb = 100.0  # megabytes of the training text, from its start, that a bpe is trained on
val_fraction = 0.1  # share of the examples for validation, by hash
num_workers = 0  # processes that encode; 0 is one per core
on_error = 'stop'  # or skip: leave out, and count, what cannot be read
overwrite = False  # replace a finished folder that was prepared otherwise
config = configure(globals())

HUB = {'alpaca': 'tatsu-lab/alpaca', 'dolly': 'databricks/databricks-dolly-15k'}


def document(record, where):
    example, read = conversation(record, where, field)
    unread = example.pop('unread', []) + unread_of(record, read)
    text = Document(json.dumps(example, ensure_ascii=False))
    text.unread = unread
    return text


def told(done=0, state=None):
    """Yield requests and the stories that they ask for, from the number `done` on."""
    for number, story in enumerate(grammar.stories(max_examples, 0, done), done):
        asked, part = story_tasks.request_for(story, number)
        text = Document(json.dumps({'turns': [[asked, '', story]]}))
        text.part = part
        yield text, 1


if __name__ == '__main__':
    check_range(config, 0, math.inf, 'max_examples')
    require(source, 'There is nothing to read: give --source=alpaca, dolly, FILE.json, or a hub id.')
    if prompt_format:
        check_choice(config, 'prompt_format', prompts.FORMATS)
    _, block_size, own_format = model_at(tokenizer)
    form = prompts.FORMATS.get(prompt_format) or own_format or prompts.DEFAULT
    config['prompt_format'] = next((name for name, known in prompts.FORMATS.items() if known == form), form)
    config['max_seq_len'] = min(block_size or 1024, 1024) if max_seq_len is None else max_seq_len
    check_range(config, 8, math.inf, 'max_seq_len')
    config['name'] = name or Path(source.partition(',')[0]).stem.partition(':')[0]

    path = HUB.get(source, source)
    if source == 'stories':
        idle = sorted(config.given & {'val_fraction', 'field', 'on_error'})
        require(not idle, f'{" and ".join(idle)} has no effect on stories; leave it out.')
        config['max_examples'] = max_examples = max_examples or 20_000
        records = Source(story_tasks.SOURCE, told, story_tasks.VERSION, max_examples, ' examples')
    elif suffix_of(Path(path)) in READERS or path.count('/') != 1 or Path(path).exists():
        records = files(path, field, '', document)
    else:
        path, _, subset = path.partition(':')
        config['hub'] = subset and source  # recorded, because the parts of a data set share its revision
        records = hub(path, subset or None, field, document)
    records.limit = max_examples or None
    records.examples = Examples(form, config['max_seq_len'], on_error)
    write(records, config)
