"""What a class of another package computes, as far as its source tells.

A fused layer stands in for code that somebody else changes. It is put only in the place of code that was read: each
class that it replaces, or whose submodules it reads, has a digest of the source of its methods, and a class with
another digest is left alone. Names of classes, annotations, docstrings and comments do not count, so that copies of a
class under another name (transformers has many) have one digest.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterator

__all__ = ["digest", "digest_of_functions"]

# Methods that build, print or name a module and compute nothing.
_IGNORED = ("__init__", "extra_repr", "reset_parameters", "_init_weights")


@functools.cache
def digest(cls: type) -> str | None:
    """Twelve hexadecimal digits for the methods that ``cls`` itself defines; None where there is no source to read."""
    functions = (inspect.unwrap(f) for f in vars(cls).values() if inspect.isfunction(f))
    try:
        trees = [ast.parse(textwrap.dedent(inspect.getsource(f))).body[0] for f in functions if _counts(f.__name__)]
    except (OSError, SyntaxError):
        return None
    return digest_of_functions(trees)


def digest_of_functions(functions: list[ast.FunctionDef]) -> str:
    """The same for parsed methods, in any order."""
    text = "\n".join(sorted(",".join(_words(f)) for f in functions if _counts(f.name)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _counts(name: str) -> bool:
    return name not in _IGNORED


def _words(node: ast.AST) -> Iterator[str]:
    """The tree in words, without what computes nothing; ``ast.dump`` says it differently in each Python."""
    yield type(node).__name__
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_comment", "type_params", "kind", "ctx"):
            continue
        for item in value if isinstance(value, list) else (value,):
            if _is_docstring(item):
                continue
            yield name
            if isinstance(item, ast.AnnAssign) and item.value is not None:
                item = ast.Assign(targets=[item.target], value=item.value)
            if isinstance(item, ast.AST):
                yield from _words(item)
            else:
                yield repr(item)
    yield "."


def _is_docstring(item: object) -> bool:
    return isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str)
