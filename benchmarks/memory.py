"""Where the memory of a PPO step goes: a formula, held against measured peaks, and a table for FLAN-T5's five sizes.

    python benchmarks/memory.py --paper                      # the table alone, seconds
    python benchmarks/memory.py                              # and measured on the CPU: FLAN-T5-small, -base; minutes
    python benchmarks/memory.py --models DIR                 # with the repositories that tests/hub.py --full_size made
    python benchmarks/memory.py --device cuda --sizes base large xl    # measured on a GPU
    python benchmarks/memory.py --short                      # one small shape, for CI

Each measurement is a process of its own that runs one PPO step of detox_ppo.py with random weights of the true shapes.
"tensors" is the peak of what all tensors hold in the step; "resident" is by how much the process's peak in the step
exceeds what it held before the models were loaded, with the code that oneDNN makes and what allocators keep. On a GPU
both are the peak of what PyTorch allocated, and the seconds of a second step are shown too.
The last line of the output is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import step_time

ROOT = step_time.ROOT
T5, ROBERTA = step_time.T5, step_time.ROBERTA
FLAN = {
    name: T5 | dict(zip(("d_model", "d_ff", "num_layers", "num_decoder_layers", "num_heads"), shape, strict=True))
    for name, shape in {
        "small": (512, 1024, 8, 8, 6),
        "base": (768, 2048, 12, 12, 12),
        "large": (1024, 2816, 24, 24, 16),
        "xl": (2048, 5120, 24, 24, 32),
        "xxl": (4096, 10240, 24, 24, 64),
    }.items()
}
SHORT = T5 | {"vocab_size": 8192, "d_model": 256, "d_ff": 1024, "num_layers": 3, "num_decoder_layers": 3}
SHORT |= {"num_heads": 4}
MIB, GIB = 2**20, 2**30
BYTES = {"float32": 4, "bfloat16": 2}
# How many bytes of hidden states one pass may hold, with gradients and without: micro_batches in detox_ppo.py.
PASS = {"cpu": {True: 3 * 2**18, False: 3 * 2**19}, "cuda": {True: 2**27, False: 2**27}}


# ---------------------------------------------------------------------------------------------------------------
# The formula
# ---------------------------------------------------------------------------------------------------------------


def base_parameters(shape: dict) -> int:
    """Parameters of a T5 with a head of its own, as FLAN-T5's."""
    d, heads = shape["d_model"], shape["num_heads"]
    projection, feed_forward, _, _ = step_time.matrices(shape)
    encoder = shape["num_layers"] * (4 * projection + feed_forward + 2 * d)
    decoder = shape["num_decoder_layers"] * (8 * projection + feed_forward + 3 * d)
    outside = 2 * (shape["vocab_size"] * d + d + shape["relative_attention_num_buckets"] * heads)
    return outside + encoder + decoder


def adapter_parameters(shape: dict, lora_r: int) -> int:
    """Parameters of one LoRA on every q and v: two in an encoder layer, four in a decoder layer."""
    inner = shape["num_heads"] * shape["d_kv"]
    pairs = 2 * shape["num_layers"] + 4 * shape["num_decoder_layers"]
    return pairs * lora_r * (shape["d_model"] + inner)


def classifier_parameters(shape: dict) -> int:
    """Parameters of a RoBERTa with its two-label head."""
    h, wide = shape["hidden_size"], shape["intermediate_size"]
    embeddings = (shape["vocab_size"] + shape["max_position_embeddings"] + shape["type_vocab_size"] + 2) * h
    layer = 4 * (h * h + h) + 2 * h * wide + wide + h + 4 * h
    return embeddings + shape["num_hidden_layers"] * layer + h * h + h + 2 * h + 2


