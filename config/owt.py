# What all sizes share on OpenWebText, for one or more GPUs.
dataset = 'openwebtext'
block_size = 1024
dtype = 'bfloat16'
warmup_steps = 2000
eval_every = 1000
eval_tokens = 650_000
sample_every = 5000
