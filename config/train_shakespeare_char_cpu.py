# The settings for a CPU from nanoGPT's README: ordinary attention (MHA), AdamW, float32, on the
# works of Shakespeare. train_mla.py is compared with this run on tiny Shakespeare, nanoGPT's text:
# --dataset=shakespeare_tiny (README).

out_dir = "out-shakespeare-char-cpu"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
eval_interval = 250
eval_iters = 20
log_interval = 10

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
dtype = "float32"
