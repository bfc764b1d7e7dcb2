# The question of compare_shakespeare.py at 10 million parameters and 256 tokens of context: MHA
# beside a rotary latent whose cache is 8 and 16 times smaller. About 35 minutes on two CPU cores
# with bfloat16 instructions.
#
#     python -m tools.compare config/compare_shakespeare_10m.py

out_dir = "out-compare-10m"
dataset = "shakespeare_char"
variants = """
MHA
rotary latent 8x: use_mla=True mla_rope=latent mla_latent_dim=96
rotary latent 16x: use_mla=True mla_rope=latent mla_latent_dim=48
"""
lr_factors = (0.5, 1.0, 1.6)
equal_parameters = False

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
pos_emb = "rope"

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 250
eval_interval = 125
eval_iters = 5
log_interval = 10

optimizer = "muon"
muon_learning_rate = 0.01
learning_rate = 6e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 30
