"""Keep the libraries' own bars and advice off the terminal: ours say what matters."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import tqdm
import transformers


@functools.cache
def silence_libraries() -> None:
    """Turn off foreign progress bars, deprecation notices and information logs.

    Errors still raise. Some libraries switch their bars on explicitly, past every setting,
    so the bar itself is told to stay off.
    """
    tqdm.tqdm.__init__ = _silent(tqdm.tqdm.__init__)  # type: ignore[method-assign]
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "peft", "accelerate", "compressed_tensors", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


def _silent(start: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(start)
    def disabled(*args: Any, **kwargs: Any) -> None:
        start(*args, **{**kwargs, "disable": True})

    return disabled
