"""Do the schemes train? Small language models of equal size on the text that Python ships, over three seeds."""

from __future__ import annotations

import statistics
from pydoc_data.topics import topics

import torch

from macaron_ops.nn import MacaronLM

from ..options import Options

TITLE = "A training check"
TEXT = (
    "MacaronLM of two layers of width 64 on characters of pydoc_data.topics, the same batches for both schemes, AdamW. "
    "Both have the same weight matrices in number and size (Strang has one LayerNorm and one bias "
    "more a layer). The loss is in "
    "nats per character on text that was not trained on. Three seeds say that both schemes train; a difference smaller "
    "than their spread says nothing, and a few hundred steps of small models say nothing about large ones."
)

SCHEMES = {"Lie-Trotter": "lie_trotter_AB", "Strang (Macaron)": "strang_BAB"}
SEEDS = (0, 1, 2)
_STEPS = {"quick": 40, "normal": 300, "full": 1500}
_WIDTH, _LAYERS, _HEADS, _TOKENS, _BATCH, _RATE = 64, 2, 4, 64, 16, 3e-3
_POINTS = 20  # of a curve


def run(options: Options) -> dict[str, object]:
    steps = _STEPS[options.effort]
    text = "\n".join(topics.values())
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([number[character] for character in text])
    train, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    windows = held_out[: len(held_out) // (_TOKENS + 1) * (_TOKENS + 1)].view(-1, _TOKENS + 1)[::32].to(options.device)
    curves = {
        name: [_train(scheme, seed, steps, len(alphabet), train, windows, options.device) for seed in SEEDS]
        for name, scheme in SCHEMES.items()
    }
    return {"steps": steps, "seeds": list(SEEDS), "characters": len(ids), "curves": curves}


def table(data: dict[str, object]) -> list[tuple[str, ...]]:
    head = ("scheme", "parameters", f"loss after {data['steps']} steps", "lowest", "highest", "spread over seeds")
    rows = []
    for name, runs in data["curves"].items():
        last = [run["losses"][-1] for run in runs]
        cells = (statistics.mean(last), min(last), max(last), max(last) - min(last))
        rows.append((name, f"{runs[0]['parameters']:,}", *(f"{value:.3f}" for value in cells)))
    return [head, *rows]


def _train(
    scheme: str,
    seed: int,
    steps: int,
    vocabulary: int,
    train: torch.Tensor,
    windows: torch.Tensor,
    device: torch.device,
) -> dict[str, object]:
    """One model's losses on the held-out windows, at points of its training."""
    torch.manual_seed(seed)
    model = MacaronLM(vocabulary, _WIDTH, _HEADS, _LAYERS, scheme=scheme, device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    every = max(1, steps // _POINTS)
    at, losses = [], []
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = _RATE * min(1.0, step / (0.1 * steps)) * (1 - (step - 1) / steps)
        start = torch.randint(len(train) - _TOKENS, (_BATCH, 1), generator=generator)
        batch = train[start + torch.arange(_TOKENS + 1)].to(device)
        _, loss = model(batch[:, :-1], batch[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % every == 0 or step == steps:
            with torch.no_grad():
                at.append(step)
                losses.append(model(windows[:, :-1], windows[:, 1:])[1].item())
    return {"seed": seed, "parameters": sum(p.numel() for p in model.parameters()), "at": at, "losses": losses}
