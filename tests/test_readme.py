"Tests that all numbers of the README come from results/, and that its links have a target."

import json
import re
from pathlib import Path

import pytest

from widedeep_nb.lib.publish import chapter_table
from widedeep_nb.lib.results import load_results
from widedeep_nb.lib.results_text import answer_text, results_table
from widedeep_nb.lib.scale_plots import readme_size_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "results").glob("*.json"))


def block(name):
    "Return the text between two markers."
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.S)[1]


def test_answers_are_those_of_results():
    runs = load_results(ROOT / "results")
    assert RESULTS and block("answer") == "\n".join(map(answer_text, runs.values()))


def test_pictures_are_there_for_light_and_dark_pages():
    files = re.findall(r'(?:srcset|src)="([^"]+)"', block("picture"))
    assert len(files) == 4 and len([f for f in files if f.endswith("-dark.png")]) == 2
    assert all((ROOT / file).exists() for file in files)


def test_chapters_are_listed_with_their_questions():
    assert block("chapters") == chapter_table(ROOT / "nbs")
    assert block("chapters").count("?") >= 23


def test_it_is_one_screen_of_words():
    "Check that README stays short: tables are on a page of their own."
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->|```.*?```", "", README, flags=re.S)
    assert len(prose.split()) < 800


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_numbers_of_the_table(path):
    "Check the table without the code that wrote it."
    results = json.loads(path.read_text())
    table = results_table(results).split("\n\n")[1]
    fits = {r.get("fit") for r in results["metrics"]}  # results of earlier versions have none
    fit = "tested" if "tested" in fits else None
    wanted = {
        (r["model"], r["metric"], r["versus"]): r
        for r in results["metrics"]
        if (r["users"], r["items"], r["relevant"], r["split"]) == ("all", "all", "any", "test")
        and r.get("fit") == fit
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
    text = block("size")
    results = json.loads((ROOT / "results" / "scale" / "cpu.json").read_text())
    assert text == readme_size_text(results) and len(text.splitlines()) == 3
    for stage in results["large_log"]:
        assert stage["seconds"] > 0
    read = [row["rows_read"] for row in results["scaling"] if row["stage"] == "read"]
    assert f"{results['large_log'][0]['rows_read']:,}" in text and f"{max(read):,}" in text


def test_no_other_number_is_typed_into_it():
    prose = re.sub(
        r"<!-- (answer|picture|size|chapters) -->.*?<!-- /\1 -->|```.*?```", "", README, flags=re.S
    )
    assert re.findall(r"\d*\.\d{3,}", prose) == []


def test_links_have_a_target():
    for link in re.findall(r'\]\((?!https?:)([^)#]+)\)|src="([^"]+)"', README):
        assert (ROOT / (link[0] or link[1])).exists(), link
