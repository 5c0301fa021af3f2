"""Keep the libraries' own bars and advice off the terminal: ours say what matters."""

from __future__ import annotations

import functools
import logging
import warnings

import tqdm
import transformers


def silence_libraries() -> None:
    """Turn off foreign progress bars, deprecation notices and information logs.

    Errors still raise. Some libraries switch their bars on explicitly, past every setting,
    so the bar itself is told to stay off.
    """
    tqdm.tqdm.__init__ = functools.partialmethod(  # type: ignore[method-assign,assignment]
        tqdm.tqdm.__init__, disable=True
    )
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "peft", "accelerate", "compressed_tensors", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
