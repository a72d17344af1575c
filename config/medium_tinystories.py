# A medium model (50M at a 32k vocabulary) on TinyStories, for one GPU.
dataset = 'tinystories'
model_size = 'medium'
block_size = 512
batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 8e-4
min_lr = 8e-4 / 10
warmup_steps = 500
max_steps = 15000
eval_every = 500
eval_batches = 100
sample_every = 500
