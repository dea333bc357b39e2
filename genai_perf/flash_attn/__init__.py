"""flash-attn 2.8's functions, with its signatures, layouts and defaults, on any machine.

Three ways to swap the import, from explicit to invisible:

    from genai_perf.flash_attn import flash_attn_func      # instead of: from flash_attn import ...
    import genai_perf as flash_attn                        # flash_attn.flash_attn_func(...)
    genai_perf.flash_attn.install()                        # `import flash_attn` anywhere, unchanged
"""

import sys

from . import bert_padding, flash_attn_interface
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

# The release whose functions these are: callers compare it.
__version__ = "2.8.4"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]


def _names() -> dict:
    return {
        "flash_attn": sys.modules[__name__],
        "flash_attn.flash_attn_interface": flash_attn_interface,
        "flash_attn.bert_padding": bert_padding,
    }


def install() -> None:
    """Make `import flash_attn` mean this package, in this process, from here on.

    It covers `flash_attn`, `flash_attn.flash_attn_interface` and `flash_attn.bert_padding`; any
    other part, such as `flash_attn.layers`, raises ModuleNotFoundError when imported. Calling it
    again changes nothing. `uninstall()` takes it back.

    Raises:
        ImportError: the real flash_attn is imported already: parts of the program would keep it.
    """
    names = _names()
    for name, module in names.items():
        present = sys.modules.get(name, module)
        if present is not module:
            where = getattr(present, "__file__", None) or "its place"
            raise ImportError(
                f"genai_perf.flash_attn.install: {name} is imported already, from {where}; call "
                f"install() before the first `import flash_attn`"
            )
    sys.modules.update(names)


def uninstall() -> None:
    """Undo `install`; what was imported meanwhile stays as it is."""
    for name, module in _names().items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
