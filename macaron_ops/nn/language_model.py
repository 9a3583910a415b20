"""``MacaronLM``: a causal language model of split layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from macaron_ops.ops.checks import number, positive_int
from macaron_ops.splitting import Scheme

from .activation import Activation
from .embedding import TokenEmbedding, check_tokens
from .norm import build_norm
from .positions import rotary_angles
from .split_layer import SplitLayer
from .stacks import run_layer

__all__ = ["MacaronLM"]


class MacaronLM(nn.Module):
    """Embedding, ``num_layers`` causal pre-norm :class:`SplitLayer`, a norm, and a linear map to the vocabulary.

    With the default scheme each layer is half FFN, attention, half FFN; every scheme has the same number of matrix
    parameters. Embeddings are drawn from N(0, 1 / D), the rest as :class:`SplitLayer`.

    Example::

        model = MacaronLM(vocab_size=256, d_model=128, nhead=4, num_layers=4)
        logits, loss = model(tokens[:, :-1], tokens[:, 1:])

    Args:
        vocab_size: number of tokens.
        d_model: D. nhead: heads in all. num_layers: at least 1. dim_feedforward: hidden width in all; None: 4 D.
        scheme: of every layer, a name of :data:`macaron_ops.splitting.CATALOGUE`, or a scheme.
        positions: ``"rotary"``, ``"learned"`` or ``"sinusoidal"``. max_len: longest sequence, of learned positions.
        tie_embeddings: the last linear map is the embedding.
        dropout: probability after the embedding, attention and FFNs, in training.
        save: memory policy, ``"fast"`` or ``"lean"``. checkpoint: keep only the layers' inputs.
        The others as :class:`SplitLayer`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        nhead: int = 8,
        num_layers: int = 6,
        dim_feedforward: int | None = None,
        *,
        scheme: str | Scheme = "strang_BAB",
        activation: Activation = "gelu",
        norm: str | None = "layer",
        eps: float = 1e-5,
        positions: str = "rotary",
        max_len: int = 1024,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        bias: bool = True,
        save: str = "fast",
        checkpoint: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        d_model, num_layers = positive_int("d_model", d_model), positive_int("num_layers", num_layers)
        self.checkpoint = checkpoint
        self.embedding = TokenEmbedding(
            vocab_size, d_model, positions=positions, max_len=max_len, dropout=dropout, **factory
        )
        self.layers = nn.ModuleList(
            SplitLayer(
                d_model,
                nhead,
                4 * d_model if dim_feedforward is None else dim_feedforward,
                scheme=scheme,
                activation=activation,
                norm=norm,
                eps=eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                bias=bias,
                save=save,
                **factory,
            )
            for _ in range(num_layers)
        )
        self.head_dim = d_model // nhead
        self.norm = build_norm(norm, d_model, eps, bias, **factory)
        self.head = nn.Linear(d_model, vocab_size, bias=False, **factory)
        nn.init.normal_(self.head.weight, std=d_model**-0.5)
        if tie_embeddings:
            self.head.weight = self.embedding.tokens.weight

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The logits ``(B, T, vocab_size)``, and with ``targets`` also their mean cross entropy, in float32 at least.

        Args:
            tokens: ids ``(B, T)``; position t sees the positions up to t.
            targets: ids ``(B, T)``, the tokens after ``tokens``; -100 is left out of the mean.
            key_padding_mask: ``(B, T)``, bool (True: padding) or added to the scores.
        """
        check_tokens("tokens", tokens)
        if targets is not None:
            check_tokens("targets", targets)
            if targets.shape != tokens.shape:
                raise ValueError(f"targets: expected shape {tuple(tokens.shape)}; got {tuple(targets.shape)}")
        x = self.embedding(tokens)
        rotary = None
        if self.embedding.kind == "rotary":
            rotary = rotary_angles(x.shape[-2], self.head_dim, device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = run_layer(layer, self.checkpoint, x, causal=True, key_padding_mask=key_padding_mask, rotary=rotary)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits, F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten().long())

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """``tokens (B, T)`` continued by ``max_new_tokens`` sampled ones, ``(B, T + max_new_tokens)``.

        Without dropout, whatever the module's mode. Nothing is cached: every token reads the whole sequence again
        (of learned positions, the last ``max_len`` tokens).

        Args:
            temperature: of the sampling; 0 takes the likeliest token.
            top_k: sample from the k likeliest tokens alone.
            seed: of the sampling; None: torch's default generator.
        """
        check_tokens("tokens", tokens)
        if tokens.shape[1] == 0:
            raise ValueError("tokens: expected at least one token to continue; got none")
        positive_int("max_new_tokens", max_new_tokens)
        if top_k is not None:
            top_k = min(positive_int("top_k", top_k), self.head.out_features)
        number("temperature", temperature, minimum=0.0)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed: expected an integer or None; got {seed!r}")
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        window = self.embedding.positions.num_embeddings if self.embedding.positions is not None else None
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                seen = tokens if window is None else tokens[:, -window:]
                logits = self(seen)[:, -1].float()
                tokens = torch.cat([tokens, _sample(logits, temperature, top_k, generator).to(tokens.dtype)], dim=1)
        finally:
            self.train(was_training)
        return tokens

    def extra_repr(self) -> str:
        return f"tie_embeddings={self.head.weight is self.embedding.tokens.weight}, checkpoint={self.checkpoint}"


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token ``(B, 1)`` from each row of ``logits (B, vocab_size)``."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
