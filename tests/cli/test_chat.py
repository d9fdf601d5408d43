"""`medmoe chat` on the tiny model: what is typed comes from a file or a list of lines."""

import io
import itertools
import os
import signal
import sys
import types

import numpy as np
import pytest

from medmoe_jax.cli import chat
from medmoe_jax.cli.bars import bars
from medmoe_jax.cli.main import main
from medmoe_jax.cli.talk import Talk
from medmoe_jax.data.templates import Stops
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation.routing import Gate
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.training.run import Run
from medmoe_jax.training.trained import open_trained
from tests import tiny
from tests.inference.scripted import Scripted

ASKED = tiny.alignment_rows()[0]["prompt"]


@pytest.fixture(scope="module")
def trained():
    setup, workdir = tiny.trained()
    return setup, open_trained(Run(setup, workdir), "aggregate")


@pytest.fixture
def talk(trained):
    with Talk(*trained, Sampling(), 8) as one:
        yield one


def say(*ids_of_answers, before_step=lambda: None, stride=1):
    """A decoder that gives these texts as answers, one after the other, for any prompt."""
    texts = itertools.cycle(ids_of_answers)
    tokenizer = tiny.tokenizer()
    return Scripted(
        lambda request: [*tokenizer.encode(next(texts)), tokenizer.eos_id], 1, before_step, stride
    )


def use(talk, monkeypatch, decoding):
    monkeypatch.setattr(talk._model.engine, "decoding", lambda: decoding, raising=False)


def text(answer):
    return "".join(one.content for one in answer)


def test_piped_lines_are_answered_as_generate_answers(config, workdir, monkeypatch, capsys):
    """Answers alone on standard output, without colour; a bad command does not end the talk."""
    assert main(["generate", config, f"--workdir={workdir}", "--max-tokens=8", ASKED]) == 0
    want = capsys.readouterr().out
    lines = f"{ASKED}\n\n/bank\n/flx\n/hlp\n/new\n{ASKED}\n/route now\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", config, f"--workdir={workdir}", "--max-tokens=8", "--history="]) == 0
    out, err = capsys.readouterr()
    assert out == want * 2 and "\x1b" not in out + err
    assert "banks: knowledge, alignment" in err
    assert "there is no command /flx; /help lists them" in err
    assert "there is no command /hlp; do you mean /help?" in err
    assert "a new talk" in err and "/route takes nothing more, and here is 'now'" in err


def test_lines_that_are_no_text(config, workdir, monkeypatch, capsys):
    lines = io.TextIOWrapper(io.BytesIO(b"\xff\xfe what\n"), "utf-8")
    monkeypatch.setattr(sys, "stdin", lines)
    assert main(["chat", config, f"--workdir={workdir}", "--max-tokens=8", "--history="]) == 1
    assert "standard input: not UTF-8 text" in capsys.readouterr().err


