"""Where the memory of a PPO step goes: a formula, measured peaks, and a table for FLAN-T5's five sizes.

    python benchmarks/memory.py --paper                      # only the table; seconds
    python benchmarks/memory.py                              # table and measurements of small and base, CPU; minutes
    python benchmarks/memory.py --models DIR                 # with the models of tests/hub.py --full_size
    python benchmarks/memory.py --device cuda --sizes base large xl    # measured on a GPU
    python benchmarks/memory.py --short                      # smoke test: one small shape

Each measurement runs one PPO step of detox_ppo.py in its own process, with random weights of the true shapes.
"tensors" is the peak size of all tensors during the step. "resident" is the process's peak during the step minus its
memory before the models were loaded; it includes code that oneDNN generates and memory that allocators keep. On a GPU
both are the peak of what PyTorch allocated, and the seconds of a second step are printed too.
The last line of the output is one JSON object.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import step_time

ROOT = step_time.ROOT
T5, ROBERTA = step_time.T5, step_time.ROBERTA


def t5_shape(d_model, d_ff, layers, heads):
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads}
    return T5 | sizes


FLAN = {
    "small": t5_shape(512, 1024, 8, 6),
    "base": t5_shape(768, 2048, 12, 12),
    "large": t5_shape(1024, 2816, 24, 16),
    "xl": t5_shape(2048, 5120, 24, 32),
    "xxl": t5_shape(4096, 10240, 24, 64),
}
SHORT = t5_shape(256, 1024, 3, 4) | {"vocab_size": 8192}
MIB, GIB = 2**20, 2**30
BYTES = {"float32": 4, "bfloat16": 2}
# Limit of a pass's hidden states in bytes, by device and whether it has gradients: micro_batches in detox_ppo.py.
PASS = {"cpu": {True: 3 * 2**18, False: 3 * 2**19}, "cuda": {True: 2**27, False: 2**27}}


# ---------------------------------------------------------------------------------------------------------------
# The formula
# ---------------------------------------------------------------------------------------------------------------


def base_parameters(shape: dict) -> int:
    """Parameters of a T5 with an untied head, like FLAN-T5."""
    d, heads = shape["d_model"], shape["num_heads"]
    projection, feed_forward, _, _ = step_time.matrices(shape)
    encoder = shape["num_layers"] * (4 * projection + feed_forward + 2 * d)
    decoder = shape["num_decoder_layers"] * (8 * projection + feed_forward + 3 * d)
    outside = 2 * (shape["vocab_size"] * d + d + shape["relative_attention_num_buckets"] * heads)
    return outside + encoder + decoder


def adapter_parameters(shape: dict, lora_r: int) -> int:
    """Parameters of one LoRA on every q and v: two per encoder layer, four per decoder layer."""
    inner = shape["num_heads"] * shape["d_kv"]
    pairs = 2 * shape["num_layers"] + 4 * shape["num_decoder_layers"]
    return pairs * lora_r * (shape["d_model"] + inner)


def classifier_parameters(shape: dict) -> int:
    """Parameters of a RoBERTa with a two-label head."""
    h, wide = shape["hidden_size"], shape["intermediate_size"]
    embeddings = (shape["vocab_size"] + shape["max_position_embeddings"] + shape["type_vocab_size"] + 2) * h
    layer = 4 * (h * h + h) + 2 * h * wide + wide + h + 4 * h
    return embeddings + shape["num_hidden_layers"] * layer + h * h + h + 2 * h + 2


def pass_rows(tokens: int, hidden: int, size: int, device: str, most: int, gradients: bool) -> int:
    """Rows of this many tokens in one forward pass of micro_batches."""
    return max(1, min(most, PASS[device][gradients] // (hidden * size) // tokens))


def memory(
    shape: dict,
    classifier: dict = ROBERTA,
    *,
    dtype: str = "float32",
    batch_size: int = 16,
    mini_batch_size: int = 4,
    prompt_tokens: int = 250,
    response_tokens: int = 400,
    lora_r: int = 32,
    gradient_checkpointing: bool = False,
    device: str = "cpu",
    processes: int = 1,
) -> dict[str, int]:
    """Bytes that a PPO step needs in one process, by part.

    Args:
        shape, classifier: the models' config.json.
        prompt_tokens, response_tokens: of the longest rows, to which a pass is padded.

    Returns:
        weights (the frozen base), adapters (two), optimizer (gradients and Adam's two moments of the trained
        parameters), classifier; cache (sampling: keys, values, encoder states and the logits of a position),
        activations (one pass of the update, with the logits and their gradient), scoring (one pass of the classifier);
        peak (of the largest phase).
    """
    size, layers, cross = BYTES[dtype], shape["num_layers"], shape["num_decoder_layers"]
    d, wide, heads, vocabulary = shape["d_model"], shape["d_ff"], shape["num_heads"], shape["vocab_size"]
    inner, s, t = heads * shape["d_kv"], prompt_tokens, response_tokens
    trained = adapter_parameters(shape, lora_r) + d + 1
    rows = -(-batch_size // processes)
    cached = rows * cross * 2 * inner * (s + t) * size
    # While a position is added, one layer's keys and values exist twice. The logits exist in the model's dtype, in
    # float32, as probabilities and as a cumulative sum.
    cache = cached + cached // cross + rows * (s * d * size + vocabulary * (size + 3 * 4))

    # What the backward pass needs per layer and row. LoRA multiplies in float32, so it saves a float32 input; norms
    # compute in float32. Frozen matrices save nothing: the gradient of their input needs only the weights.
    bfloat16 = size == 2

    def attention(queries, keys):
        """LoRA on q and v: residual, norm, q, k, v, and the attention weights (float32; also bfloat16 if used)."""
        weights = heads * queries * keys * (6 if bfloat16 else 4)
        residual, normed = queries * d * size, queries * d * size
        if bfloat16:  # float32: inside the norm, and the inputs of both LoRAs
            normed += queries * d * (4 + 4) + keys * d * 4
        return residual + normed + inner * (queries + 2 * keys) * size + weights

    def feed_forward(tokens):
        normed = d * (size + 4 if bfloat16 else size)
        return tokens * (normed + 3 * wide * size)

    encoder_layer = attention(s, s) + feed_forward(s)
    decoder_layer = attention(t, t) + attention(t, s) + feed_forward(t)
    if gradient_checkpointing:
        # The input of every layer, and all activations of one layer at a time.
        saved = (layers * s + cross * t) * d * size + max(encoder_layer, decoder_layer)
    else:
        saved = layers * encoder_layer + cross * decoder_layer
    biases = heads * (s * s + t * t + t * s) * size
    # The logits that the log-probabilities save, their gradient, and its product with the head.
    logits = t * vocabulary * (3 * 4 + (2 * size if bfloat16 else 0))
    pass_size = pass_rows(s, d, size, device, -(-mini_batch_size // processes), gradients=True)
    activations = pass_size * (saved + biases + logits)

    # One pass of the classifier, without gradients: states, two wide ones and the attention weights.
    text = min(512, s + t)
    h = classifier["hidden_size"]
    texts = pass_rows(text, h, 4, device, rows, gradients=False)
    scoring = texts * text * 4 * (6 * h + 2 * classifier["intermediate_size"])
    scoring += texts * 2 * classifier["num_attention_heads"] * text**2 * 4
    parts = {
        "weights": base_parameters(shape) * size,
        "adapters": 2 * adapter_parameters(shape, lora_r) * 4,
        "optimizer": 3 * trained * 4,
        "classifier": classifier_parameters(classifier) * 4,
        "cache": cache,
        "activations": activations,
        "scoring": scoring,
    }
    always = sum(parts[name] for name in ("weights", "adapters", "optimizer", "classifier"))
    return parts | {"peak": always + max(cache, activations, scoring)}


def placement(peak: float, device_memory: float) -> str:
    """The accelerate configuration for a peak and a GPU's memory, both in GiB."""
    if peak <= 0.9 * device_memory:
        return "DDP: one GPU per process"
    return "exceeds one GPU: needs FSDP or ZeRO-3, which this script does not support"


