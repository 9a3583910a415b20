"""The Macaron paper's BERT, and its checkpoints (github.com/zhuohan123/macaron-net, ``bert/``).

Pre-norm Macaron layers whose norms have no parameters; the first half-FFN always has ReLU, the second erf-GELU. When
pretraining, only the first token and the masked ones pass the last layer's second FFN.
"""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from macaron_ops.ops import Substep, split_layer
from macaron_ops.ops.checks import positive_int

from .embedding import TokenEmbedding, check_tokens
from .macaron import MacaronEncoderLayer
from .macaron_net import NO_PARAMETERS, encoder_name, layer_count, need, read_checkpoint
from .sublayers import ffn_substep

__all__ = ["MacaronBert"]

# Heads; all have dropout 0.1, attention dropout 0.1 and none after the activation.
ARCHITECTURES = {
    "transformer_bert_base_macaron": 12,
    "transformer_bert_L6_A12_macaron": 12,
    "transformer_classifier_base_macaron": 12,
}
SEGMENTS = 2


class _Layer(MacaronEncoderLayer):
    """ReLU in the first half-FFN, and norms without parameters."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, **options):
        super().__init__(d_model, nhead, dim_feedforward, activation="gelu", norm_first=True, **options)
        for name in ("macaron_norm", "norm1", "norm2"):
            setattr(self, name, nn.LayerNorm(d_model, elementwise_affine=False))

    def _first_half(self) -> Substep:
        return ffn_substep(
            self.macaron_linear1,
            self.macaron_linear2,
            self.macaron_norm,
            activation="relu",
            norm_first=True,
            activation_dropout=self.dropout,
            dropout=self.macaron_dropout,
            step=0.5,
        )

    def gathered(self, x: Tensor, padding: Tensor, rows: Tensor) -> Tensor:
        """``x (B, T, D)`` to ``(N, D)``: the second FFN of those tokens alone that ``rows``, flat indices, names."""
        *attend, ffn = self.substeps(key_padding_mask=padding)
        x = split_layer(x, attend, save=self.save)
        return split_layer(x.flatten(0, 1)[rows], [ffn], save=self.save)


class MacaronBert(nn.Module):
    """Masked-language and next-sentence model, or a classifier, of Macaron layers.

    Args:
        vocab_size: number of tokens. d_model: D. nhead: heads. num_layers: at least 1.
        dim_feedforward: the total of both half-FFNs.
        classes: None: the pretraining model; else a classifier of the first token.
        padding_idx: this token is padding. Of the segments too, the vector of that number is not trained.
        dropout, attention_dropout, activation_dropout: probabilities, in training.
        save: memory policy, ``"fast"`` or ``"lean"``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 768,
        nhead: int = 12,
        num_layers: int = 12,
        dim_feedforward: int = 3072,
        *,
        classes: int | None = None,
        padding_idx: int = 1,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        save: str = "fast",
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        positive_int("num_layers", num_layers)
        self.padding_idx = padding_idx
        self.embedding = TokenEmbedding(vocab_size, d_model, positions="fairseq", padding_idx=padding_idx, **factory)
        self.segments = nn.Embedding(
            SEGMENTS, d_model, padding_idx=padding_idx if padding_idx < SEGMENTS else None, **factory
        )
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            _Layer(
                d_model,
                nhead,
                dim_feedforward,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                batch_first=True,
                save=save,
                **factory,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        self.pretrains = classes is None
        if self.pretrains:
            self.transform = nn.Sequential(
                nn.Linear(d_model, d_model, **factory), nn.GELU(), nn.LayerNorm(d_model, **factory)
            )
            self.head = nn.Linear(d_model, vocab_size, bias=False, **factory)
            self.head.weight = self.embedding.tokens.weight
        self.classifier = nn.Linear(d_model, 1 if classes is None else positive_int("classes", classes), **factory)
        for linear in (m for m in self.layers.modules() if isinstance(m, nn.Linear)):
            nn.init.kaiming_normal_(linear.weight, nonlinearity="linear")
            nn.init.zeros_(linear.bias)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, masked: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The classes' logits ``(B, classes)``; or of the N masked tokens ``(N, vocab_size)``, with the next-sentence
        logits ``(B,)``.

        Args:
            tokens: ids ``(B, T)``, padded on the right. segments: 0 or 1 for each, ``(B, T)``.
            masked: bool ``(B, T)``: the tokens to predict; only for the pretraining model, and necessary there.
        """
        check_tokens("tokens", tokens)
        if (masked is None) == self.pretrains:
            raise ValueError(f"masked: expected a mask for the pretraining model alone; got {type(masked).__name__}")
        x = self.embedding(tokens)
        if segments is not None:
            x = x + self.segments(segments)
        x, padding = self.dropout(x), tokens == self.padding_idx
        for layer in self.layers[:-1]:
            x = layer(x, src_key_padding_mask=padding)
        batch, length = tokens.shape
        first = torch.arange(batch, device=tokens.device) * length
        rows = first if masked is None else torch.cat([first, masked.flatten().nonzero()[:, 0]])
        x = self.norm(self.layers[-1].gathered(x, padding, rows))
        scores = self.classifier(x[:batch])
        return (self.head(self.transform(x[batch:])), scores[:, 0]) if self.pretrains else scores

    @classmethod
    def from_fairseq(
        cls,
        checkpoint: str | os.PathLike | Mapping[str, Tensor],
        arch: str,
        *,
        padding_idx: int = 1,
        save: str = "fast",
    ) -> "MacaronBert":
        """The model of a checkpoint; arguments and errors as :meth:`MacaronTransformer.from_fairseq`.

        ``arch`` is ``"transformer_bert_base_macaron"``, ``"transformer_bert_L6_A12_macaron"`` or
        ``"transformer_classifier_base_macaron"``.
        """
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch: expected one of {', '.join(map(repr, ARCHITECTURES))}; got {arch!r}")
        found = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
        state = {name: t for name, t in found.items() if name.partition(".")[2] not in NO_PARAMETERS}
        vocabulary, width = need(state, "encoder.embed_tokens.weight").shape
        classifies = "classifier" in arch
        model = cls(
            vocabulary,
            width,
            ARCHITECTURES[arch],
            layer_count(state, "encoder"),
            2 * need(state, "encoder.layers.0.fc1.weight").shape[0],
            classes=need(state, "classifier.weight").shape[0] if classifies else None,
            padding_idx=padding_idx,
            save=save,
            dtype=state["encoder.embed_tokens.weight"].dtype,
        )
        if not classifies and not torch.equal(need(state, "embed_out"), state["encoder.embed_tokens.weight"]):
            model.head.weight = nn.Parameter(torch.empty_like(model.head.weight))
        names = model._names()
        unknown = sorted(state.keys() - set(names.values()))
        if unknown:
            raise ValueError(f"checkpoint: expected the tensors of {arch!r}; got also {', '.join(unknown[:5])}")
        model.load_state_dict({ours: need(state, theirs) for ours, theirs in names.items()})
        return model

    def to_fairseq(self) -> dict[str, Tensor]:
        """The tensors under the names of that code."""
        state = self.state_dict()
        renamed = {theirs: state[ours] for ours, theirs in self._names().items()}
        return {
            **renamed,
            "encoder.version": torch.tensor([2.0]),
            "encoder.embed_positions._float_tensor": torch.zeros(1),
        }

    def _names(self) -> dict[str, str]:
        """Their names of our tensors."""
        fixed = {
            "embedding.tokens.weight": "encoder.embed_tokens.weight",
            "segments.weight": "encoder.embed_segment.weight",
            "head.weight": "embed_out",
        }
        return {
            ours: fixed.get(ours)
            or (
                f"encoder.{encoder_name(ours)}"
                if ours.startswith("layers.")
                else ours.replace("transform", "mid_layer")
            )
            for ours in self.state_dict()
        }