def test_a_talk_without_a_standard_input_ends(config, workdir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after `<&-`
    assert main(["chat", config, f"--workdir={workdir}", "--max-tokens=8", "--history="]) == 0
    assert capsys.readouterr().out == ""


def test_options_are_checked(config, workdir, capsys):
    for option, words in (
        ("--max-tokens=0", "--max-tokens: 0 is below 1"),
        ("--max-tokens=128", "--max-tokens: 128 leave no room for a question"),
        ("--min-p=2", "--min-p: 2.0 is above 1"),
        ("--off=ghost", "there is no bank 'ghost'"),
        ("--history=gs://b/h", "--history: "),
    ):
        assert main(["chat", config, f"--workdir={workdir}", option]) == 1
        assert words in capsys.readouterr().err


def test_a_history_that_cannot_be_kept_is_said_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(chat, "open_run", None)  # would be a TypeError
    (tmp_path / "state").write_text("a file")
    for option, state in ((f"--history={tmp_path}", ""), ("--max-tokens=8", tmp_path / "state")):
        monkeypatch.setenv("XDG_STATE_HOME", str(state))
        assert main(["chat", "no.py", option]) == 1
        error = capsys.readouterr().err
        assert "--history: lines that are typed cannot be kept (" in error
        assert str(tmp_path) in error and "keep none with --history=" in error


@pytest.mark.parametrize(("terminal", "coloured"), [("dumb", False), ("xterm-256color", True)])
def test_a_terminal_without_colour_gets_none_in_the_prompt(monkeypatch, terminal, coloured):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", terminal)
    assert ("\x1b" in chat._typed("")._prompt) == coloured


def test_turns_are_remembered_until_new(talk, monkeypatch):
    decoding = say("yes", "no")
    use(talk, monkeypatch, decoding)
    read = []
    submit = decoding.submit
    monkeypatch.setattr(decoding, "submit", lambda r: read.append(r) or submit(r))
    assert talk.command("/system Be short.") == "the system text is: Be short."
    assert [text(talk.ask(q)) for q in ("one", "two")] == ["yes", "no"]
    prompt = talk._model.prompt(
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "two"},
        ]
    )
    assert list(read[1].prompt) == prompt
    assert [request.sampling.first for request in read] == [0, 1]
    talk.command("/new")
    talk.command("/system")
    assert text(talk.ask("three")) == "yes"
    assert list(read[2].prompt) == talk._model.prompt([{"role": "user", "content": "three"}])


def test_what_does_not_fit_the_context_is_forgotten_and_said(talk, monkeypatch):
    use(talk, monkeypatch, say("yes"))
    talk.command("/system Be short.")
    for n in range(9):
        assert text(talk.ask(f"question {n} " + "pain " * 4)) == "yes"
        if talk.remarks:
            break
    (remark,) = talk.remarks
    assert "oldest turns are forgotten" in remark and "128 tokens" in remark and n > 1
    assert talk.turns[0]["content"] != "question 0 " and len(talk.turns) < 2 * n + 2
    list(talk.ask("pain " * 200))
    assert any("the question was cut" in one for one in talk.remarks)
    with pytest.raises(UserError, match="half of a surrogate pair"):
        list(talk.ask("\ud800"))
    for question in (None, 5, ["a"]):
        with pytest.raises(UserError, match=r"the question: .* is no text"):
            talk.say(question)
    with pytest.raises(UserError, match="the system text: 5 is no text"):
        talk.tell(5)


@pytest.mark.usefixtures("interruptible")
def test_control_c_stops_the_answer_and_not_the_talk(talk, monkeypatch, capsys):
    steps = itertools.count()

    def interrupt():
        if next(steps) == 50:
            os.kill(os.getpid(), signal.SIGINT)

    decoding = say("pain " * 10**5, "yes", before_step=interrupt)
    use(talk, monkeypatch, decoding)
    talk._max_tokens = 10**6
    monkeypatch.setattr(type(talk._model), "fitted", lambda self, turns, room: (turns, [1, 2]))
    chat._take(talk, "one")
    assert decoding.cancelled.get(timeout=60) == 1
    said = capsys.readouterr()
    assert said.out.startswith("pain") and "stopped" in said.err
    assert talk.turns[-1] == {"role": "assistant", "content": said.out.rstrip("\n")}
    chat._take(talk, "two")
    assert capsys.readouterr().out == "yes\n" and len(talk.turns) == 4


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("line", ["/route", "/bank off noise", "/lang"])
def test_control_c_stops_a_command_and_not_the_talk(talk, monkeypatch, capsys, line):
    """Banks and language stay as they were."""

    def interrupt(*arguments, **named):
        os.kill(os.getpid(), signal.SIGINT)

    list(talk.ask(ASKED))
    banks = talk.command("/bank")
    monkeypatch.setattr("medmoe_jax.evaluation.routing.spoke", interrupt)
    monkeypatch.setattr("medmoe_jax.cli.talk.language_model", interrupt)
    capsys.readouterr()
    chat._take(talk, line)
    assert capsys.readouterr().err == "stopped\n"
    assert talk.command("/bank") == banks and talk._model.engine is talk._last.engine


