"""Keeps other packages from talking on the screen."""

from __future__ import annotations

import logging


def hush() -> None:
    """Silence what transformers and the packages that it imports say about themselves; imports transformers."""
    for chatty in ("torchao", "torch.utils._pytree"):  # they warn on stderr while transformers imports them
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
