# Claims about the norm on the latent, one down-projection for all layers, rotary latents and latent
# tokens. What the model does not offer has scripts in experiments/. See docs/claims.md.
#
#     python -m tools.compare config/claims_norm.py

title = "Claims: norms, positions, initialisation"
lr_factors = (0.5, 1.0, 2.0)
seeds = 1
equal_parameters = False
decode_context = 4096

variants = """
MLA RMSNorm: use_mla=True mla_latent_dim=16 mla_rope_dim=16
MLA LayerNorm: use_mla=True mla_latent_dim=16 mla_rope_dim=16 mla_norm=layernorm
MLA no norm: use_mla=True mla_latent_dim=16 mla_rope_dim=16 mla_norm=none
MLA one down-projection: use_mla=True mla_latent_dim=16 mla_rope_dim=16 mla_share_latent=True
MLA rotary latent: use_mla=True mla_latent_dim=32 mla_rope=latent
MHA
16 latent tokens: use_latent_tokens=True n_latent_tokens=16 pos_emb=learned
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
