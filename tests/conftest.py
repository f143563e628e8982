import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared():
    "Real data beside the project: from WIDEDEEP_SHARED, else ../shared."
    place = Path(os.environ.get("WIDEDEEP_SHARED", ROOT.parent / "shared"))
    if not (place / "data").exists(): pytest.skip(f"needs the measuring data in {place}; set WIDEDEEP_SHARED")
    return place / "data"


@pytest.fixture(scope="session")
def ciao(shared):
    "ciao under filtered-first, with its categories."
    from widedeep_nb.data import load
    from widedeep_nb.preprocessing import prepare
    log, items, users, *_ = load(shared / "ciao")
    return prepare(log, "filtered-first", items, users)
