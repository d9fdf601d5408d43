"""The table of aims is that of the committed results."""

from benchmarks import aims, pages


def test_the_page_shows_what_was_reached():
    assert pages.shown(aims.PAGE, "aims") == aims.table()


def test_a_figure_by_hand(monkeypatch):
    step = {"frozen": 2.0, "plain_lora": 2.2, "medcare_shipped": 2.5}
    step["medcare_trained"] = 3.0
    tuned = {"seconds": {"frozen": 1.0, "naive_molora": 5.0}}
    routing = {
        "step": step,
        "torch": {"tuned": tuned},
        "memory": {"medcare_trained": {"compiling": 3.1}},
    }
    lora = {
        who: {"heap": {"seconds": [5.0]}, "tuned": {"seconds": [s]}}
        for who, s in (("peft", 3.0), ("medmoe_jax", 2.0))
    }
    known = {"routing": routing, "peers": {"cpu": {"recipes": {"lora": lora}}}}
    monkeypatch.setattr(aims, "load", known.__getitem__)
    reached = [cells[-1] for cells in aims.steps()]
    assert reached == ["1.25, 1.50", "1.10", "0.50", "2.00", "1.00, 1.50", "3.1"]
