"""The tables of docs/scaling.md are those of the committed counts."""

from benchmarks import pages, scaling


def test_the_page_shows_what_was_counted():
    results = scaling.load()
    assert [case.key for case in scaling.CASES if case.key not in results] == []
    for section in dict.fromkeys(case.section for case in scaling.CASES):
        assert pages.shown(scaling.PAGE, section) == scaling.table(section)


def test_a_table_says_what_fails_and_what_does_not_fit(monkeypatch):
    cases = [scaling.Case("one", "medcare.py:qwen1.5-7b", "v5e:1x1")]
    monkeypatch.setattr(scaling, "CASES", cases)
    large = {"remat": "full", "hbm_gib": 54.4, "arguments_gib": 35.69, "fits": False}
    for known, cell in (({"error": "refused"}, "| refused |"), (large, "| **54.40**: too large |")):
        monkeypatch.setattr(scaling, "load", lambda known=known: {cases[0].key: known})
        line = scaling.table("one").split("\n")[-1]
        assert line.startswith("| Qwen1.5-7b | v5e:1x1 |") and cell in line
        assert line.count("|") == len(scaling.HEADINGS) + 1
