"""Records that evaluations read, filled by a test."""
from scipy.sparse import csc_array


def run_of(E, sae, store, model=None, layer=0, live=(1, 1), log=None):
    """Returns a Run; live: firings and files of its LiveRule."""
    return E.Run(sae, store, lambda: model, layer, E.LiveRule(*live), log or {})


def with_codes(E, run, codes):
    """Returns the run with codes [token, d_sae] of its held-out tokens planted, and nothing else
    encoded."""
    run.encoded = E.Encoded(csc_array(codes), *[None] * 5, tokens_per_second=0.0)
    return run
