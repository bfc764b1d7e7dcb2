# Claims about quality: MLA, GQA and MQA beside MHA, and the loss over the latent's width. The
# widths are those of the claims by their share of the model's width, here 128: 128 to 2,048 of
# 5,120 are 1/40 to 2/5, or 3 to 51, and 1/32 of nh * hs is 4. A rotary key of 16 numbers is cached
# beside each. See docs/claims.md.
#
#     python -m tools.compare config/claims_size.py

title = "Claims: size"
lr_factors = (0.5, 1.0, 2.0)
seeds = 2
equal_parameters = False
decode_context = 0

variants = """
MHA
GQA
MQA
L=3: use_mla=True mla_latent_dim=3 mla_rope_dim=16
L=4: use_mla=True mla_latent_dim=4 mla_rope_dim=16
L=6: use_mla=True mla_latent_dim=6 mla_rope_dim=16
L=13: use_mla=True mla_latent_dim=13 mla_rope_dim=16
L=26: use_mla=True mla_latent_dim=26 mla_rope_dim=16
L=51: use_mla=True mla_latent_dim=51 mla_rope_dim=16
"""

dataset = "shakespeare_char"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
pos_emb = "rope"

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 300
eval_interval = 150
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
