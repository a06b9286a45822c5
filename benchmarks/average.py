"""`twa average` beside mergekit's linear merge and beside plain copies of as many bytes.

    python benchmarks/average.py --weights 3_000_000_000 --mergekit /path/to/bin/mergekit-yaml

Three synthetic folders of a Llama's shape in bfloat16 are written to --folder, and averaged by each
command in turn, in a process of its own. Memory is what the process has allocated, without the
pages of mapped files, sampled fifty times a second. The table is Markdown.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.settings import Parser

ROOT = Path(__file__).resolve().parents[1]
WIDTH, INNER, VOCABULARY = 2048, 5632, 32_000
SHARD = 2_000_000_000  # bytes


def main():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=int, default=3_000_000_000, help="of a model, about")
    parser.add_argument("--models", type=int, default=3, help="how many are averaged")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary)")
    parser.add_argument("--mergekit", help="the command mergekit-yaml, in its own environment")
    parser.add_argument("--repeats", type=int, default=1, help="of each; the median counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        inputs = [folder / f"checkpoint-{i}" for i in range(1, args.models + 1)]
        for seed, path in enumerate(inputs):
            write_model(path, args.weights, seed)
        out = folder / "out"
        reads = " ".join(f"{path}/*.safetensors" for path in inputs)
        commands = {
            "cat of the inputs, cp of one": ["bash", "-c", f"cat {reads} > /dev/null; "
                                             f"cp -r {inputs[0]} {out}"],
            "twa average": [sys.executable, "-m", "twa", "average", *map(str, inputs),
                            "-o", str(out)],
        }  # fmt: skip
        if args.mergekit:
            commands["mergekit, linear"] = [args.mergekit, recipe(inputs, folder), str(out)]
        found = {command: [] for command in commands}
        for _ in range(args.repeats):
            for command, words in commands.items():
                found[command].append(measured(words))
                shutil.rmtree(out)
    size = sum(tensor.numel() for tensor in shapes(args.weights).values()) * 2
    print(f"{args.models} models of {size / 1e9:.2f} GB in bfloat16\n")
    print("| command | s | / cat and cp | memory GB |\n| --- | --- | --- | --- |")
    copies = statistics.median(seconds for seconds, _ in next(iter(found.values())))
    for command, columns in found.items():
        seconds, memory = (statistics.median(column) for column in zip(*columns, strict=True))
        print(f"| {command} | {seconds:.1f} | {seconds / copies:.2f} | {memory / 1e9:.2f} |")


def shapes(weights: int) -> dict[str, torch.Tensor]:
    """A Llama's tensors, on `meta`, with as many layers as make about so many weights."""
    layer = {f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"}
    layer |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH)}
    layer |= {"mlp.down_proj": (WIDTH, INNER)}
    count = max(1, (weights - 2 * VOCABULARY * WIDTH) // sum(a * b for a, b in layer.values()))
    tensors = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    tensors["lm_head.weight"] = (VOCABULARY, WIDTH)
    for i in range(count):
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = (WIDTH,)
    return {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}


def write_model(path: Path, weights: int, seed: int) -> None:
    path.mkdir()
    tensors, draws = shapes(weights), torch.Generator().manual_seed(seed)
    noise = torch.randn(VOCABULARY * WIDTH, generator=draws).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, like in tensors.items():
        if 2 * sum(t.numel() for t in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = noise[: like.numel()].view(like.shape).roll(len(name)).clone()
        if 2 * sum(t.numel() for t in shards[-1].values()) > SHARD:
            write_shard(path, len(shards), shards[-1])
            shards[-1] = {key: value.to("meta") for key, value in shards[-1].items()}
    if not next(iter(shards[-1].values())).is_meta:
        write_shard(path, len(shards), shards[-1])
    places = {key: f"model-{i}.safetensors" for i, s in enumerate(shards, start=1) for key in s}
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    layers = sum(name.endswith("q_proj.weight") for name in tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
    }
    config |= {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5}
    (path / "config.json").write_text(json.dumps(config))


def write_shard(path: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path / f"model-{number}.safetensors", metadata={"format": "pt"})


def recipe(inputs: list[Path], folder: Path) -> str:
    """mergekit's description of the mean."""
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in inputs]
    content = {"models": models, "merge_method": "linear", "dtype": "bfloat16"}
    (folder / "mergekit.yaml").write_text(json.dumps(content))
    return str(folder / "mergekit.yaml")


def measured(words: list[str]) -> tuple[float, int]:
    """The seconds of a command, until its output is on the disk, and its memory in bytes."""
    start, memory = time.perf_counter(), 0
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        memory = max(memory, allocated(process.pid))
        time.sleep(0.02)
    subprocess.run(["sync"], check=True)
    if process.returncode:
        sys.exit(f"{words[0]} ended with status {process.returncode}")
    return time.perf_counter() - start, memory


def allocated(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
