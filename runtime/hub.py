"""Whether the hub of models and data sets answers, and how not to ask it."""
import os
import sys
import threading
from functools import lru_cache


@lru_cache(maxsize=1)
def hub_reachable(timeout: float = 4.0) -> bool:
    """Returns whether the hub answers within `timeout` seconds; False in offline mode. A process
    asks once, in a thread, because the look-up of a host's name heeds no timeout."""
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.utils import get_session
    answers = []

    def ask():
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=timeout))
        except Exception:  # whatever the reason: no answer
            pass

    if not is_offline_mode():
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout)
    return bool(answers)


def go_offline() -> None:
    """Makes transformers, datasets and huggingface_hub look in their caches only: a look-up ends at
    once."""
    from huggingface_hub import constants
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that start later
    constants.HF_HUB_OFFLINE = True  # read at each request, by transformers too
    if "datasets" in sys.modules:  # has a copy of its own, made when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
