# A small model on OpenWebText, 23.4M parameters at a 32k vocabulary.
include('owt.py')
model_size = 'small'
batch_size, gradient_accumulation_steps = 32, 2
learning_rate, min_lr = 1e-3, 1e-3 / 10
max_steps = 60000
