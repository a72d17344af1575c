# A medium model (50M at a 32k vocabulary) on OpenWebText, for one or more GPUs.
dataset = 'openwebtext'
model_size = 'medium'
block_size = 1024
batch_size = 32
gradient_accumulation_steps = 2
dtype = 'bfloat16'
learning_rate = 8e-4
min_lr = 8e-4 / 10
warmup_steps = 2000
max_steps = 80000
eval_every = 1000
eval_batches = 40
save_every = 1000
sample_every = 5000
