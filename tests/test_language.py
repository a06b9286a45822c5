"""Language models: the model, text as a data set, and the stage as a user calls it."""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import language_report
import numpy as np
import pytest
import torch
from common import ema, of_decay
from test_parallel import succeed as succeed_under_torchrun
from test_scripts import (
    assert_equal,
    assert_same_checkpoints,
    call,
    killed_in,
    refuse,
    succeed,
    without_seconds,
)
from torch import nn
from torch.nn import functional as F

import models
from models.gpt import GPT, rotate
from training import text
from training.files import save
from training.loop import evaluate
from twa.files.checkpoints import average, load_into, load_state_dict
from twa.files.formats import load

ROOT = Path(__file__).resolve().parents[1]
TRAIN, TWA = "lm/train.py", "train_twa.py"
CONTEXT, BATCH = 16, 4
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the model ---


@pytest.mark.parametrize(
    ("name", "vocabulary", "parameters"),
    [("gpt", 256, 857_216), ("gpt-3M", 256, 3_295_488), ("gpt-124M", 50_257, 123_551_232)],
)
def test_sizes(name, vocabulary, parameters):
    with torch.device("meta"):
        model = models.gpt.build(name, vocabulary, CONTEXT)
        assert model(torch.zeros(2, CONTEXT).long()).shape == (2, CONTEXT, vocabulary)
    assert sum(p.numel() for p in model.parameters()) == parameters


