# A large model (125M at a 32k vocabulary) on OpenWebText, for one or more GPUs.
dataset = 'openwebtext'
model_size = 'large'
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 8
dtype = 'bfloat16'
learning_rate = 6e-4
min_lr = 6e-4 / 10
warmup_steps = 2000
max_steps = 100000
eval_every = 1000
eval_batches = 40
save_every = 1000
sample_every = 5000
