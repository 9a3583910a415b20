"""The splitting error of the trained MiniLM-L6 on real sentences, layer by layer and token by token."""

from __future__ import annotations

import torch

from macaron_ops import splitting_error
from macaron_ops.integrations.splitting_error import MEASURES

from ..options import Options
from ..suites import model

TITLE = "The splitting error of a real model: MiniLM-L6"
TEXT = (
    "Each layer is taken as the Lie-Trotter step, with Euler substeps of length 1, for dx/dt = A(x) "
    "+ B(x), where A and B "
    "are its own sublayers minus x, norms included, frozen at the tokens that reach it. Shown is how far the layer, a "
    "Strang step and others end from the finely resolved flow of those fields, in units of the distance that the flow "
    "moves the token; the commutator term is |[A, B](x)| / 2. The fields of a post-norm layer pull every token to a "
    "shell with rate 1, and one Euler step of length 1 goes all the way where the flow does not: this, and not the "
    "splitting, is most of the layer's distance (the exact rows). A trained layer need not approximate its flow, and "
    "nothing here says that a nearer one would be a better model."
)

_SENTENCES = {"quick": 2, "normal": 8, "full": 32}
_BATCH = 4  # sentences of nearly one length: padding is computed as well
_QUANTILES = (10, 25, 50, 75, 90)


def run(options: Options) -> dict[str, object]:
    count = _SENTENCES[options.effort]
    work = model.workload(count, min(_BATCH, count), options.seed)
    encoder = model.load_model().to(options.device)
    runs = [
        splitting_error(encoder, {name: tensor.to(options.device) for name, tensor in batch.items()})
        for batch in work.batches
    ]
    layers = []
    for parts in zip(*runs, strict=True):
        errors = {name: torch.cat([part.errors[name] for part in parts]) for name in MEASURES}
        layers.append(
            {
                "layer": parts[0].name,
                "moved": _quantiles(torch.cat([part.moved for part in parts])),
                "size": _quantiles(torch.cat([part.size for part in parts])),
                "errors": {name: _quantiles(values) for name, values in errors.items()},
                "resolved": max(part.resolved for part in parts),
            }
        )
    encoder.cpu()
    return {
        "model": model.NAME,
        "sentences": count,
        "tokens": work.real_tokens,
        "measures": MEASURES,
        "layers": layers,
        "sentence": _sentence(work.batches[len(runs) // 2], runs[len(runs) // 2]),
    }


def table(data: dict[str, object]) -> list[tuple[str, ...]]:
    head = (f"median of {data['tokens']} tokens", "moves", *(name.replace("_", " ") for name in data["measures"]))
    return [
        head,
        *(
            (
                layer["layer"],
                f"{layer['moved']['50'] / layer['size']['50']:.2f}",
                *(f"{layer['errors'][name]['50']:.2f}" for name in data["measures"]),
            )
            for layer in data["layers"]
        ),
    ]


def _sentence(batch: dict[str, torch.Tensor], results: list) -> dict[str, object]:
    """Token by token, one sentence: the last and longest of its batch."""
    mask = batch["attention_mask"].bool()
    length = int(mask[-1].sum())
    words = model.tokenizer().convert_ids_to_tokens(batch["input_ids"][-1][:length].tolist())
    return {
        "tokens": words,
        "lie_trotter": [result.errors["lie_trotter"][-length:].tolist() for result in results],
        "commutator": [result.errors["commutator"][-length:].tolist() for result in results],
    }


def _quantiles(values: torch.Tensor) -> dict[str, float]:
    return {str(q): values.double().quantile(q / 100).item() for q in _QUANTILES}
