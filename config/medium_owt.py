# A medium model on OpenWebText, 42.6M parameters at a 32k vocabulary.
include('owt.py')
model_size = 'medium'
batch_size, gradient_accumulation_steps = 32, 2
learning_rate, min_lr = 8e-4, 8e-4 / 10
max_steps = 80000
