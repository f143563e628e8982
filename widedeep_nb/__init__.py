"The report that runs: from a shop's rating log to an honest report and a recommender that can be served."

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {  # where the public names live; each module is imported when one of its names is first asked for
    "load": "data",
    "prepare": "preprocessing",
    "evaluate": "evaluation",
    "make_recommender": "lib.recommender",
    "load_recommender": "lib.recommender",
    "register": "lib.recommender",
    "check_recommender": "lib.recommender_checks",
    "Run": "lib.runs",
    "Split": "lib.core",
    "Protocol": "lib.protocols",
    "Recommender": "lib.recommender",
}
__all__ = list(_HOMES)


def __getattr__(name):
    "Import a public name when it is first asked for."
    if name not in _HOMES:
        raise AttributeError(f"module 'widedeep_nb' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    "List the public names, imported or not."
    return sorted([*globals(), *__all__])
