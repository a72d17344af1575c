# Books by 8192 tokens of BPE on a CPU: two minutes on two cores.
#   python prepare/text.py --input=books.jsonl --name=books
dataset = 'books'
model_size = 'tiny'
block_size = 128
batch_size = 32
optimizer = 'muon'
learning_rate = 6e-3
schedule = 'linear'
max_steps = 600
eval_every = 300
eval_batches = 20
log_every = 20
