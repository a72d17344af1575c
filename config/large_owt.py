# A large model on OpenWebText, 109.5M parameters at a 32k vocabulary.
include('owt.py')
model_size = 'large'
batch_size = 16
gradient_accumulation_steps = 8
learning_rate = 6e-4
min_lr = learning_rate / 10
max_steps = 100000
