# Claims about what latent attention costs: parameters, cache, arithmetic, decoding speed, and
# throughput at equal memory. Nothing is trained. See docs/claims.md.

title = "Claims: costs"
measure = "costs decoding"
max_iters = 0
dataset = "shakespeare_char"

n_layer = 6
n_head = 12
n_embd = 768
block_size = 64
pos_emb = "rope"
decode_context = 1024
cache_budget = 256.0

# nh * hs / 2 is 384, nh * hs / 8 is 96, nh * hs / 32 is 24
variants = """
MHA
GQA 3 key/value heads: n_kv_head=3
MQA
MLA L=384: use_mla=True mla_latent_dim=384 pos_emb=learned
MLA L=384 r=32: use_mla=True mla_latent_dim=384 mla_rope_dim=32
MLA L=96: use_mla=True mla_latent_dim=96 pos_emb=learned
MLA L=96 low-rank queries: use_mla=True mla_latent_dim=96 mla_q_latent_dim=192 pos_emb=learned
MLA L=160 r=32: use_mla=True mla_latent_dim=160 mla_rope_dim=32
MLA rotary latent L=192: use_mla=True mla_rope=latent mla_latent_dim=192
64 latent tokens: use_latent_tokens=True n_latent_tokens=64 pos_emb=learned
"""
