#!/usr/bin/env python3
"""Writes the checkpoints of tests/families: tiny models of every family, and what transformers makes of them.

Each folder has what `save_pretrained` wrote (config.json, model.safetensors, in bf16) and golden.safetensors: a prompt, the
64 tokens that are most likely behind it, by how much each is ahead of the next best, and the logits at some positions, all computed
in f32 without a cache; and the same logits computed in bf16. Weights are drawn from the model's name, few levels each, so that they pack well.

    scripts/families.py [NAME...]      with torch 2.8.0 and transformers 5.24.0 (`make families`)
"""

import math
import pathlib
import sys
import zlib

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "families"
NEW_TOKENS = 64
EVERY = 8  # positions from one whose logits are kept to the next

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
SLIDING, FULL = "sliding_attention", "full_attention"

MODELS = {
    "llama-linear": ("llama", dict(
        attention_bias=True, mlp_bias=True, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "llama-dynamic": ("llama", dict(
        hidden_size=40, num_attention_heads=2, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))),
    "llama-yarn": ("llama", dict(
        vocab_size=71, hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=32, attention_bias=True,
        rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=32,
                             beta_fast=8.0, beta_slow=0.5))),
    "llama-llama3": ("llama", dict(
        hidden_size=48, num_attention_heads=6, num_hidden_layers=3, mlp_bias=True,
        rope_parameters=dict(rope_type="llama3", factor=8.0, rope_theta=5e5, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=32))),
    "mistral-window": ("mistral", dict(sliding_window=7)),
    "mistral-full": ("mistral", dict(
        sliding_window=None, head_dim=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3,
        tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2-full": ("qwen2", dict(hidden_size=64, head_dim=None, vocab_size=90)),
    "qwen2-window": ("qwen2", dict(
        num_attention_heads=2, num_key_value_heads=1, head_dim=None, num_hidden_layers=3, use_sliding_window=True, sliding_window=9, max_window_layers=1,
        tie_word_embeddings=True)),
    "qwen3-full": ("qwen3", dict(head_dim=32, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3-window": ("qwen3", dict(
        hidden_size=36, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=3, attention_bias=True, tie_word_embeddings=True,
        use_sliding_window=True, sliding_window=5, max_window_layers=2,
        rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1e4, original_max_position_embeddings=64))),
    "gemma-many": ("gemma", dict(head_dim=16)),
    "gemma-one": ("gemma", dict(head_dim=32, num_key_value_heads=1, num_hidden_layers=3, vocab_size=73)),
    "gemma2-caps": ("gemma2", dict(
        num_hidden_layers=4, sliding_window=8, query_pre_attn_scalar=24, attn_logit_softcapping=3.0,
        final_logit_softcapping=6.0)),
    "gemma2-plain": ("gemma2", dict(
        num_hidden_layers=3, sliding_window=11, query_pre_attn_scalar=16, attn_logit_softcapping=None,
        final_logit_softcapping=None, num_attention_heads=2, head_dim=32)),
    "gemma3-pattern": ("gemma3_text", dict(
        num_hidden_layers=5, sliding_window=6, query_pre_attn_scalar=20, layer_types=[SLIDING, SLIDING, FULL, SLIDING, SLIDING],
        rope_parameters={FULL: dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                         SLIDING: dict(rope_type="default", rope_theta=1e4)})),
    "gemma3-default": ("gemma3_text", dict(
        num_hidden_layers=7, sliding_window=9, num_attention_heads=3, num_key_value_heads=1, head_dim=32, hidden_size=24,
        intermediate_size=40, final_logit_softcapping=8.0, vocab_size=67)),
    "phi3-window": ("phi3", dict(num_attention_heads=2, head_dim=None, sliding_window=9)),
    "phi3-long": ("phi3", dict(
        hidden_size=64, head_dim=None, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        original_max_position_embeddings=16,
        rope_parameters=dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75,
                             original_max_position_embeddings=16,
                             short_factor=[1.0 + i / 16 for i in range(12)],
                             long_factor=[1.5 + i / 4 for i in range(12)]))),
    "smollm3-default": ("smollm3", dict(
        num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1, head_dim=None)),
    "smollm3-window": ("smollm3", dict(
        num_hidden_layers=4, hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=None, no_rope_layers=[1, 0, 0, 1], use_sliding_window=True,
        sliding_window=6, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "olmo2-many": ("olmo2", dict(
        num_attention_heads=2, head_dim=None, rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "olmo2-few": ("olmo2", dict(
        hidden_size=64, head_dim=None, attention_bias=True,
        vocab_size=61)),
    "mixtral-two": ("mixtral", dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=None)),
    "mixtral-one": ("mixtral", dict(
        num_local_experts=8, num_experts_per_tok=1, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, intermediate_size=40, sliding_window=9, tie_word_embeddings=True)),
    "qwen2moe-norm": ("qwen2_moe", dict(
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40,
        norm_topk_prob=True, hidden_size=64, head_dim=None)),
    "qwen2moe-window": ("qwen2_moe", dict(
        num_experts=5, num_experts_per_tok=3, moe_intermediate_size=32, shared_expert_intermediate_size=16,
        norm_topk_prob=False, num_hidden_layers=4, qkv_bias=False, use_sliding_window=True, sliding_window=7, max_window_layers=3,
        head_dim=None, num_attention_heads=2, num_key_value_heads=1, vocab_size=70)),
    "qwen3moe-norm": ("qwen3_moe", dict(
        num_experts=12, num_experts_per_tok=4, moe_intermediate_size=24, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[])),
    "qwen3moe-plain": ("qwen3_moe", dict(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=False, num_hidden_layers=3,
        attention_bias=True, hidden_size=48, vocab_size=70)),
    "gpt-oss-sinks": ("gpt_oss", dict(
        num_local_experts=6, num_experts_per_tok=2, sliding_window=8, num_hidden_layers=4, head_dim=64,
        num_attention_heads=4, num_key_value_heads=1,
        rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1.5e5, beta_fast=32.0, beta_slow=1.0, truncate=False,
                             original_max_position_embeddings=32))),
    "gpt-oss-many": ("gpt_oss", dict(
        num_local_experts=9, num_experts_per_tok=4, sliding_window=16, num_hidden_layers=3, hidden_size=48,
        intermediate_size=40, vocab_size=68, rope_parameters=dict(rope_type="default", rope_theta=1e4))),
}


def levels(shape, deviation, generator):
    """Values of 9 levels around 0: exact in bf16."""
    step = 2.0 ** round(math.log2(deviation / 2.58))
    return torch.randint(-4, 5, shape, generator=generator).float() * step


def draw(name, model):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    plus_one = model.config.model_type.startswith("gemma")
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            shape = parameter.shape
            if "norm" in key:
                parameter.copy_(levels(shape, 0.15, generator) + (0.0 if plus_one else 1.0))
            elif key.endswith("bias") or key.endswith("sinks"):
                parameter.copy_(levels(shape, 0.3, generator))
            elif "embed_tokens" in key:
                # Tied, a large one would only repeat its token.
                parameter.copy_(levels(shape, (0.2 if tied else 1.0) * (shape[1] ** -0.5 if plus_one else 1.0), generator))
            elif "lm_head" in key:
                parameter.copy_(levels(shape, 0.5, generator))
            else:
                parameter.copy_(levels(shape, 1.4 * shape[-1] ** -0.5, generator))


def greedy(model, prompt):
    tokens, margins = list(prompt), []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            best = torch.topk(logits, 2).values
            margins.append((best[0] - best[1]).item())
            tokens.append(int(torch.argmax(logits)))
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return tokens[len(prompt):], margins, logits


def write(name):
    model_type, changes = MODELS[name]
    sizes = {key: value for key, value in {**SIZES, **changes}.items() if not (key == "head_dim" and value is None)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    draw(name, model)
    generator = torch.Generator().manual_seed(1 + zlib.crc32(name.encode()))
    prompt = [1] + torch.randint(3, config.vocab_size, (22,), generator=generator).tolist()
    tokens, margins, logits = greedy(model, prompt)
    folder = FOLDER / name
    model.to(torch.bfloat16).save_pretrained(folder)
    # As it is loaded: frequencies stay f32.
    rounded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        in_bf16 = rounded(torch.tensor([prompt + tokens]), use_cache=False).logits[0].float()
    (folder / "generation_config.json").unlink(missing_ok=True)
    golden = dict(prompt=torch.tensor(prompt, dtype=torch.int32), tokens=torch.tensor(tokens, dtype=torch.int32),
                  margins=torch.tensor(margins), logits=logits[EVERY - 1::EVERY].contiguous(),
                  logits_bf16=in_bf16[EVERY - 1::EVERY].contiguous())
    save_file(golden, folder / "golden.safetensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    spread = len(set(tokens))
    print(f"{name}: {size / 1024:.0f} KiB, {spread} different tokens, smallest margin {min(margins):.1e}", flush=True)


def main():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MODELS:
        write(name)


if __name__ == "__main__":
    main()