def test_a_model_cannot_steer_the_terminal(talk, monkeypatch, capsys):
    use(talk, monkeypatch, say("a\x1b[2Jb\x07"))
    chat._take(talk, "//one")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x07\n"
    assert talk.turns[0]["content"] == "/one"


def test_an_answer_that_is_cut_or_empty_is_said_to_be(talk, monkeypatch):
    use(talk, monkeypatch, say("It is for pain and sugar.", ""))
    list(talk.ask("one"))
    assert talk.remarks == ["cut at 8 tokens, the most of an answer"]
    list(talk.ask("two"))
    assert talk.remarks == ["no answer; the question is forgotten"] and len(talk.turns) == 2


def test_banks_are_taken_out_and_back(talk):
    answer = text(talk.ask(ASKED))
    names = [bank.name for bank in talk._model.engine.config.banks]
    assert "(noise off)" in talk.command("/bank off noise")
    assert [b.name for b in talk._model.engine.config.banks] == [n for n in names if n != "noise"]
    assert "off" not in talk.command("/bank on noise")
    talk.command("/new")
    assert text(talk.ask(ASKED)) == answer
    for line, words in (
        ("/bank off ghost", "there is no bank 'ghost'"),
        ("/bank maybe noise", "say /bank off|on NAME"),
        ("/lang xx", "no table of languages"),
    ):
        with pytest.raises(UserError, match=words.replace("|", r"\|")):
            talk.command(line)
    assert [bank.name for bank in talk._model.engine.config.banks] == names


def test_route_tells_the_experts_of_the_last_answer(talk):
    """A bar a layer of the one bank with a router; the counts themselves are tested elsewhere."""
    with pytest.raises(UserError, match="nothing has been answered yet"):
        talk.command("/route")
    list(talk.ask(ASKED))
    last = talk._last
    shown = [line.plain for line in talk.command("/route").renderables]
    titles = [line for line in shown if not line.startswith(" ")]
    assert titles == [f"noise: {len(last.ids)} tokens"]
    layers = [line for line in shown if line.startswith("  layer")]
    assert len(layers) == tiny.DECODER.n_layers
    for line in layers:
        assert len(line.split()[2]) == 40 and "%" in line
    talk.command("/bank off noise")  # changes the next answer, not how this one came about
    assert [line.plain for line in talk.command("/route").renderables] == shown
    list(talk.ask(ASKED))
    with pytest.raises(UserError, match="another stage may have one, or a bank that was left out"):
        talk.command("/route")


def test_the_last_answer_has_no_tokens_behind_the_text_that_ended_it(talk, monkeypatch):
    """Where the template ends an answer with a text, the decoder goes on for some more."""
    use(talk, monkeypatch, say("yes for pain and sugar", stride=20))
    monkeypatch.setattr(talk._model, "stops", Stops((), (" pain",)))
    assert text(talk.ask("one")) == "yes for"
    ids, decode = talk._last.ids, tiny.tokenizer().decode
    assert " pain" in decode(ids) and " pain" not in decode(ids[:-1])


def test_bars_show_shares_by_layer():
    use_GxNxE = np.asarray([[[3.0, 1.0, 0.0], [0.0, 0.0, 5.0]]])
    gate = Gate("b/attn.q", 4, ("west", "east", "2"), np.asarray([4.0]), use_GxNxE,
                np.zeros((1, 2)), np.asarray([-1]))  # fmt: skip
    lines = [line.plain for line in bars([gate]).renderables]
    assert lines == [
        "b: 4 tokens",
        "  layer   4 " + "0" * 30 + "1" * 10 + " west 75%, east 25%",
        "  layer   5 " + "2" * 40 + " 2 100%",
        "  experts   0 west  1 east  2  ",
    ]


def test_help_names_every_command(talk):
    shown = talk.command("/help")
    assert all(f"/{name}" in shown for name in ("new", "system", "lang", "bank", "route", "help"))
