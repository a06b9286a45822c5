"""TWA in a loop of Hugging Face accelerate, saved by `save_state` and resumed by `load_state`.

    accelerate launch examples/accelerate_loop.py        (or python, or torchrun)

A small GRU learns to predict the next byte of Python's standard library; the window comes from
`save_model`.
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, random_split

from twa import TWA

HEAD_EPOCHS, TWA_EPOCHS, BATCH, LENGTH = 8, 2, 16, 64


class NextByte(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, text):
        return self.head(self.gru(self.embedding(text))[0])


def loaders() -> tuple[DataLoader, DataLoader]:
    library = Path(tempfile.__file__).parent
    text = (library / "argparse.py").read_bytes()
    passages = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
    train, held_out = random_split(passages, [0.8, 0.2])
    return DataLoader(train, BATCH, shuffle=True), DataLoader(held_out, 4 * BATCH)


def loss_of(model, text):
    return cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def train_epoch(accelerator, model, loader, optimizer, scheduler=None):
    """The same for AdamW and for TWA."""
    model.train()
    for text in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, text))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if scheduler:
                scheduler.step()
            optimizer.zero_grad()


@torch.no_grad()
def evaluate(accelerator, model, loader) -> float:
    model.eval()
    gather = accelerator.gather_for_metrics  # without what the last batch was filled up with
    losses = [gather(loss_of(model, text).repeat(len(text))) for text in loader]
    return torch.cat(losses).mean().item()


def main():
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    (folder,) = broadcast_object_list([tempfile.mkdtemp()])
    folder = Path(folder)
    train_loader, held_out = accelerator.prepare(*loaders())
    plain = NextByte().to(accelerator.device)

    # An ordinary run at a constant learning rate leaves the window of checkpoints.
    model, adamw = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=5e-3))
    for epoch in range(HEAD_EPOCHS):
        train_epoch(accelerator, model, train_loader, adamw)
        accelerator.save_model(model, folder / f"{epoch}")
    accelerator.wait_for_everyone()

    # TWA takes the model before `prepare` does, and on its device. It starts from the mean.
    checkpoints = [folder / f"{epoch}" for epoch in range(2, HEAD_EPOCHS)]
    accelerator.free_memory()
    plain = NextByte().to(accelerator.device)
    optimizer = TWA(plain, checkpoints)
    steps = TWA_EPOCHS * len(train_loader) // accelerator.gradient_accumulation_steps
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1, 0, steps * accelerator.num_processes
    )
    model, optimizer, scheduler = accelerator.prepare(plain, optimizer, scheduler)
    before = evaluate(accelerator, model, held_out)
    for _ in range(TWA_EPOCHS):
        train_epoch(accelerator, model, train_loader, optimizer, scheduler)
        accelerator.save_state(folder / "state")  # `load_state` resumes from here.
    after = evaluate(accelerator, model, held_out)

    alpha = optimizer.optimizer.averaging_weights()
    accelerator.print("averaging weights:", [round(weight, 2) for weight in alpha.tolist()])
    accelerator.print(f"held-out loss {before:.4f} -> {after:.4f} nats a byte")
    accelerator.end_training()


if __name__ == "__main__":
    main()
