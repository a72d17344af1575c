# What all sizes share on TinyStories, for one GPU.
dataset = 'tinystories'
block_size = 512
warmup_steps = 500
eval_every = 500
eval_batches = 100
sample_every = 500
