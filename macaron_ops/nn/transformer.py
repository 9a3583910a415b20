"""``MacaronTransformer``: the encoder-decoder of the Macaron paper, from token ids to logits."""

import torch.nn.functional as F
from torch import Tensor, nn

from macaron_ops.ops.checks import choice, positive_int

from .activation import Activation
from .embedding import TokenEmbedding, check_tokens
from .stacks import MacaronDecoder, MacaronEncoder

__all__ = ["MacaronTransformer"]

SHARING = ("none", "decoder", "all")


class MacaronTransformer(nn.Module):
    """Embeddings, :class:`MacaronEncoder`, :class:`MacaronDecoder`, and a linear map to the target vocabulary.

    As Lu et al. 2019, arXiv 1906.02762: pre-norm with a norm at the end of both stacks (``norm_first=False`` for
    post-norm), sinusoidal positions, matrices Xavier uniform, biases 0, embeddings from N(0, 1 / D). Their four
    models are ``(d_model, nhead, dim_feedforward, dropout)`` = (512, 4, 1024, .3) for IWSLT14, (512, 8, 2048, .1) and
    (1024, 16, 4096, .3) for WMT14, with ``attention_dropout`` and ``activation_dropout`` .1 and six layers.

    Args:
        src_vocab: source tokens. tgt_vocab: target tokens; None: the source's.
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
        layer_norm_eps, norm_first, bias: as ``nn.Transformer``; ``dim_feedforward`` is the total of both half-FFNs.
        attention_dropout, activation_dropout: None: as ``dropout``.
        positions: ``"sinusoidal"``, ``"learned"`` or ``"fairseq"``. max_len: longest sequence, of learned positions.
        padding_idx: this token is padding, in both vocabularies: nothing attends to it.
        share_embeddings: ``"decoder"``: the last linear map is the target embedding; ``"all"``: and the source
            embedding too (one vocabulary); ``"none"``.
        save: memory policy, ``"fast"`` or ``"lean"``. checkpoint: keep only the layers' inputs.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int | None = None,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        norm_first: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        attention_dropout: float | None = None,
        activation_dropout: float | None = None,
        positions: str = "sinusoidal",
        max_len: int = 1024,
        padding_idx: int | None = None,
        share_embeddings: str = "decoder",
        save: str = "fast",
        checkpoint: bool = False,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        src_vocab = positive_int("src_vocab", src_vocab)
        tgt_vocab = src_vocab if tgt_vocab is None else positive_int("tgt_vocab", tgt_vocab)
        choice("positions", positions, ("sinusoidal", "learned", "fairseq"))
        choice("share_embeddings", share_embeddings, SHARING)
        if share_embeddings == "all" and src_vocab != tgt_vocab:
            raise ValueError(f"share_embeddings: 'all' expects one vocabulary; got sizes {src_vocab} and {tgt_vocab}")
        embedding = {
            "positions": positions,
            "max_len": max_len,
            "padding_idx": padding_idx,
            "dropout": dropout,
            **factory,
        }
        layer = {
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "batch_first": True,
            "norm_first": norm_first,
            "bias": bias,
            "attention_dropout": attention_dropout,
            "activation_dropout": activation_dropout,
            "save": save,
            **factory,
        }
        self.padding_idx = padding_idx
        self.encoder = MacaronEncoder(d_model, nhead, num_encoder_layers, checkpoint=checkpoint, **layer)
        self.decoder = MacaronDecoder(d_model, nhead, num_decoder_layers, checkpoint=checkpoint, **layer)
        self.src_embedding = TokenEmbedding(src_vocab, d_model, **embedding)
        self.tgt_embedding = TokenEmbedding(tgt_vocab, d_model, **embedding)
        self.head = nn.Linear(d_model, tgt_vocab, bias=False, **factory)
        self._reset_parameters()
        if share_embeddings == "all":
            self.tgt_embedding.tokens = self.src_embedding.tokens
        if share_embeddings != "none":
            self.head.weight = self.tgt_embedding.tokens.weight

    def _reset_parameters(self) -> None:
        for stack in (self.encoder, self.decoder):
            for name, parameter in stack.named_parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.head.weight)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, T, tgt_vocab)`` of each next target token.

        Args:
            src: token ids ``(B, S)``.
            tgt: token ids ``(B, T)``; position t sees the positions up to t.
            src_key_padding_mask: ``(B, S)``, bool (True: padding) or added to the scores; None: where src is
                ``padding_idx``. tgt_key_padding_mask: ``(B, T)``, likewise.
        """
        if src_key_padding_mask is None:
            src_key_padding_mask = self._padding(src)
        memory = self.encode(src, src_key_padding_mask)
        return self.decode(tgt, memory, tgt_key_padding_mask, src_key_padding_mask)

    def encode(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        """``src (B, S)`` to memory ``(B, S, D)``."""
        check_tokens("src", src)
        padding = self._padding(src) if src_key_padding_mask is None else src_key_padding_mask
        return self.encoder(self.src_embedding(src), src_key_padding_mask=padding)

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """``tgt (B, T)`` and memory ``(B, S, D)`` to logits ``(B, T, tgt_vocab)``."""
        check_tokens("tgt", tgt)
        padding = self._padding(tgt) if tgt_key_padding_mask is None else tgt_key_padding_mask
        x = self.decoder(
            self.tgt_embedding(tgt),
            memory,
            tgt_key_padding_mask=padding,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=True,
        )
        return self.head(x)

    @classmethod
    def from_fairseq(cls, checkpoint, arch: str, **options) -> "MacaronTransformer":
        """The model of a checkpoint of the paper's own code; see :func:`macaron_ops.nn.macaron_net.from_fairseq`."""
        from .macaron_net import from_fairseq

        return from_fairseq(checkpoint, arch, **options)

    def to_fairseq(self) -> dict[str, Tensor]:
        """The tensors under the names of that code."""
        from .macaron_net import to_fairseq

        return to_fairseq(self)

    def _padding(self, tokens: Tensor) -> Tensor | None:
        return None if self.padding_idx is None else tokens == self.padding_idx

    def extra_repr(self) -> str:
        tied = self.head.weight is self.tgt_embedding.tokens.weight
        one = self.src_embedding.tokens is self.tgt_embedding.tokens
        sharing = "all" if one else "decoder" if tied else "none"
        return f"share_embeddings={sharing!r}, padding_idx={self.padding_idx}"
