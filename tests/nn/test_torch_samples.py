"""Claim: on every sample input that torch tests its own Transformer layers with, the fused Lie-Trotter layers give
torch's outputs, and its gradients in inputs and parameters."""

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import (
    module_inputs_torch_nn_TransformerDecoderLayer,
    module_inputs_torch_nn_TransformerEncoderLayer,
)

from macaron_ops.nn import LieTrotterDecoderLayer, LieTrotterEncoderLayer
from tests.nn.tools import output_and_grads, randomize, twin

LAYERS = {
    "encoder": (
        module_inputs_torch_nn_TransformerEncoderLayer,
        nn.TransformerEncoderLayer,
        LieTrotterEncoderLayer,
    ),
    "decoder": (
        module_inputs_torch_nn_TransformerDecoderLayer,
        nn.TransformerDecoderLayer,
        LieTrotterDecoderLayer,
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_sample(kind, training, device):
    samples, theirs, ours = LAYERS[kind]
    found = samples(None, device, torch.float64, True, training)
    assert len(found) >= 35
    for sample in found:
        constructor, forward = sample.constructor_input, sample.forward_input
        build = {**constructor.kwargs, "dtype": torch.float64, "device": device}
        expected = randomize(theirs(*constructor.args, **build)).train(training)
        layer = twin(ours(*constructor.args, **build), expected).train(training)
        torch.testing.assert_close(
            output_and_grads(layer, *forward.args, **forward.kwargs),
            output_and_grads(expected, *forward.args, **forward.kwargs),
            msg=lambda text, sample=sample: f"{sample.desc}: {text}",
        )
        with torch.no_grad():
            torch.testing.assert_close(
                layer(*forward.args, **forward.kwargs), expected(*forward.args, **forward.kwargs)
            )
