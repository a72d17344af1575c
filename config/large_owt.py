# A large model on OpenWebText, 113.1M parameters at a 32k vocabulary.
include('owt.py')
model_size = 'large'
batch_size, gradient_accumulation_steps = 16, 8
learning_rate, min_lr = 6e-4, 6e-4 / 10
max_steps = 100000