def print_paper(options) -> list[dict]:
    """Print the table for all sizes, in bfloat16 on GPUs."""
    table = []
    print(f"\nComputed, in GiB: one process in bfloat16 on a GPU of {options.device_memory:.1f} GiB, ", end="")
    print("batch 16, minibatch 4, prompts of 250 tokens, responses of 400 tokens, LoRA r=32 on q and v\n")
    names = ("weights", "adapters", "optimizer", "classifier", "cache", "activations", "peak")
    print("| FLAN-T5 | parameters | " + " | ".join(names) + " | peak with checkpointing | accelerate configuration |")
    print("|" + "---|" * (len(names) + 4))
    for name, shape in FLAN.items():
        parts = memory(shape, dtype="bfloat16", device="cuda")
        checkpointed = memory(shape, dtype="bfloat16", device="cuda", gradient_checkpointing=True)["peak"]
        configuration = placement(min(parts["peak"], checkpointed) / GIB, options.device_memory)
        cells = [f"{parts[part] / GIB:.2f}" for part in names] + [f"{checkpointed / GIB:.2f}", configuration]
        print(f"| {name} | {base_parameters(shape):,} | " + " | ".join(cells) + " |")
        table.append({"size": name, "parameters": base_parameters(shape), **parts, "checkpointed": checkpointed})
    return table


