#!/usr/bin/env python3
"""Writes a Llama of a known shape with weights drawn from a seed: for timing, not for text. Needs numpy.

  scripts/draw_model.py 135m|1b FOLDER [--seed 0]
"""
import argparse, json, os, struct
import numpy as np

SHAPES = {  # hidden, inner, layers, query heads, KV heads, head_dim, vocabulary
    "135m": (576, 1536, 30, 9, 3, 64, 49152),  # SmolLM-135M's
    "1b": (2048, 8192, 16, 32, 8, 64, 128256),  # Llama-3.2-1B's
}


def tensors(hidden, inner, layers, q_heads, kv_heads, head_dim, vocabulary):
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, rows, columns in [
            ("self_attn.q_proj", q_heads * head_dim, hidden), ("self_attn.k_proj", kv_heads * head_dim, hidden),
            ("self_attn.v_proj", kv_heads * head_dim, hidden), ("self_attn.o_proj", hidden, q_heads * head_dim),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
        ]:
            yield prefix + name + ".weight", (rows, columns)
    yield "model.norm.weight", (hidden,)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    hidden, inner, layers, q_heads, kv_heads, head_dim, vocabulary = shape
    os.makedirs(arguments.folder, exist_ok=True)
    header, offset = {}, 0
    for name, dims in tensors(*shape):
        size = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(arguments.seed)
    path = os.path.join(arguments.folder, "model.safetensors")
    with open(path + ".part", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dims in tensors(*shape):
            drawn = random.standard_normal(dims, np.float32) * (1 if len(dims) == 1 else 0.02)
            drawn = abs(drawn) + 0.5 if len(dims) == 1 else drawn
            (drawn.view(np.uint32) >> 16).astype(np.uint16).tofile(file)
    os.replace(path + ".part", path)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": None, "max_position_embeddings": 4608, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    }
    with open(os.path.join(arguments.folder, "config.json"), "w") as file:
        json.dump(config, file, indent=1)


if __name__ == "__main__":
    main()
