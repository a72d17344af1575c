# A small model (25M at a 32k vocabulary) on TinyStories, for one GPU.
dataset = 'tinystories'
model_size = 'small'
block_size = 512
batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-3 / 10
warmup_steps = 500
max_steps = 10000
eval_every = 500
eval_batches = 100
sample_every = 500
