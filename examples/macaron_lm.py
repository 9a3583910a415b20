"""Trains two small language models on the text that Python ships, for a minute on the CPU, and compares them.

Seen as a time step of dx/dt = A(x) + B(x), with A attention and B the feed-forward network, the standard layer is the
Lie-Trotter splitting A, B. The Macaron layer is Strang's: half a step of B, a whole step of A, half a step of B. Here
each half-FFN has half the hidden width, so that both models have the same weight matrices in total (Strang has one
LayerNorm and one bias more per layer). Both see the same batches in the same order, one step each in turn.

The loss is in nats per character, on the last tenth of the text, which is not trained on. One run of a minute with one
seed is a demonstration and not evidence: try --seed and --seconds.

    python examples/macaron_lm.py
    python examples/macaron_lm.py --seconds 600 --d-model 192 --layers 6
"""

import argparse
import sys
import time
from pydoc_data.topics import topics

import torch

from macaron_ops.nn import MacaronLM

SCHEMES = {"Lie-Trotter (A, B)": "lie_trotter_AB", "Strang (B/2, A, B/2)": "strang_BAB"}
PEAK_RATE = 3e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for both models together")
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="characters in a sequence")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.seconds <= 0:
        parser.error(f"--seconds: expected more than 0; got {args.seconds}")

    text = "\n".join(topics.values())
    alphabet = sorted(set(text))
    ids = torch.tensor([alphabet.index(character) for character in text])
    split = len(ids) * 9 // 10
    train, held_out = ids[:split], ids[split:]
    windows = held_out[: len(held_out) // (args.tokens + 1) * (args.tokens + 1)].view(-1, args.tokens + 1)[::8]

    models, optimisers = {}, {}
    for name, scheme in SCHEMES.items():
        torch.manual_seed(args.seed)
        models[name] = MacaronLM(len(alphabet), args.d_model, nhead=4, num_layers=args.layers, scheme=scheme)
        optimisers[name] = torch.optim.AdamW(models[name].parameters(), lr=PEAK_RATE, weight_decay=0.01)
        parameters = sum(p.numel() for p in models[name].parameters())
        print(f"{name:22} {parameters:,} parameters")
    print(f"{len(text):,} characters of {len(alphabet)} kinds\n")

    generator = torch.Generator().manual_seed(args.seed)
    steps, losses, start = 0, {}, time.perf_counter()
    while (done := (time.perf_counter() - start) / args.seconds) < 1 or steps == 0:
        at = torch.randint(len(train) - args.tokens, (args.batch, 1), generator=generator)
        batch = train[at + torch.arange(args.tokens + 1)]
        for name, model in models.items():
            for group in optimisers[name].param_groups:
                group["lr"] = PEAK_RATE * min(1.0, (steps + 1) / 50) * max(0.0, 1 - done)
            _, loss = model(batch[:, :-1], batch[:, 1:])
            optimisers[name].zero_grad()
            loss.backward()
            optimisers[name].step()
            losses[name] = loss.item() if name not in losses else 0.95 * losses[name] + 0.05 * loss.item()
        steps += 1
        progress(done, steps, args.seconds, losses)
    print(file=sys.stderr)

    for name, model in models.items():
        with torch.no_grad():
            parts = windows.split(64)
            total = sum(model(part[:, :-1], part[:, 1:])[1].item() * len(part) for part in parts)
        prompt = torch.tensor([[alphabet.index(character) for character in "The "]])
        sample = model.generate(prompt, 120, temperature=0.7, seed=args.seed)[0].tolist()
        print(f"\n{name}: {total / len(windows):.3f} nats per character after {steps} steps, on text it has not seen")
        print("  " + repr("".join(alphabet[i] for i in sample)))


def progress(done: float, steps: int, seconds: float, losses: dict[str, float]) -> None:
    """One line that is written over, on a terminal."""
    if sys.stderr.isatty():
        filled = round(30 * min(done, 1.0))
        values = "  ".join(f"{name.split()[0]} {loss:.3f}" for name, loss in losses.items())
        left = max(0.0, seconds * (1 - done))
        print(f"\r[{'#' * filled:30}] {left:3.0f} s left  step {steps}  {values} ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