def pass_rows(tokens: int, hidden: int, size: int, device: str, most: int, gradients: bool) -> int:
    """Rows of this many tokens in one forward pass, as micro_batches makes them."""
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
    """Bytes that a PPO step needs in one of the processes, by part; "peak" is that of the largest phase.

    Args:
        shape, classifier: the models' config.json.
        prompt_tokens, response_tokens: of the longest rows, which are what a pass is padded to.

    Returns:
        weights (the frozen base), adapters (two), optimizer (gradients and Adam's two moments of what is trained),
        classifier; cache (sampling: keys, values, encoder states and a position's logits), activations (one pass of
        the update, with the logits and their gradient), scoring (one pass of the classifier); peak.
    """
    size, layers, cross = BYTES[dtype], shape["num_layers"], shape["num_decoder_layers"]
    d, wide, heads, vocabulary = shape["d_model"], shape["d_ff"], shape["num_heads"], shape["vocab_size"]
    inner, s, t = heads * shape["d_kv"], prompt_tokens, response_tokens
    trained = adapter_parameters(shape, lora_r) + d + 1
    rows = -(-batch_size // processes)
    cached = rows * cross * 2 * inner * (s + t) * size
    # The newest layer's keys and values exist twice while a position is added, the logits as such, in float32, as
    # probabilities and as their running sum.
    cache = cached + cached // cross + rows * (s * d * size + vocabulary * (size + 3 * 4))

    # What the backward pass needs of a layer, a row. LoRA multiplies in float32, so it keeps a float32 input; norms
    # compute in float32. Frozen matrices keep nothing: the gradient of their input needs the weights alone.
    def sublayer(queries, keys, shared_input):
        """Attention with LoRA on q and v: residual, norm, q, k, v, weights (float32, and once more in bfloat16)."""
        weights = heads * queries * keys * (4 if size == 4 else 6)
        normed = queries * d * (size if size == 4 else 4 + size + 4)  # what q's LoRA reads; v's reads it too, or
        other = keys * d * (0 if size == 4 else 4) if shared_input else (0 if size == 4 else queries * d * 4)
        return queries * d * size + normed + other + inner * (queries + 2 * keys) * size + weights

    def feed_forward(tokens):
        return tokens * (d * (size if size == 4 else size + 4) + 3 * wide * size)

    encoder_layer = sublayer(s, s, False) + feed_forward(s)
    decoder_layer = sublayer(t, t, False) + sublayer(t, s, True) + feed_forward(t)
    if gradient_checkpointing:
        # Each layer's input, and one layer at a time in full.
        kept = (layers * s + cross * t) * d * size + max(encoder_layer, decoder_layer)
    else:
        kept = layers * encoder_layer + cross * decoder_layer
    biases = heads * (s * s + t * t + t * s) * size
    # Log-probabilities keep the logits; their gradient and its product with the head come on top.
    logits = t * vocabulary * (3 * 4 + (0 if size == 4 else 2 * size))
    at_once = pass_rows(s, d, size, device, -(-mini_batch_size // processes), gradients=True)
    activations = at_once * (kept + biases + logits)

    text = min(512, s + t)  # one pass of the classifier, without gradients: two wide states and the attention's
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
    """How many processes' GPUs a peak in GiB fits, in words."""
    if peak <= 0.9 * device_memory:
        return "DDP: one GPU a process"
    return "more than one GPU holds: FSDP or ZeRO-3, which this script does not do"


def print_paper(options) -> list[dict]:
    """The table for all sizes, in bfloat16 on GPUs."""
    table = []
    print(f"\nOn paper, GiB: a process in bfloat16 on a GPU of {options.device_memory:g} GB, batch 16, ", end="")
    print("minibatch 4, prompts of 250 tokens, responses of 400, LoRA r=32 on q and v\n")
    names = ("weights", "adapters", "optimizer", "classifier", "cache", "activations", "peak")
    print("| FLAN-T5 | parameters | " + " | ".join(names) + " | peak with checkpointing | accelerate configuration |")
    print("|" + "---|" * (len(names) + 4))
    for name, shape in FLAN.items():
        plain, again = (
            memory(shape, dtype="bfloat16", device="cuda", gradient_checkpointing=checkpointing)
            for checkpointing in (False, True)
        )
        where = placement(min(plain["peak"], again["peak"]) / GIB, options.device_memory)
        cells = [f"{plain[part] / GIB:.2f}" for part in names] + [f"{again['peak'] / GIB:.2f}", where]
        print(f"| {name} | {base_parameters(shape):,} | " + " | ".join(cells) + " |")
        table.append({"size": name, "parameters": base_parameters(shape), **plain, "checkpointed": again["peak"]})
    return table


# ---------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------


def live_tensors():
    """A mode that follows the bytes of all tensors on the CPU: `live` now and their `peak`."""
    import gc
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Live(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live = self.peak = 0
            self.storages = set()
            for found in gc.get_objects():
                if isinstance(found, torch.Tensor):
                    self.add(found)

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


@step_time.refusals()
def child(plan):
    """Run one PPO step; see the docstring above for what it measures. In bytes."""
    import torch

    import detox_ppo

    on_gpu = plan["device"] != "cpu"
    noted, lengths = {}, []
    load, save, sample = detox_ppo.load_policy, detox_ppo.Checkpoints.save, detox_ppo.generate

    def resident(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def noted_load(*args):
        noted["before"] = resident("VmRSS")
        return load(*args)

    def noted_save(checkpoints, policy, optimizer, state):
        # Called before the first step and after the last.
        if not state.step:
            save(checkpoints, policy, optimizer, state)
            lengths.clear()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
                noted["mode"] = live_tensors()
                noted["mode"].__enter__()
            return
        if on_gpu:
            noted["tensors"] = noted["resident"] = torch.cuda.max_memory_allocated()
        else:
            noted["mode"].__exit__(None, None, None)
            noted["tensors"], noted["resident"] = noted["mode"].peak, resident("VmHWM") - noted["before"]
        noted["sampled"] = lengths.copy()

    def noted_sample(policy, prompts, *args):
        responses = sample(policy, prompts, *args)
        lengths.append((max(map(len, prompts)), int(responses.lengths.max())))
        return responses

    detox_ppo.load_policy, detox_ppo.generate = noted_load, noted_sample
    detox_ppo.Checkpoints.save = noted_save
    config = detox_ppo.parse_config(plan["arguments"])
    step_time.run_without_report(config)
    prompts, responses = zip(*noted["sampled"], strict=True)
    last = json.loads((Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    found = {name: noted[name] for name in ("tensors", "resident")}
    return found | {
        "prompt_tokens": max(prompts),
        "response_tokens": max(responses),
        "seconds": last["time/step"],  # on the CPU with the time to follow every tensor
    }


def measure(options, name, shape, models, dtype, checkpointing, scratch) -> dict:
    """One measured step beside the formula."""
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
    found = step_time.run_child([sys.executable, __file__, "--child"], plan, scratch, options, label)
    expected = memory(
        shape,
        json.loads((Path(models["classifier"]) / "config.json").read_text()),
        dtype=dtype,
        batch_size=options.batch_size,
        mini_batch_size=options.mini_batch_size,
        prompt_tokens=found["prompt_tokens"],
        response_tokens=found["response_tokens"],
        gradient_checkpointing=checkpointing,
        device=options.device.split(":")[0],
    )
    return {"size": name, "dtype": dtype, "checkpointing": checkpointing, **found, **expected}


@step_time.refusals()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the table alone")
    parser.add_argument("--sizes", nargs="+", choices=list(FLAN), default=["small", "base"], help="measured ones")
    parser.add_argument("--dtypes", nargs="+", choices=step_time.DTYPES, default=list(step_time.DTYPES))
    parser.add_argument("--models", metavar="DIR", help="repositories that tests/hub.py made (default: made now)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--device_memory", type=float, default=80e9 / GIB, help="of a GPU, for the table, in GiB")
    parser.add_argument("--prompt_tokens", type=int, default=400, help="of every prompt that is measured")
    parser.add_argument("--response_lengths", nargs=2, type=int, default=[190, 200], metavar=("MIN", "MAX"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--short", action="store_true", help="for CI: one small shape, once")
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
        for name, shape in shapes.items() if models else ():
            for dtype in dtypes:
                for checkpointing in (False,) if options.short else (False, True):
                    measured.append(measure(options, name, shape, models, dtype, checkpointing, scratch))
    if measured:
        print(f"\nMeasured: {options.device}, batch and minibatch of 8, longest prompt and response as shown; MiB\n")
        columns = "FLAN-T5", "dtype", "checkpointing", "prompt", "response", "formula", "tensors", "tensors / formula"
        columns += ("resident",) + ("seconds",) * (options.device != "cpu")
        print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for found in measured:
        cells = [found["size"], found["dtype"], "yes" if found["checkpointing"] else "no"]
        cells += [str(found["prompt_tokens"]), str(found["response_tokens"])]
        cells += [f"{found['peak'] / MIB:.0f}", f"{found['tensors'] / MIB:.0f}"]
        cells += [f"{found['tensors'] / found['peak']:.2f}", f"{found['resident'] / MIB:.0f}"]
        cells += [f"{found['seconds']:.2f}"] * (options.device != "cpu")
        print(f"| {' | '.join(cells)} |")
    print(json.dumps({"measured": measured, "paper": print_paper(options)}))


if __name__ == "__main__":
    main()
