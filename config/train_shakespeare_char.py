# nanoGPT's baby GPT with ordinary attention (MHA) on the works of Shakespeare, one token per
# character; nanoGPT's own text is --dataset=shakespeare_tiny (README). It takes minutes on one GPU.

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000
eval_interval = 250
eval_iters = 200
log_interval = 10

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
