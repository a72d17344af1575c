# A small model on OpenWebText, 22.9M parameters at a 32k vocabulary.
include('owt.py')
model_size = 'small'
batch_size = 32
gradient_accumulation_steps = 2
learning_rate = 1e-3
min_lr = learning_rate / 10
max_steps = 60000
