"""What `bench_generate.py` runs in a process for each engine: prints one line of JSON, or makes a GGUF file.

python bench/generate_workers.py DIR qvl:int8 | transformers:bf16 | llama.cpp:Q8_0 | gguf:Q8_0
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from statistics import median

TESTS = ("image 448", "image 1024", "pp512", "tg32", "tg32 @ d4096")
REPEAT = 2


def with_qvl(folder: Path, format: str) -> dict:
    start = time.perf_counter()
    import torch

    from qvl_model import Qwen3VL
    from qvl_model.benchmark import measure

    imported = time.perf_counter()
    model = Qwen3VL.from_pretrained(folder / format)
    loaded = time.perf_counter()
    with torch.no_grad():
        model(torch.tensor([[1]]), logits_to_keep=1)
    first = time.perf_counter()
    results = {result.test: result.value for result in measure(model, TESTS, repeat=REPEAT)}
    peak = peak_bytes()  # before the roofs' own 256 MiB
    from timing import READ_BYTES, facts, roofs

    def best(run, amount):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return amount / median(times) / 1e9

    machine = facts()
    return results | {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "first_token_s": first - loaded,
        "peak_bytes": peak,
        "predicted_bytes": model.plan.peak,
        "weight_bytes": model.plan.weight_bytes,
        "text_bytes": sum(
            tensor.nbytes
            for module in (model.model.language_model.layers, model.lm_head)
            for tensor in module.state_dict().values()
        ),
        **{name: machine[name] for name in ("cpu", "capability", "threads", "commit")},
        "fma_gflops": best(roofs().fma, roofs().fma_flops),
        "read_gbytes": best(roofs().read, READ_BYTES),
    }


def with_transformers(folder: Path, format: str) -> dict:
    start = time.perf_counter()
    import torch
    from transformers import DynamicCache, Qwen3VLForConditionalGeneration

    imported = time.perf_counter()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[format]
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder / "2b", dtype=dtype, attn_implementation="sdpa")
    model.eval()
    loaded = time.perf_counter()
    text = model.config.text_config

    def timed(run) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def generate(tokens, cache, depth):
        token = torch.tensor([[1]])
        for step in range(tokens):
            position = torch.full((3, 1, 1), depth + step)
            out = model(input_ids=token, past_key_values=cache, use_cache=True, position_ids=position)
            token = out.logits[:, -1:].argmax(-1)

    def filled(depth):
        cache = DynamicCache(config=text)
        for layer in range(text.num_hidden_layers if depth else 0):
            shape = 1, text.num_key_value_heads, depth, text.head_dim
            cache.update(torch.randn(shape, dtype=dtype) * 0.01, torch.randn(shape, dtype=dtype) * 0.01, layer)
        return cache

    def picture(side):
        patches = side // 16
        pixels = torch.randn(patches * patches, 3 * 2 * 16 * 16, dtype=dtype)
        return timed(lambda: model.model.visual(pixels, grid_thw=torch.tensor([[1, patches, patches]])))

    ids = torch.randint(1000, (1, 512))
    results = {}
    with torch.no_grad():
        model(input_ids=ids[:, :16], logits_to_keep=1)
        repeat = 1 if format == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2" else 2
        prompt = [timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)) for _ in range(repeat)]
        results["pp512"] = 512 / median(prompt)
        for name, depth in (("tg32", 0), ("tg32 @ d4096", 4096)):
            cache = filled(depth)
            generate(1, cache, depth)
            results[name] = 16 / timed(lambda cache=cache, depth=depth: generate(16, cache, depth + 1))
        picture(64)
        results["image 448"] = median([picture(448) for _ in range(repeat)])
        results["image 1024"] = picture(1024)
    return results | {"import_s": imported - start, "load_s": loaded - imported, "peak_bytes": peak_bytes()}


def with_llama(folder: Path, format: str) -> dict:
    """The better of flash attention on and off, as llama-bench would show each."""
    import llama_cpp as llama

    path = str(folder / f"{format}.gguf").encode()
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    start = time.perf_counter()
    model = llama.llama_model_load_from_file(path, llama.llama_model_default_params())
    load = time.perf_counter() - start
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))

    def decode(context, count):
        tokens = (llama.llama_token * count)(*[(7 * i) % 1000 for i in range(count)])
        if llama.llama_decode(context, llama.llama_batch_get_one(tokens, count)) != 0:
            raise RuntimeError("llama_decode failed")
        llama.llama_synchronize(context)

    results: dict = {"load_s": load}
    for flash in (0, 1):
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 4096 + 512, 512, 512
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = flash
        context = llama.llama_init_from_model(model, options)
        memory = llama.llama_get_memory(context)
        decode(context, 16)

        def speed(context, steps, count):
            begin = time.perf_counter()
            for _ in range(steps):
                decode(context, count)
            return steps * count / (time.perf_counter() - begin)

        found: dict = {"pp512": []}
        for _ in range(2):
            llama.llama_memory_clear(memory, True)
            found["pp512"].append(speed(context, 1, 512))
        for name, depth in (("tg32", 0), ("tg32 @ d4096", 4096)):
            llama.llama_memory_clear(memory, True)
            for _ in range(depth // 512):
                decode(context, 512)
            decode(context, 1)
            found[name] = [speed(context, 32, 1)]
        for name, values in found.items():
            results[name] = max(results.get(name, 0.0), median(values))
        llama.llama_free(context)
    return results | {"peak_bytes": peak_bytes()}


def make_gguf(folder: Path, format: str) -> None:
    """The text model's shape with random weights as BF16, and from that every other format by llama.cpp's own
    quantiser."""
    import llama_cpp as llama

    source = folder / "BF16.gguf"
    if not source.is_file():
        write_gguf(source, json.loads((folder / "2b" / "config.json").read_text())["text_config"])
    if format == "BF16":
        return
    options = llama.llama_model_quantize_default_params()
    options.ftype = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}[format]
    options.nthread = os.cpu_count() or 1
    to = folder / f"{format}.gguf"
    if llama.llama_model_quantize(str(source).encode(), str(to).encode(), options) != 0:
        raise RuntimeError(f"llama.cpp did not quantise to {format}")


def write_gguf(to: Path, text: dict) -> None:
    import gguf
    import numpy as np

    hidden, inner, layers, dim = (
        text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    )
    queries, keys = text["num_attention_heads"] * dim, text["num_key_value_heads"] * dim
    writer = gguf.GGUFWriter(to, "qwen3")
    writer.add_name("random")
    writer.add_context_length(32768)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_freq_base(5e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(text["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)

    def matrix(name, rows, columns):
        values = (random.standard_normal((rows, columns), dtype=np.float32) * 0.02).view(np.uint32)
        raw = (values >> 16).astype(np.uint16)
        writer.add_tensor(name, raw.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def ones(name, count):
        writer.add_tensor(name, np.ones(count, np.float32))

    matrix("token_embd.weight", text["vocab_size"], hidden)
    ones("output_norm.weight", hidden)
    for layer in range(layers):
        prefix = f"blk.{layer}"
        ones(f"{prefix}.attn_norm.weight", hidden)
        ones(f"{prefix}.ffn_norm.weight", hidden)
        ones(f"{prefix}.attn_q_norm.weight", dim)
        ones(f"{prefix}.attn_k_norm.weight", dim)
        matrix(f"{prefix}.attn_q.weight", queries, hidden)
        matrix(f"{prefix}.attn_k.weight", keys, hidden)
        matrix(f"{prefix}.attn_v.weight", keys, hidden)
        matrix(f"{prefix}.attn_output.weight", hidden, queries)
        matrix(f"{prefix}.ffn_gate.weight", inner, hidden)
        matrix(f"{prefix}.ffn_up.weight", inner, hidden)
        matrix(f"{prefix}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def peak_bytes() -> int:
    """Of this program; `ru_maxrss` alone is at least what the process that started it had."""
    import resource

    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text() if status.is_file() else "")
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


WORKERS = {"qvl": with_qvl, "transformers": with_transformers, "llama.cpp": with_llama, "gguf": make_gguf}


if __name__ == "__main__":
    kind, _, format = sys.argv[2].partition(":")
    print(json.dumps(WORKERS[kind](Path(sys.argv[1]), format)))
