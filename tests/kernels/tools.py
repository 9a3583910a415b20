"""The raw operators' arguments on the meta device, for tests that look at launches."""

import pytest

pytest.importorskip("triton")

from macaron_ops.bench.kernel_calls import (  # noqa: E402
    NEEDS,
    attend_arguments,
    ffn_arguments,
    launches_of_attend,
    launches_of_ffn,
)

__all__ = ["NEEDS", "attend_arguments", "ffn_arguments", "launches_of_attend", "launches_of_ffn"]
