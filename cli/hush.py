"""Other packages talk on stderr while they are imported and while they load; here they do not."""

from __future__ import annotations

import logging
import warnings


def hush() -> None:
    """Silence them in this process. Imports transformers."""
    for chatty in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
