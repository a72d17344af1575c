# A large model (125M at a 32k vocabulary) on TinyStories, for one GPU.
dataset = 'tinystories'
model_size = 'large'
block_size = 512
batch_size = 32
gradient_accumulation_steps = 2
learning_rate = 6e-4
min_lr = 6e-4 / 10
warmup_steps = 500
max_steps = 20000
eval_every = 500
eval_batches = 100
sample_every = 500
