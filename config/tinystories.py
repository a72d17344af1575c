# What all sizes share on TinyStories, for one GPU.
dataset = 'tinystories'
block_size = 512
warmup_steps = 500
eval_every = 500
eval_tokens = 1_600_000
sample_every = 500