def plain(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The logits for tokens [T], written out: complex rotations, sums over positions and heads."""
    weights = {key: value.double() for key, value in model.state_dict().items()}
    length = len(tokens)

    def normed(x, name):
        eps = torch.finfo(torch.float32).eps
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]

    x = weights["embedding.weight"][tokens]
    for i, block in enumerate(model.blocks):
        name, heads = f"blocks.{i}", block.attention.heads
        h, mixed = normed(x, f"{name}.attention_norm"), []
        q, k, v = (
            (h @ weights[f"{name}.attention.{part}.weight"].T).view(length, heads, -1)
            for part in ("query", "key", "value")
        )
        channels = q.shape[-1]
        speeds = 10_000.0 ** (-torch.arange(channels // 2).double() / (channels // 2))
        for head in range(heads):
            pairs = [
                torch.complex(*part[:, head].chunk(2, dim=1))
                * torch.polar(
                    torch.ones(length, channels // 2).double(),
                    torch.arange(length).double().outer(speeds),
                )
                for part in (q, k)
            ]
            scores = (pairs[0] @ pairs[1].conj().T).real / math.sqrt(channels)
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
            mixed.append(torch.softmax(scores, 1) @ v[:, head])
        x = x + torch.cat(mixed, 1) @ weights[f"{name}.attention.out.weight"].T
        h = normed(x, f"{name}.mlp_norm")
        gate, up = (h @ weights[f"{name}.mlp.{part}.weight"].T for part in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[f"{name}.mlp.down.weight"].T
    return normed(x, "norm") @ weights["head.weight"].T


def test_logits_are_those_of_the_formulas_in_float64():
    torch.manual_seed(0)
    model = GPT(50, width=24, layers=2, heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(50, (CONTEXT,))
    expected = plain(model, tokens)
    assert torch.allclose(model(tokens[None])[0].double(), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


def test_the_product_of_query_and_key_depends_on_their_distance_alone():
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    products = rotate(query.repeat(20, 1)) @ rotate(key.repeat(20, 1)).T
    for distance in range(20):
        assert torch.allclose(products.diagonal(distance), products[0, distance], atol=1e-5)
    assert products[0].std() > 0.1


def test_tied_weights_are_one():
    model = GPT(50, width=24, layers=1, heads=2, tied=True)
    assert model.head.weight is model.embedding.weight


# --- text ---


def write_text(folder: Path, files: int = 60) -> Path:
    """A folder of text, with a subfolder and a hidden file, of which some falls in each part."""
    (folder / "below").mkdir(parents=True)
    for i in range(files):
        where = folder / ("below" if i % 2 else ".") / f"{i}.txt"
        where.write_text("".join(f"line {j} of file {i} is {i * j} ä\n" for j in range(12)))
    (folder / ".hidden").write_text("hidden")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, words) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train([str(path) for path in words.rglob("*.txt")], vocab_size=300)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def load_text(path: Path, tokenizer: Path | None = None) -> tuple[text.Split, ...]:
    return text.load(path, text.Vocabulary.read(tokenizer), CONTEXT)


def test_every_file_is_in_one_part_by_its_name_alone(words, tmp_path):
    parts = dict(zip(("train", "validation", "test"), load_text(words), strict=True))
    files = sorted(path for path in words.rglob("*.txt"))
    for part, split in parts.items():
        own = [f for f in files if text.part_of(f.relative_to(words).as_posix()) == part]
        assert bytes(split.tokens) == b"".join(file.read_bytes() for file in own)
        assert split.size == len(split.tokens) > CONTEXT
    other = write_text(tmp_path / "other")
    (other / "0.txt").write_text("of other content")
    assert bytes(load_text(other)[2].tokens) == bytes(parts["test"].tokens)


def test_the_parts_have_their_share_of_many_files():
    parts = [text.part_of(f"{i}.py") for i in range(10_000)]
    assert abs(parts.count("test") - 250) < 50
    assert abs(parts.count("validation") - 250) < 50


def test_one_file_is_cut_into_the_parts(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("äöü" * 1000)
    pieces = [bytes(split.tokens) for split in load_text(file)]
    assert b"".join(pieces) == file.read_bytes()
    assert [round(len(piece) / 60) for piece in pieces] == [95, 2, 2]
    assert all(piece.decode() for piece in pieces)  # no character is cut


def test_a_text_that_changed_is_read_again(tmp_path):
    folder = write_text(tmp_path / "changing")
    before = load_text(folder)[0]
    (folder / "new.txt").write_text("more of it " * 50)
    assert text.part_of("new.txt") == "train"
    assert len(load_text(folder)[0].tokens) == len(before.tokens) + 550


def test_without_a_folder_it_is_the_standard_library():
    parts = text.load(None, text.Vocabulary(), CONTEXT)
    assert parts[0].size > 5e6
    everything = [bytes(part.tokens) for part in parts]
    source = Path(argparse.__file__).read_bytes()
    assert sum(source in part for part in everything) == 1


def loader(split: text.Split, **arguments) -> text.Loader:
    return text.Loader(split, BATCH, **{"train": True, "seed": 3, "device": CPU} | arguments)


def test_a_batch_depends_on_seed_epoch_and_its_number_alone(words):
    split = load_text(words)[0]
    first = loader(split, steps=6)
    first.set_epoch(2)
    batches = list(first)
    assert len(batches) == 6
    again = loader(split, steps=6)
    again.set_epoch(2)
    for (tokens, labels), (same, same_labels) in zip(batches[4:], again.batches(4), strict=True):
        assert torch.equal(tokens, same)
        assert torch.equal(labels, same_labels)
    for changed in (loader(split, steps=6), loader(split, steps=6, seed=4)):
        changed.set_epoch(2 if changed.seed == 4 else 3)
        assert not torch.equal(next(iter(changed))[0], batches[0][0])
    shares = [loader(split, steps=6, rank=rank, world=2) for rank in (0, 1)]
    for share in shares:
        share.set_epoch(2)
    for (tokens, labels), *parts in zip(batches, *shares, strict=True):
        assert torch.equal(tokens, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_windows_are_pieces_of_the_text_and_labels_the_tokens_after(words):
    split = load_text(words)[0]
    content = bytes(split.tokens)
    for tokens, labels in loader(split, steps=3):
        assert tokens.dtype == labels.dtype == torch.int64
        for window, following in zip(tokens, labels.view(BATCH, CONTEXT), strict=True):
            assert bytes([*window.tolist(), int(following[-1])]) in content
            assert torch.equal(window[1:], following[:-1])


def test_batches_go_to_an_accelerator_from_pinned_memory(words, monkeypatch):
    pinned, split = [], load_text(words)[0]
    pin = lambda tensor: pinned.append(tuple(tensor.shape)) or tensor  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert len(list(loader(split, steps=2))) == 2 and not pinned
    moved = list(loader(split, steps=2, device=torch.device("meta")))
    assert pinned == [(BATCH, CONTEXT + 1)] * 2
    assert all(tensor.is_meta for batch in moved for tensor in batch)


def test_windows_of_training_begin_everywhere(tmp_path):
    tokens = np.arange(CONTEXT + 3, dtype=np.uint8)
    split = text.Split(tokens, len(tokens), text.Spec(text.Vocabulary(), CONTEXT))
    begins = {int(row[0]) for batch, _ in loader(split, steps=20) for row in batch}
    assert begins == {0, 1, 2}


@pytest.mark.parametrize("cut", ["bytes", "tokens"])
def test_loss_bits_and_perplexity_are_those_of_a_plain_sum(words, cut, request):
    path = request.getfixturevalue("tokenizer") if cut == "tokens" else None
    split = load_text(words, path)[2]
    torch.manual_seed(0)
    model = GPT(split.spec.vocabulary.size, width=16, layers=1, heads=2)
    tokens = torch.from_numpy(split.tokens.astype(np.int64))
    nats = []
    for start in range(0, len(tokens) - CONTEXT, CONTEXT):
        logits = plain(model, tokens[start : start + CONTEXT])
        for i, row in enumerate(logits):
            nats.append(float(row.logsumexp(0) - row[tokens[start + i + 1]]))
    test = loader(split, train=False)
    measured = test.measures(evaluate(model, test))
    loss = sum(nats) / len(nats)
    assert measured["loss"] == pytest.approx(loss, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    size = sum(
        len(p.read_bytes())
        for p in words.rglob("*.txt")
        if text.part_of(p.relative_to(words).as_posix()) == "test"
    )
    bits = loss * len(tokens) / size / math.log(2)
    assert measured["bits_a_byte"] == pytest.approx(bits, rel=1e-5)
    assert (bits < loss / math.log(2)) == (cut == "tokens")


# --- the stage ---


def where(run: Path, words: Path, steps: int = 12) -> list:
    common = ["--data-dir", words, "--context", CONTEXT, "--batch-size", BATCH, "-p", 1]
    saves = ["--steps", steps, "--test-every", 6, "--save-every", 2, "--warmup", 4]
    return ["--dir", run, *common, *saves]


@pytest.fixture(scope="module")
def base(tmp_path_factory, words) -> Path:
    """12 steps, warm-up in the first 4, a checkpoint every 2."""
    run = tmp_path_factory.mktemp("runs") / "base"
    succeed(call(TRAIN, *where(run, words)))
    return run


@pytest.fixture
def run(base, tmp_path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run"))


def twa_flags(run: Path, words: Path) -> list:
    text_flags = ["--datasets", "Text", "--arch", "gpt", "--data-dir", words, "--context", CONTEXT]
    window = ["--params_start", 2, "--params_end", 7, "--batch-size", BATCH, "--steps", 4]
    return [*text_flags, *window, "--save-dir", run / "checkpoints", "--log-dir", run, "-p", 1]


def test_it_leaves_a_checkpoint_every_so_many_steps(base, words):
    left = {path.name for path in (base / "checkpoints").iterdir()}
    assert left == {"state.pt", *(f"{i}.pt" for i in range(7))}
    last = without_seconds(base / "metrics.jsonl")[-1]
    test = loader(load_text(words)[2], train=False)
    model = models.gpt.build("gpt", 256, CONTEXT)
    load_into(model, base / "checkpoints/6.pt")
    measured = test.measures(evaluate(model, test))
    for key, value in measured.items():
        assert last[f"test_{key}"] == pytest.approx(value, rel=1e-5)
    assert last["train_loss"] < math.log(256)


def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(base, words, tmp_path):
    arguments = where(tmp_path, words)
    with killed_in(2):
        call(TRAIN, *arguments)
    assert not (tmp_path / "checkpoints/6.pt").exists()
    succeed(call(TRAIN, *arguments, "--resume"))
    assert_same_checkpoints(tmp_path, base, range(7))
    assert without_seconds(tmp_path / "metrics.jsonl") == without_seconds(base / "metrics.jsonl")


def test_a_run_goes_on_with_the_same_text_alone_wherever_that_lies(run, words, tmp_path):
    moved = shutil.copytree(words, tmp_path / "moved")
    succeed(call(TRAIN, *where(run, moved), "--resume"))
    path = run / "checkpoints/state.pt"
    (moved / "0.txt").write_text("other text")
    line = refuse(run, TRAIN, *where(run, moved), "--resume")
    assert line.startswith(f"error: {path}: was saved with data_dir of ")
    assert line.endswith("give that, or another --dir to start anew")


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_a_decay_goes_on_from_the_saved_state_as_a_plain_loop_does(base, words, tmp_path, shape):
    state = base / "checkpoints/state.pt"
    decay = ["--warmup", 0, "--decay", shape, "--decay-steps", 4, "--seed", 7, "--initial", state]
    succeed(call(TRAIN, *where(tmp_path, words, steps=6), *decay))

    saved = load(state)
    model = models.gpt.build("gpt", 256, CONTEXT)
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    optimizer.load_state_dict(saved["optimizer"])
    batches = loader(load_text(words)[0], steps=6, seed=7)
    batches.set_epoch(1)
    for step, (tokens, labels) in enumerate(batches):
        share = max(0, step - 2) / 4
        factor = 1 - (share if shape == "linear" else math.sqrt(share))
        optimizer.param_groups[0]["lr"] = 2e-3 * factor
        F.cross_entropy(model(tokens).flatten(0, 1), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for key, value in load_state_dict(tmp_path / "checkpoints/3.pt").items():
        assert torch.allclose(value, model.state_dict()[key], rtol=0, atol=1e-6), key


def test_a_decay_begins_from_any_checkpoint(base, words, tmp_path):
    mean = average([base / f"checkpoints/{i}.pt" for i in (4, 5, 6)])
    save(mean, tmp_path / "mean.pt")
    flags = ["--warmup", 0, "--decay-steps", 6, "--initial", tmp_path / "mean.pt"]
    succeed(call(TRAIN, *where(tmp_path / "run", words, steps=6), *flags))
    assert_equal(load_state_dict(tmp_path / "run/checkpoints/0.pt"), mean)


def test_of_other_checkpoints_a_decay_takes_the_weights_alone(run, words, tmp_path):
    """What they hold of an optimizer is no moments of AdamW: that of TWA, or of a loop with SGD."""
    succeed(call(TWA, *twa_flags(run, words)))
    weights = load_state_dict(run / "checkpoints/6.pt")
    moments = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}
    save({"model": weights, "optimizer": moments}, run / "loop.pt")
    for name, expected in (("twa_state.pt", run / "twa_state.pt"), ("loop.pt", weights)):
        flags = ["--warmup", 0, "--decay-steps", 6, "--initial", run / name]
        succeed(call(TRAIN, *where(tmp_path / name, words, steps=6), *flags))
        assert_equal(
            load_state_dict(tmp_path / name / "checkpoints/0.pt"), load_state_dict(expected)
        )


def test_twa_and_the_table_at_the_end(run, words, tmp_path):
    decay = ["--warmup", 0, "--decay-steps", 6, "--initial", run / "checkpoints/state.pt"]
    succeed(call(TRAIN, *where(run / "decay", words, steps=6), *decay))
    printed = succeed(call(TWA, *twa_flags(run, words))).out
    assert "note:" not in printed
    results = json.loads((run / "twa.json").read_text())
    model = models.gpt.build("gpt", 256, CONTEXT)
    load_into(model, run / "twa.pt")
    test = loader(load_text(words)[2], train=False)
    for key, value in test.measures(evaluate(model, test)).items():
        assert results["results"]["TWA"][key] == pytest.approx(value, rel=1e-5)
    assert results["results"]["TWA"]["steps"] == 16
    alpha = results["averaging_weights"]
    for key, tensor in load_state_dict(run / "twa.pt").items():
        states = {name: load_state_dict(run / "checkpoints" / name)[key] for name in alpha}
        expected = sum(alpha[name] * state.double() for name, state in states.items())
        assert torch.allclose(tensor.double(), expected, rtol=0, atol=1e-5), key

    shown = ["--dir", run, "--decay-dir", run / "decay", "--out", run, "--tokens", 5]
    lines = succeed(call("lm/show.py", *shown)).out.splitlines()
    names = ["last", "mean of last 5", "decay, linear", "TWA"]
    rows = [line for line in lines if line.startswith(tuple(names)) and "'" not in line]
    assert len(rows) == len(names)
    assert json.loads((run / "lm.json").read_text())["results"]["decay, linear"]["steps"] == 18
    assert sum("'def " in line or '"def ' in line for line in lines) == len(names) + 1  # and SWA
    assert (run / "lm.png").stat().st_size > 10_000


def test_stopped_twa_ends_with_the_weights_of_an_uninterrupted_one(run, words, tmp_path):
    flags = [*twa_flags(run, words), "--epochs", 2]
    succeed(call(TWA, *flags, "--out", tmp_path / "whole"))
    with killed_in(2):
        call(TWA, *flags, "--out", tmp_path / "stopped")
    succeed(call(TWA, *flags, "--out", tmp_path / "stopped", "--resume"))
    assert_equal(*(load_state_dict(tmp_path / name / "twa.pt") for name in ("whole", "stopped")))


def test_a_window_that_reaches_into_the_warm_up_is_noted(run, words):
    printed = succeed(call(TWA, *twa_flags(run, words), "--params_start", 1)).out
    assert "note: the window begins within the warm-up" in printed
    assert "--params_start 2" in printed


def test_coefficients_are_trained_on_the_validation_part_with_split(run, words):
    succeed(call(TWA, *twa_flags(run, words), "--split", "--out", run / "split"))
    succeed(call(TWA, *twa_flags(run, words), "--out", run / "train"))
    losses = [without_seconds(run / d / "twa_metrics.jsonl")[0] for d in ("split", "train")]
    assert losses[0]["train_loss"] != losses[1]["train_loss"]
    assert "note:" not in (run / "split/log").read_text()


def test_two_ranks_give_what_one_gives(base, words, tmp_path):
    flags = where(tmp_path / "two", words)
    succeed_under_torchrun(2, TRAIN, *flags)
    for number in (0, 6):
        one, two = (
            load_state_dict(folder / f"checkpoints/{number}.pt")
            for folder in (base, tmp_path / "two")
        )
        for key, tensor in one.items():
            assert torch.allclose(two[key], tensor, rtol=0, atol=2e-5), key
    succeed(call(TWA, *twa_flags(base, words), "--out", tmp_path / "TWA one"))
    succeed_under_torchrun(2, TWA, *twa_flags(base, words), "--out", tmp_path / "TWA two")
    one, two = (json.loads((tmp_path / f"TWA {n}/twa.json").read_text()) for n in ("one", "two"))
    for name, alpha in one["averaging_weights"].items():
        assert two["averaging_weights"][name] == pytest.approx(alpha, abs=1e-3)
    for key in ("loss", "bits_a_byte"):
        assert two["results"]["TWA"][key] == pytest.approx(one["results"]["TWA"][key], rel=1e-4)


def test_a_tokenizers_run_and_its_refusals(words, tokenizer, tmp_path, run):
    flags = [*where(tmp_path / "tokens", words), "--tokenizer", tokenizer]
    succeed(call(TRAIN, *flags))
    model = load_state_dict(tmp_path / "tokens/checkpoints/6.pt")
    assert model["embedding.weight"].shape[0] == 300
    other = refuse(tmp_path / "tokens", TWA, *twa_flags(tmp_path / "tokens", words))
    assert "no --tokenizer" in other
    assert str(tokenizer) in other
    other = refuse(run, TWA, *twa_flags(run, words), "--tokenizer", tokenizer)
    assert f"--tokenizer {tokenizer}: the checkpoints' run had another vocabulary" in other
    (run / "run.json").unlink()
    assert "embedding.weight" in refuse(run, TWA, *twa_flags(run, words), "--tokenizer", tokenizer)

    bad = write_text(tmp_path / "bad")
    (bad / "7.txt").write_bytes(b"caf\xe9")
    flags = [*where(tmp_path / "new", bad), "--tokenizer", tokenizer]
    assert "7.txt: is not text in UTF-8" in refuse(tmp_path, TRAIN, *flags)
    assert "is no tokenizer" in refuse(tmp_path, TRAIN, *flags, "--tokenizer", bad / "7.txt")
    assert "cannot be read" in refuse(tmp_path, TRAIN, *flags, "--tokenizer", tmp_path / "none")
    assert bytes(load_text(bad)[0].tokens).count(b"caf\xe9") == 1


@pytest.mark.parametrize(
    ("make", "words_of_it"),
    [
        (lambda path: path.mkdir(), "holds no files"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_text("short"), "one context has 16 + 1"),
        (lambda path: None, "no such file or folder"),
        (lambda path: (path.mkdir(), (path / "a").touch(), (path / "b").touch()), "has 0 tokens"),
    ],
)
def test_texts_that_are_too_short_are_refused(tmp_path, make, words_of_it):
    path = tmp_path / "text"
    make(path)
    line = refuse(tmp_path, TRAIN, *where(tmp_path / "run", path))
    assert words_of_it in line
    assert str(path) in line


@pytest.mark.parametrize(
    ("flags", "words_of_it"),
    [
        (["--steps", 7], "multiple"),
        (["--decay-steps", 20], "--warmup 4 and --decay-steps 20: more than the 12"),
        (["--lr", "nan"], "--lr"),
        (["--initial", "gone.pt"], "gone.pt"),
        (["--initial", "list.pt"], "list.pt: is not a state_dict"),
        (["--arch", "VGG16"], "--arch"),
    ],
)
def test_odd_values_are_refused(words, tmp_path, flags, words_of_it, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save([1, 2], "list.pt")
    line = refuse(tmp_path, TRAIN, *where(tmp_path / "run", words), *flags)
    assert words_of_it in line


@pytest.mark.parametrize(
    ("flags", "words_of_it"),
    [
        (["--arch", "VGG16"], "is no language model"),
        (["--images", 5], "--images: not with --datasets Text"),
        (["--randaugment", 9], "--randaugment: not with --datasets Text"),
        (["--val-ratio", 20], "--val-ratio: not with --datasets Text"),
        (["--strict-images"], "--strict-images: only with --datasets ImageNet"),
        (["--datasets", "Digits", "--steps", 5], "--steps: only with --datasets Text"),
    ],
)
def test_twa_refuses_flags_that_do_not_go_with_text(run, words, flags, words_of_it):
    assert words_of_it in refuse(run, TWA, *twa_flags(run, words), *flags)


def test_show_refuses_a_run_that_is_not_finished(tmp_path):
    shown = ["--dir", tmp_path, "--decay-dir", tmp_path, "--out", tmp_path]
    assert "is not finished" in refuse(tmp_path, "lm/show.py", *shown)
    assert "--prompt" in refuse(tmp_path, "lm/show.py", *shown, "--prompt", "")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """What SGD and TWA leave on images."""
    run = tmp_path_factory.mktemp("images")
    flags = ["--datasets", "Digits", "--arch", "PreResNet20", "--images", 256, "--epochs", 1]
    flags += ["--save-dir", run / "checkpoints", "--log-dir", run]
    succeed(call("train_sgd_cifar.py", *flags))
    succeed(call(TWA, *flags, "--params_end", 2))
    return run


def test_the_folders_of_image_runs_are_refused(run, words, images):
    shown = ["--dir", run, "--decay-dir", run, "--out", images]
    assert f"{images / 'twa.json'}: is not of language" in refuse(images, "lm/show.py", *shown)
    for flag in ("--dir", "--decay-dir"):
        line = refuse(images, "lm/show.py", *shown, flag, images)
        assert f"{images}: is of a run on images" in line
    line = refuse(run, TWA, *twa_flags(run, words), "--log-dir", images, "--out", run)
    assert f"{images}: is of a run on images" in line
    flags = ["--datasets", "Digits", "--params_end", 2, "--save-dir", images / "checkpoints"]
    line = refuse(images, TWA, *flags, "--arch", "PreResNet20", "--log-dir", run)
    assert f"{run}: is of a run on text" in line


def test_of_a_text_run_that_is_not_known_only_the_metrics_are_left_out(run, words):
    (run / "run.json").unlink()
    succeed(call(TWA, *twa_flags(run, words)))
    assert json.loads((run / "twa.json").read_text())["results"]["TWA"]["steps"] is None


def gpt2() -> nn.Module:
    """A model of transformers, from a config."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, **sizes))


def test_models_of_transformers_are_trained_and_averaged(words, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    run, name = tmp_path / "run", f"{__name__}:gpt2"
    succeed(call(TRAIN, *where(run, words), "--model-factory", name))
    flags = twa_flags(run, words)
    at = flags.index("--arch")
    flags[at : at + 2] = ["--model-factory", name]
    succeed(call(TWA, *flags))
    gpt2().load_state_dict(load_state_dict(run / "twa.pt"))

    for number in range(2, 7):  # as transformers' Trainer leaves them
        model = gpt2()
        load_into(model, run / f"checkpoints/{number}.pt")
        model.save_pretrained(run / f"folders/checkpoint-{500 * number}")
    flags += ["--save-dir", run / "folders", "--out", run / "other", "--params_end"]
    assert "no checkpoint-N with N in [2, 9)" in refuse(run, TWA, *flags, 9)
    succeed(call(TWA, *flags, 3001))
    assert_equal(*(load_state_dict(run / name) for name in ("other/twa.pt", "twa.pt")))
    flags += [3001, "--out", run / "from", "--train_start"]
    assert "folders/checkpoint-7: " in refuse(run, TWA, *flags, 7)
    assert "from checkpoint 2000" in succeed(call(TWA, *flags, 2000)).out


# --- coefficients and decays ---


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_a_mean_with_the_coefficients_of_a_decay_is_sgd_with_that_decay(shape):
    """On a fixed sequence of gradients, the identity of WSM."""
    gradients = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).double()
    points = torch.cat([torch.zeros(1, 5), -gradients.cumsum(0)])
    coefficients = torch.tensor(of_decay(shape, 10)).double()
    rates = torch.tensor(
        [1 - (i / 10 if shape == "linear" else math.sqrt(i / 10)) for i in range(1, 10)]
    )
    decayed = -(rates.double()[:, None] * gradients).sum(0)
    assert torch.allclose(coefficients @ points, decayed)


def test_ema_is_its_recursion():
    values = [3.0, -1.0, 4.0, 1.5]
    mean = values[0]
    for value in values[1:]:
        mean = 0.9 * mean + 0.1 * value
    assert sum(c * v for c, v in zip(ema(0.9, 4), values, strict=True)) == pytest.approx(mean)
    assert sum(ema(0.9, 4)) == pytest.approx(1)


def entry(loss: float, **more) -> dict:
    return {"steps": 10, "loss": loss, "validation_loss": loss, **more}


def test_differences_are_paired_by_seed_and_rates_are_chosen_by_the_first_seeds_validation():
    decays = {
        "decay, linear, from the mean, rate x 1 | 10": entry(1.5),
        "decay, linear, from the mean, rate x 0.1 | 10": entry(1.25, validation_loss=9.0),
        "decay, 1-sqrt, from the mean, rate x 0.1 | 10": entry(1.375, validation_loss=1.0),
    }
    runs = [
        decays | {"TWA by model | 10": entry(1.25)},
        {name: entry(2.0) for name in decays} | {"TWA by model | 10": entry(2.25)},
    ]
    tuned = language_report.chosen(runs, "from the mean", 10)
    assert tuned == "decay, 1-sqrt, from the mean, rate x 0.1 | 10"
    own_rate = [{name: run[name] for name in run if "x 0.1" not in name} for run in runs]
    assert language_report.chosen(own_rate, "from the mean", 10) is None
    mean, error = language_report.paired(runs, "TWA by model | 10", tuned)
    assert (mean, error) == (0.0625, pytest.approx(0.1875))
    told = "\n".join(language_report.differences(runs))
    assert "+0.0625 ± 0.1875 = +0.3 errors (decay, 1-sqrt, from the mean" in told
    assert "+0.0000 ± 0.2500 = +0.0 errors (decay, linear, from the mean" in told
