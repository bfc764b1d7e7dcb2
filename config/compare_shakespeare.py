# Which attention? MHA, GQA, MQA, MLA (decoupled, rotary latent, with SVD) and latent tokens, all
# trained with one recipe: nanoGPT's CPU size with Muon and, where the attention allows it, rotary
# positions. MLA's caches are 8 times smaller than MHA's, the last variant's 16 times. About 20
# minutes on two CPU cores.
#
#     python -m tools.compare config/compare_shakespeare.py

out_dir = "out-compare"
dataset = "shakespeare_char"
variants = """
MHA, GQA, MQA, MLA decoupled, MLA rotary latent, MLA+SVD, latent tokens
rotary latent 16x: use_mla=True mla_rope=latent mla_latent_dim=16 n_head=8
"""

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
pos_emb = "rope"

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 400
eval_interval = 100
eval_iters = 10
log_interval = 10

optimizer = "muon"
muon_learning_rate = 0.01
learning_rate = 6e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 30
dtype = "float32"
eval_tokens = 65536
