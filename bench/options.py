"""What a run was asked for."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

import torch

from .timing import Budget

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_DEFAULT_DTYPES = {
    ("cpu", "quick"): ("float32",),
    ("cpu", "normal"): ("float32", "bfloat16"),
    ("cpu", "full"): ("float32", "bfloat16"),
    ("cuda", "quick"): ("bfloat16",),
    ("cuda", "normal"): ("bfloat16", "float32"),
    ("cuda", "full"): ("bfloat16", "float16", "float32"),
}
_BUDGETS = {
    "quick": Budget(seconds=0.5, min_rounds=5),
    "normal": Budget(seconds=1.5, min_rounds=11),
    "full": Budget(seconds=4.0, min_rounds=21),
}


@dataclass(frozen=True)
class Options:
    """`effort` is quick, normal or full; `filters` are substrings or globs of which a measurement must match one;
    `backends` of macaron_ops are measured, by default those that group.backend_names chooses. `seconds` is how long to
    look at each variant at most, instead of the effort's. `models` are the families that the suite `model` measures
    instead of the trained MiniLM."""

    device: torch.device = torch.device("cpu")
    effort: str = "normal"
    dtype_names: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    seed: int = 0
    compile: bool = True
    backends: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def dtypes(self) -> tuple[str, ...]:
        return self.dtype_names or _DEFAULT_DTYPES[self.device.type, self.effort]

    @property
    def budget(self) -> Budget:
        budget = _BUDGETS[self.effort]
        return budget if self.seconds is None else replace(budget, seconds=self.seconds)

    def wants(self, *words: str) -> bool:
        """Whether "suite/subject/dtype/pass/variant" matches a filter, all of it or a part; no filter matches all."""
        text = "/".join(words).lower()
        return not self.filters or any(
            pattern.lower() in text or fnmatch.fnmatch(text, f"*{pattern.lower()}*") for pattern in self.filters
        )

    def as_json(self) -> dict[str, object]:
        return {
            "effort": self.effort,
            "device": str(self.device),
            "dtypes": list(self.dtypes),
            "filters": list(self.filters),
            "seed": self.seed,
            "compile": self.compile,
            "backends": list(self.backends),
            "models": list(self.models),
            "budget": vars(self.budget),
        }