# ---------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------


def live_tensors():
    """A dispatch mode that tracks the bytes of all tensors on the CPU: `live` now, and their `peak`."""
    import gc
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Live(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live = self.peak = 0
            self.storages = set()
            for thing in gc.get_objects():
                if isinstance(thing, torch.Tensor):
                    self.add(thing)

        def add(self, tensor):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.storages:
                self.storages.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, key, size)

        def drop(self, key, size):
            self.storages.discard(key)
            self.live -= size

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            torch.utils._pytree.tree_map_only(torch.Tensor, self.add, result)
            return result

    return Live()


@step_time.user_errors()
def child(plan):
    """Run one PPO step and measure its memory in bytes, as described in the module docstring."""
    import torch

    import detox_ppo

    on_gpu = plan["device"] != "cpu"
    measured, lengths = {}, []
    load, save, sample = detox_ppo.load_policy, detox_ppo.Checkpoints.save, detox_ppo.generate

    def resident(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def recording_load(*args):
        measured["before"] = resident("VmRSS")
        return load(*args)

    def recording_save(checkpoints, policy, optimizer, state):
        # Called before the first step and after the last.
        if not state.step:
            save(checkpoints, policy, optimizer, state)
            lengths.clear()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
                measured["mode"] = live_tensors()
                measured["mode"].__enter__()
            return
        if on_gpu:
            measured["tensors"] = measured["resident"] = torch.cuda.max_memory_allocated()
        else:
            measured["mode"].__exit__(None, None, None)
            measured["tensors"] = measured["mode"].peak
            measured["resident"] = resident("VmHWM") - measured["before"]
        measured["sampled"] = lengths.copy()

    def recording_sample(policy, prompts, *args):
        responses = sample(policy, prompts, *args)
        lengths.append((max(map(len, prompts)), int(responses.lengths.max())))
        return responses

    detox_ppo.load_policy, detox_ppo.generate = recording_load, recording_sample
    detox_ppo.Checkpoints.save = recording_save
    config = detox_ppo.parse_config(plan["arguments"])
    step_time.run_without_report(config)
    prompts, responses = zip(*measured["sampled"], strict=True)
    last = json.loads((Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "tensors": measured["tensors"],
        "resident": measured["resident"],
        "prompt_tokens": max(prompts),
        "response_tokens": max(responses),
        "seconds": last["time/step"],  # on the CPU this includes the time for tracking tensors
    }


def measure(options, name, shape, models, dtype, checkpointing, scratch) -> dict:
    """Measure one step; return the measurement and the formula's prediction."""
    options.batch_size, options.mini_batch_size, options.steps = 8, 8, int(options.device != "cpu")
    options.dialogues, options.seed = None, 0
    base = scratch / f"t5-{name}"
    if not base.exists():
        step_time.write_base(base, shape, models["base"])
    models = {"base": str(base), "classifier": models["classifier"]}
    dataset, _ = step_time.make_plan(options, models, scratch)
    arguments = step_time.our_arguments(options, models, dataset, scratch / "run", dtype)
    arguments += ["--gradient_checkpointing", str(checkpointing)]
    plan = {"device": options.device, "arguments": arguments}
    label = f"{name}, {dtype}" + (", checkpointing" if checkpointing else "")
    measured = step_time.run_child([sys.executable, __file__, "--child"], plan, scratch, options, label)
    expected = memory(
        shape,
        json.loads((Path(models["classifier"]) / "config.json").read_text()),
        dtype=dtype,
        batch_size=options.batch_size,
        mini_batch_size=options.mini_batch_size,
        prompt_tokens=measured["prompt_tokens"],
        response_tokens=measured["response_tokens"],
        gradient_checkpointing=checkpointing,
        device=options.device.split(":")[0],
    )
    return {"size": name, "dtype": dtype, "checkpointing": checkpointing, **measured, **expected}


def print_measured(measured, device):
    print(f"\nMeasured, in MiB: {device}, batch and minibatch of 8, prompt and response: the longest in tokens\n")
    columns = ["FLAN-T5", "dtype", "checkpointing", "prompt", "response", "formula", "tensors", "tensors / formula"]
    columns.append("resident")
    if device != "cpu":
        columns.append("seconds")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for row in measured:
        cells = [row["size"], row["dtype"], "yes" if row["checkpointing"] else "no"]
        cells += [str(row["prompt_tokens"]), str(row["response_tokens"])]
        cells += [f"{row['peak'] / MIB:.0f}", f"{row['tensors'] / MIB:.0f}"]
        cells += [f"{row['tensors'] / row['peak']:.2f}", f"{row['resident'] / MIB:.0f}"]
        if device != "cpu":
            cells.append(f"{row['seconds']:.2f}")
        print(f"| {' | '.join(cells)} |")


@step_time.user_errors()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="print only the table")
    parser.add_argument("--sizes", nargs="+", choices=list(FLAN), default=["small", "base"], help="sizes to measure")
    parser.add_argument("--dtypes", nargs="+", choices=step_time.DTYPES, default=list(step_time.DTYPES))
    parser.add_argument("--models", metavar="DIR", help="directory written by tests/hub.py (default: create models)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--device_memory", type=float, default=80e9 / GIB, help="GPU memory in GiB, for the table")
    parser.add_argument("--prompt_tokens", type=int, default=400, help="length of every prompt in measurements")
    parser.add_argument("--response_lengths", nargs=2, type=int, default=[190, 200], metavar=("MIN", "MAX"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--short", action="store_true", help="smoke test for CI: one small shape, one measurement")
    if sys.argv[1:2] == ["--child"]:
        plan, result = map(Path, sys.argv[2:])
        result.write_text(json.dumps(child(json.loads(plan.read_text()))))
        return
    options = parser.parse_args()
    if options.short:
        options.prompt_tokens, options.response_lengths = 300, [25, 30]

    measured = []
    with tempfile.TemporaryDirectory(prefix="memory_") as scratch:
        scratch = Path(scratch)
        shapes = {"short": SHORT} if options.short else {name: FLAN[name] for name in options.sizes}
        dtypes = ["float32"] if options.short else options.dtypes
        models = None if options.paper else step_time.find_models(options, scratch)
        if not options.paper:
            checkpointings = [False] if options.short else [False, True]
            for (name, shape), dtype, checkpointing in itertools.product(shapes.items(), dtypes, checkpointings):
                measured.append(measure(options, name, shape, models, dtype, checkpointing, scratch))
    if measured:
        print_measured(measured, options.device)
    print(json.dumps({"measured": measured, "paper": print_paper(options)}))


if __name__ == "__main__":
    main()
