# Books by 8192 tokens of BPE on a CPU: nine minutes on two cores with AVX2.
#   python prepare/text.py --input=books.jsonl --name=books
include('stories.py')
dataset = 'books'
mode = 'packed'
block_size = 128
batch_size = 32
learning_rate = 6e-3
max_steps = 600
decay_embedding = False
