"""The raw operators' arguments on the meta device, for tests that look at launches."""

import pytest

pytest.importorskip("triton")

from macaron_ops.bench.kernel_calls import NEEDS, ffn_arguments, launches_of_ffn  # noqa: E402

__all__ = ["NEEDS", "ffn_arguments", "launches_of_ffn"]
