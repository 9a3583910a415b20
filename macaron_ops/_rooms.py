"""The rooms kernels/ and bench/ of a checkout, which stand beside this folder until an installation puts them inside.

With this a checkout works as it is, `python -m macaron_ops` and `python -m pytest` alike, on a machine where nothing
can be installed: all it takes is torch.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOMS = {f"{__package__}.{room}": _PACKAGE.parent / room / "__init__.py" for room in ("kernels", "bench")}


class _Rooms(MetaPathFinder):
    """Comes first: an editable install of another checkout would give its rooms to this one's operators."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, _ROOMS[name]) if name in _ROOMS else None


if _PACKAGE.parent.joinpath("setup.py").exists() and all(init.exists() for init in _ROOMS.values()):
    sys.meta_path.insert(0, _Rooms)
