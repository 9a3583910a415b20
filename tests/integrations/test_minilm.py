"""Claim: the real MiniLM-L6 is the same model after ``replace_layers``: its embeddings of real sentences, its
``state_dict`` and its training."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import macaron_ops
from macaron_ops.bench import corpus
from macaron_ops.bench.suites.model import PACKAGE, disagreement, model_folder
from tests.integrations.compare import same_state

transformers = pytest.importorskip("transformers")
if importlib.util.find_spec(PACKAGE) is None:  # not imported: that alone would load its model
    pytest.skip(f"needs the package {PACKAGE}", allow_module_level=True)

AGREEMENT = 1e-6  # of embeddings, max(1 - cosine) in float32
TRAINING = 1e-4  # of losses, relative


@pytest.fixture(scope="module")
def minilm():
    return transformers.AutoModel.from_pretrained(model_folder(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenize(device):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)

    def call(sentences, length=128):
        batch = tokenizer(sentences, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in batch.items()}

    return call


def embed(model, batch):
    hidden, keep = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_embeddings_and_state(minilm, tokenize, attention, device):
    model = copy.deepcopy(minilm).to(device)
    model.set_attn_implementation(attention)
    state, sentences = same_state(model), corpus.sample(24, seed=0)
    with torch.no_grad():
        batch = tokenize(sentences)
        before = embed(model, batch)
        report = macaron_ops.replace_layers(model)
        after = embed(model, batch)
        alone = torch.cat([embed(model, tokenize([sentence])) for sentence in sentences[:6]])
        assert [entry.name for entry in report.replaced] == [f"encoder.layer.{i}" for i in range(6)]
        assert report.left == []
        assert disagreement(before, after) <= AGREEMENT
        assert disagreement(before[:6], alone) <= AGREEMENT
        assert same_state(model) == state
        macaron_ops.restore_layers(model)
        assert torch.equal(embed(model, batch), before)


def losses(model, batches):
    """Twenty steps of contrastive training: a sentence and the one that follows it in the text belong together."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-5)
    values = []
    for first, second in batches:
        optimiser.zero_grad()
        similarity = 20 * embed(model, first) @ embed(model, second).T
        loss = F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    return torch.tensor(values, dtype=torch.float64)


def test_twenty_training_steps(minilm, tokenize, device):
    text = corpus.sentences()
    batches = [
        (tokenize(text[i : i + 12 : 2], length=24), tokenize(text[i + 1 : i + 12 : 2], length=24))
        for i in range(0, 20 * 12, 12)
    ]
    original = copy.deepcopy(minilm).to(device)
    replaced = copy.deepcopy(original)
    macaron_ops.replace_layers(replaced)
    before, after = losses(original, batches), losses(replaced, batches)
    assert len(before) == 20
    difference = ((after - before) / before).abs().max()
    assert difference <= TRAINING


def test_the_whole_model_compiles_without_a_graph_break(minilm, tokenize, device):
    model, batch = copy.deepcopy(minilm).to(device), tokenize(corpus.sample(4, seed=1), length=16)
    macaron_ops.replace_layers(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert disagreement(embed(compiled, batch), embed(model, batch)) <= AGREEMENT
