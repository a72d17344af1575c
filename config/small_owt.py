# A small model (25M at a 32k vocabulary) on OpenWebText, for one or more GPUs.
dataset = 'openwebtext'
model_size = 'small'
block_size = 1024
batch_size = 32
gradient_accumulation_steps = 2
dtype = 'bfloat16'
learning_rate = 1e-3
min_lr = 1e-3 / 10
warmup_steps = 2000
max_steps = 60000
eval_every = 1000
eval_batches = 40
save_every = 1000
sample_every = 5000
