"""What a field is the sum of."""

from collections.abc import Iterator

from .fields import Field, Scaled, Sum

__all__ = ["parts"]


def parts(field: Field, factor: float = 1.0) -> Iterator[tuple[float, Field]]:
    """The fields that are neither sums nor multiples, and how often each is added."""
    if isinstance(field, Sum):
        for part in field.fields:
            yield from parts(part, factor)
    elif isinstance(field, Scaled):
        yield from parts(field.field, factor * field.factor)
    else:
        yield factor, field
