"""Peer for the sampling bench: greedy decode and prefill of a Llama checkpoint by llama.cpp on the CPU.

The checkpoint becomes a GGUF file without a vocabulary beside it, in the type that is asked for; all slots are sequences of one
batch, at the same position, as in jax_decode.py. Tokens are chosen on the host.

  python -m venv V && V/bin/pip install llama-cpp-python==0.3.36 gguf==0.19.0 numpy
  V/bin/python llamacpp_decode.py MODEL_DIR --slots 1 8 --new 256 [--dtype f32|bf16] [--runs 3] [--prefill 512] [--threads N]
Prints one JSON line per slot count: {"slots", "dtype", "new_tokens", "tok_s", "first"} (median of the runs, and the first slot's
first tokens), and with --prefill N one of {"prompt": N, "prefill": {"tok_s"}}.
"""
import argparse, ctypes, json, os, statistics, struct, time

import gguf
import llama_cpp as llama
import numpy as np

KINDS = {"f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16}
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def tensors(path):
    """Names and f32 arrays of a safetensors file."""
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    raw = np.memmap(path, np.uint8, "r", offset=8 + size)
    for name, of in header.items():
        if name != "__metadata__":
            begin, end = of["data_offsets"]
            assert of["dtype"] in ("BF16", "F32"), f"{name} is {of['dtype']}"
            data = raw[begin:end]
            wide = data.view(np.uint16).astype(np.uint32) << 16 if of["dtype"] == "BF16" else data.view(np.uint32)
            yield name, wide.view(np.float32).reshape(of["shape"])


def interleaved(weight, heads):
    """llama.cpp rotates neighbours where Hugging Face rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def convert(folder, dtype):
    path = os.path.join(folder, f"{dtype}.gguf")
    if os.path.exists(path):
        return path
    config = json.load(open(os.path.join(folder, "config.json")))
    writer = gguf.GGUFWriter(path + ".part", "llama")
    q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(q_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, weight in tensors(os.path.join(folder, "model.safetensors")):
        parts = name.removesuffix(".weight").split(".")
        if parts[:2] == ["model", "layers"]:
            kind = ".".join(parts[3:])
            if kind in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = interleaved(weight, q_heads if "q_proj" in kind else kv_heads)
            name = f"blk.{parts[2]}.{NAMES[kind]}.weight"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[-1]] + ".weight"
        stored = KINDS["f32" if weight.ndim == 1 else dtype]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(weight), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(path + ".part", path)
    return path


class Model:
    def __init__(self, path, dtype, slots, length, threads):
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = slots * length, max(length, slots), 512, slots
        params.n_threads = params.n_threads_batch = threads
        # ggml's numbers of types: f32, bf16.
        params.type_k = params.type_v = {"f32": 0, "bf16": 30}[dtype]
        self.context = llama.llama_init_from_model(self.model, params)
        assert self.context, "llama.cpp makes no context"
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(max(length, slots), 0, 1)

    def clear(self):
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def forward(self, rows):
        """The tokens after those rows, (token, position, sequence, whether it counts), that count."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, counts) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, position, 1, counts
            batch.seq_id[at][0] = sequence
        status = llama.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode: {status}"
        count = sum(counts for *_, counts in rows)
        logits = ctypes.cast(llama.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, (count, self.vocabulary)).argmax(-1).tolist()


def seconds(runs, run):
    """The median of some runs, after one that does not count."""
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--dtype", choices=KINDS, default="f32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    path = convert(options.model, options.dtype)
    if options.prefill:
        model = Model(path, options.dtype, 1, options.prefill, options.threads)
        rows = [((at * 7919 + 300) % model.vocabulary, at, 0, at == options.prefill - 1) for at in range(options.prefill)]
        taken = seconds(options.runs, lambda: (model.clear(), model.forward(rows)))
        print(json.dumps({"prompt": options.prefill, "prefill": {"tok_s": round(options.prefill / taken, 1)}}), flush=True)
    for slots in options.slots:
        model = Model(path, options.dtype, slots, options.new + 8, options.threads)
        first = []

        def run():
            model.clear()
            first.clear()
            tokens = [300 + slot for slot in range(slots)]
            for position in range(options.new):
                tokens = model.forward([(token, position, slot, True) for slot, token in enumerate(tokens)])
                first.append(tokens[0])

        taken = seconds(options.runs, run)
        print(json.dumps({"slots": slots, "dtype": options.dtype, "new_tokens": slots * options.new,
                          "tok_s": round(slots * options.new / taken, 1), "first": first[:8]}), flush=True)


if __name__ == "__main__":
    main()
