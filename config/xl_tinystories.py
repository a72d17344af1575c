# A xl model (300M at a 32k vocabulary) on TinyStories, for one GPU.
dataset = 'tinystories'
model_size = 'xl'
block_size = 512
batch_size = 16
gradient_accumulation_steps = 4
gradient_checkpointing = True
learning_rate = 4e-4
min_lr = 4e-4 / 10
warmup_steps = 500
max_steps = 20000
eval_every = 500
eval_batches = 100
sample_every = 500
