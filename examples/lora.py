"""TWA over LoRA adapters: several fine-tunings of one base model, by PEFT, become one adapter.

    python examples/lora.py

A small Llama, made from its config, learns the code of Python's standard library. Several adapters,
each trained at another learning rate from a common start, fit it to the prose of the documentation.
Then TWA trains their average on validation text. It averages the factors A and B, not the products
BA.
"""

import copy
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from twa import Recipe

BASE_STEPS, ADAPTER_STEPS, TWA_STEPS, BATCH, LENGTH = 150, 60, 40, 8, 64
RATES = (5e-3, 7e-3, 1e-2, 1.4e-2)
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=48,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def passages(name: str) -> torch.Tensor:
    """The bytes of a file of the standard library, [passages, LENGTH], shuffled."""
    text = (Path(tempfile.__file__).parent / name).read_bytes()
    text = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
    return text[torch.randperm(len(text))]


def loss_of(model, text):
    text = text.to(device)
    return model(input_ids=text, labels=text).loss


def train(model, text, optimizer, steps, scheduler=None):
    """The same for AdamW and for TWA."""
    model.train()
    for _ in range(steps):
        loss_of(model, text[torch.randint(len(text), (BATCH,))]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


@torch.no_grad()
def evaluate(model, text) -> float:
    model.eval()
    return loss_of(model, text).item()


def main():
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG).to(device)
    train(base, passages("argparse.py"), torch.optim.AdamW(base.parameters(), lr=5e-3), BASE_STEPS)
    prose = passages("pydoc_data/topics.py")
    test, validation, prose = prose[:500], prose[500:1000], prose[1000:]

    def fitted(folder, rate: float, start: dict | None = None):
        """An adapter trained at `rate` and saved in `folder`."""
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(copy.deepcopy(base), config)
        if start is not None:
            model.load_state_dict(start)
        trainable = [p for p in model.parameters() if p.requires_grad]
        train(model, prose, torch.optim.AdamW(trainable, lr=rate), ADAPTER_STEPS)
        model.save_pretrained(folder)
        return model

    # Several fine-tunings from one start, each at a constant learning rate, leave adapters.
    folder = Path(tempfile.mkdtemp())
    model = fitted(folder / "start", RATES[-1])
    start = copy.deepcopy(model.state_dict())
    for i, rate in enumerate(RATES):
        alone = evaluate(fitted(folder / f"{i}", rate, start), test)
        print(f"adapter {i}: held out {alone:.4f}")

    # TWA trains their average. It starts from the best of the simple averages.
    checkpoints = [folder / f"{i}" for i in range(len(RATES))]
    loss, samples = lambda: evaluate(model, validation), len(validation)
    recipe = Recipe(model, checkpoints, loss, steps=TWA_STEPS, samples=samples)
    optimizer = recipe.optimizer()
    before = evaluate(model, test)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, TWA_STEPS)
    train(model, validation, optimizer, TWA_STEPS, scheduler)
    recipe.finish()
    after = evaluate(model, test)
    model.save_pretrained(folder / "twa")  # an adapter like the others

    alpha = optimizer.averaging_weights()
    print("averaging weights:", [round(weight, 2) for weight in alpha.tolist()])
    print(f"held-out loss {before:.4f} -> {after:.4f} nats a byte")


if __name__ == "__main__":
    main()
