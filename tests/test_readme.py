"Tests that all numbers of the README come from results/, and that its links have a target."

import json
import re
from pathlib import Path

import pytest

from widedeep_nb.lib.publish import readme_table
from widedeep_nb.lib.results import load_results
from widedeep_nb.lib.scale_plots import readme_size_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "results").glob("*.json"))


def test_tables_are_those_of_results():
    block = re.search(r"<!-- figures -->\n(.*?)\n<!-- /figures -->", README, re.S)[1]
    assert RESULTS and block == "\n\n".join(
        map(readme_table, load_results(ROOT / "results").values())
    )


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_numbers_of_the_table(path):
    "Check the table without the code that wrote it."
    results = json.loads(path.read_text())
    start = re.search(
        rf"\*\*{results['dataset']}\*\*[^\n]*, protocol `{results['protocol']}`, {results['rows']:,} rows",
        README,
    ).start()
    table = README[start:].split("\n\n")[1]
    wanted = {
        (r["model"], r["metric"], r["versus"]): r
        for r in results["metrics"]
        if (r["users"], r["items"], r["relevant"], r["split"]) == ("all", "all", "any", "test")
    }
    ours, checked = "hybrid" if ("hybrid", "NDCG@20", None) in wanted else "wide-deep", 0
    shown = [line.strip("| ").split(" |")[0] for line in table.splitlines()[2:]]

    def first(metric, sign):
        return sorted(
            (m for m, x, versus in wanted if x == metric and versus is None),
            key=lambda m: sign * wanted[m, metric, None]["value"],
        )

    assert len(set(shown)) == len(shown) and {
        ours,
        *first("NDCG@20", -1)[:10],
        *first("RMSE", 1)[:5],
    } <= set(shown)
    for line in table.splitlines()[2:]:
        model, *cells = [c.strip() for c in line.strip("|").split("|")]
        keys = [
            (model, "RMSE", None),
            (ours, "RMSE", model),
            (model, "NDCG@20", None),
            (ours, "NDCG@20", model),
        ]
        for key, cell in zip(keys, cells):
            assert bool(cell) == (key in wanted), key
            if not cell:
                continue
            found = [float(x) for x in re.findall(r"[+-]?\d+\.\d+", cell)]
            assert found == pytest.approx(
                [wanted[key][c] for c in ("value", "lo", "hi")], abs=5.1e-5
            )
            checked += len(found)
    assert checked > 20


def test_scale_text_is_that_of_results():
    text = re.search(r"<!-- size -->\n(.*?)\n?<!-- /size -->", README, re.S)[1]
    results = json.loads((ROOT / "results" / "scale" / "cpu.json").read_text())
    assert text == readme_size_text(results) and len(text.splitlines()) == 3
    for stage in results["large_log"]:
        assert stage["seconds"] > 0
    read = [row["rows_read"] for row in results["scaling"] if row["stage"] == "read"]
    assert f"{results['large_log'][0]['rows_read']:,}" in text and f"{max(read):,}" in text


def test_no_other_number_is_typed_into_it():
    prose = re.sub(
        r"<!-- (figures|picture|size) -->.*?<!-- /\1 -->|```.*?```", "", README, flags=re.S
    )
    assert re.findall(r"\d*\.\d{3,}", prose) == []


def test_links_have_a_target():
    for link in re.findall(r'\]\((?!https?:)([^)#]+)\)|src="([^"]+)"', README):
        assert (ROOT / (link[0] or link[1])).exists(), link
