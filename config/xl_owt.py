# An xl model on OpenWebText, 334.8M parameters at a 32k vocabulary.
include('owt.py')
model_size = 'xl'
batch_size = 16
gradient_accumulation_steps = 4
gradient_checkpointing = True
learning_rate = 4e-4
min_lr = learning_rate / 10
max_steps = 200000
