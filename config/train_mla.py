# MLA on Shakespeare, one token per character: about three minutes on two CPU cores, no flag needed on a GPU.
# The cache holds 48 numbers per token and layer where ordinary attention needs 256.

out_dir = "out-mla"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

pos_emb = "rope"  # rotary positions and MLA's decoupled rotary key learn fastest
use_mla = True
mla_latent_dim = 32
mla_rope_dim = 16

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 700
eval_interval = 100
eval_iters = 20
log_interval = 10

optimizer = "muon"
muon_learning_rate = 0.01
learning_rate = 3e-3
beta2 = 0.99
warmup_iters = 50
