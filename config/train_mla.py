# The main example: MLA on the works of Shakespeare, one token per character. It takes less than a
# minute on two CPU cores, and runs on a GPU without further flags. The cache is a rotary latent of
# 32 numbers per token and layer; MHA of this width needs 256.

out_dir = "out-mla"
dataset = "shakespeare_char"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 64

pos_emb = "rope"
use_mla = True
mla_rope = "latent"
mla_latent_dim = 32

batch_size = 12  # sequences an iteration: one process and two make the same run
gradient_accumulation_steps = 1
max_iters = 950
eval_interval = 250
eval_iters = 20
log_interval = 25

optimizer = "muon"
muon_learning_rate = 0.007
learning_rate = 1e-2
min_lr = 5e-4
beta2 = 0.95
warmup_iters = 20
