"The report that runs: from a shop's rating log to an honest report and a recommender that can be served."
__version__ = "0.1.0"
__all__ = ["make_recommender", "load_recommender"]


def __getattr__(name):
    "`make_recommender` and `load_recommender`, read from `widedeep_nb.core` when they are first asked for."
    if name in __all__:
        from . import core
        return getattr(core, name)
    raise AttributeError(f"module 'widedeep_nb' has no attribute '{name}'")
