# GPT-2 fine-tuned on the works of Shakespeare in GPT-2 tokens, as nanoGPT does it on its own text:
# a low constant learning rate and few iterations. A GPU with more memory can train gpt2-medium,
# gpt2-large or gpt2-xl instead (--init_from=...); a small one, or a CPU, needs --block_size=64.
#   python data/shakespeare/prepare.py && python train.py config/finetune_shakespeare.py

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2"

batch_size = 1
gradient_accumulation_steps = 32  # 32,768 tokens per iteration
max_iters = 20

learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
log_interval = 1
