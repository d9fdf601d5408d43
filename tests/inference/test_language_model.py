"""Text in, text out: templates, targets and ends of turns around the engine."""

import itertools

import numpy as np
import pytest

from medmoe_jax.adapters.lifecycle import active_banks
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.templates import load_template
from medmoe_jax.errors import UserError
from medmoe_jax.inference.decoding import _Row
from medmoe_jax.inference.engine import Engine
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.inference.requests import Said, Token
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.training.run import Run
from medmoe_jax.training.trained import open_trained
from tests import naive, tiny
from tests.data import chat_templates


@pytest.fixture(scope="module")
def trained():
    setup, workdir = tiny.trained()
    return setup, open_trained(Run(setup, workdir), "align")


def make_model(trained, template="user_assistant", batch=8):
    setup, model = trained
    specs = active_banks(model.roster)
    config = AdaptedConfig(setup.base.config, specs)
    engine = Engine(config, model.base, model.banks, model.leaves, setup.mesh, batch)
    return LanguageModel(engine, setup.tokenizer, load_template(template, setup.tokenizer))


def naive_score(trained, prompt_text, completion_text, ending=True):
    """From text by hand: `User:` prompt newline `Assistant:` completion, and eos or not."""
    setup, model = trained
    t = setup.tokenizer
    prompt = [t.bos_id, *t.encode("User:"), *t.encode(prompt_text), *t.encode("\n")]
    prompt += t.encode("Assistant:")
    ids = [*prompt, *t.encode(completion_text), *[t.eos_id] * ending]
    batch, _ = naive.pack([ids], [[0]], len(ids))
    linear = naive.adapted(active_banks(model.roster), model.banks)
    z = naive.logits(setup.base.config, model.base, batch, linear)[0]
    z -= z.max(-1, keepdims=True)
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    return sum(z[i - 1, ids[i]] for i in range(len(prompt), len(ids))), len(ids) - len(prompt)


def test_scores_and_choices(trained):
    model = make_model(trained)
    prompts = ["aspirin: yes or no, pain?", "What is insulin for?", "x"]
    choices = [["yes", "no"], ["It is for sugar.", "It is for poison. " * 3, ""], ["a b c d"]]
    want = [
        [naive_score(trained, p, c) for c in cs] for p, cs in zip(prompts, choices, strict=True)
    ]
    got = model.choose(prompts, choices, ending=True)
    for one, other in zip(got, want, strict=True):
        assert [n for _, n in one] == [n for _, n in other]
        np.testing.assert_allclose([s for s, _ in one], [s for s, _ in other], rtol=1e-5, atol=1e-4)
    alone = model.score(prompts[:2], ["no", "It is for sugar."])
    np.testing.assert_allclose(alone, [got[0][1], got[1][0]], rtol=1e-5)


def test_the_end_of_the_turn_does_not_count_in_a_choice(trained):
    """Not unless it is asked for; under each template that has one."""
    model = make_model(trained)
    prompts, choices = ["aspirin: yes or no, pain?", "x"], [["yes", "no"], ["a b c d", "a"]]
    want = [
        [naive_score(trained, p, c, ending=False) for c in cs]
        for p, cs in zip(prompts, choices, strict=True)
    ]
    got = model.choose(prompts, choices)
    assert [[n for _, n in row] for row in got] == [[n for _, n in row] for row in want]
    for row, other in zip(got, want, strict=True):
        np.testing.assert_allclose([s for s, _ in row], [s for s, _ in other], rtol=1e-5)
    encode = trained[0].tokenizer.encode
    for template, text in {
        "chatml": "yes",
        "gemma": "yes",
        "llama2": " yes",
        "plain": " yes",
    }.items():
        model = make_model(trained, template)
        (alone,), (ended,) = (model.choose(["x"], [["yes"]], e)[0] for e in (False, True))
        assert alone[1] == len(encode(text)) < ended[1] and alone[0] > ended[0]


def test_what_a_template_writes_before_an_answer_is_read_and_not_scored(trained):
    """An empty thought, say; with all around it, it counts as in training."""
    model = make_model(trained)
    tokenizer = model.encoder.tokenizer
    model.encoder = Encoder(tokenizer, Jinja(chat_templates.THINKING))
    read = []
    score = model.engine.score
    model.engine.score = lambda prompts, *rest: read.extend(prompts) or score(prompts, *rest)
    ((alone, longer),) = model.choose(["q"], [["yes", "It is for pain."]])
    assert tokenizer.decode(read[0]).endswith("<think>\n\n</think>\n\n")
    assert [alone[1], longer[1]] == [len(tokenizer.encode(t)) for t in ("yes", "It is for pain.")]
    ((whole,),) = model.choose(["q"], [["yes"]], ending=True)
    assert whole[1] > alone[1] and whole[0] < alone[0]


def test_the_constrained_answer_is_the_greedy_one_among_the_choices(trained):
    """Token by token, by hand; also where one choice begins another."""
    setup, _ = trained
    model = make_model(trained)
    prompts = ["aspirin: yes or no, pain?", "What is insulin for?", "x"]
    choices = [["yes", "no", "yes no"], ["It is", "It is for sugar.", "no"], ["maybe"]]
    for prompt, options, got in zip(
        prompts, choices, model.constrained(prompts, choices), strict=True
    ):
        ids = [[*setup.tokenizer.encode(c), setup.tokenizer.eos_id] for c in options]
        left, depth = list(range(len(options))), 0
        while len(left) > 1:
            begun = options[left[0]], ids[left[0]][:depth]
            start = setup.tokenizer.decode(begun[1]) if depth else ""
            nexts = sorted({ids[c][depth] for c in left})
            sums = {}
            for token in nexts:
                text = setup.tokenizer.decode([*begun[1], token])
                ended = token == setup.tokenizer.eos_id
                whole, _ = naive_score(trained, prompt, start if ended else text, ending=ended)
                before = naive_score(trained, prompt, start, ending=False)[0] if depth else 0.0
                sums[token] = whole - before
            best = max(sums, key=sums.get)
            left = [c for c in left if ids[c][depth] == best]
            depth += 1
        assert got == left[0]


def test_an_answer_that_was_cut_says_so(trained):
    model = make_model(trained)
    prompts = [row["prompt"] for row in tiny.alignment_rows()[:4]]
    short, long = model.answer(prompts, 3), model.answer(prompts, 24)
    assert [w.text for w in short] == model.generate(prompts, 3)
    assert [w.ended for w in short] == [w.text == o.text for w, o in zip(short, long, strict=True)]
    assert not all(w.ended for w in short)


def test_a_completion_counts_what_training_counts(trained):
    """Under chatml: the text and the end marker; the newline after it is no target."""
    setup, _ = trained
    model = make_model(trained, "chatml")
    (_, count), (_, with_space) = model.score(["hi", "hi"], ["yes", " yes"])
    assert count == len(setup.tokenizer.encode("yes")) + 1
    assert with_space == len(setup.tokenizer.encode(" yes")) + 1


def test_generation_stops_at_the_end_of_the_turn(trained):
    """The tiny model has learnt to say yes or no; greedy, and the same for a list of turns."""
    model = make_model(trained)
    prompts = [row["prompt"] for row in tiny.alignment_rows()[:6]]
    answers = model.generate(prompts, 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = model.encoder.prompt([{"role": "user", "content": prompt}])
        (raw,) = model.engine.generate([ids], 12, model.stops.ids)
        assert answer == model.encoder.tokenizer.decode(raw)
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert model.generate(turns, 12) == answers
    hot = model.generate(prompts, 12, Sampling(temperature=1.5, seed=1))
    assert hot == model.generate(prompts, 12, Sampling(temperature=1.5, seed=1)) != answers


def test_long_prompts_keep_their_frame_and_are_counted(trained):
    model = make_model(trained)
    tokenizer, context = model.encoder.tokenizer, tiny.DECODER.max_positions
    frame = model.encoder.prompt([{"role": "user", "content": ""}])
    read = []

    def watch(method):
        def watched(prompts, *rest):
            read.extend(prompts)
            return method(prompts, *rest)

        return watched

    model.engine.generate = watch(model.engine.generate)
    model.engine.score = watch(model.engine.score)
    long = "aspirin: yes or no, pain? " * 40
    model.generate([long, "short"], 12)
    model.choose([long], [["yes", "It is for pain."]], ending=True)
    assert model.shortened == 2 and model.engine.truncated == 0
    for ids, room in ((read[0], 12), (read[2], len(tokenizer.encode("It is for pain.")) + 1)):
        assert context - room - 3 <= len(ids) <= context - room
        assert ids[:2] == frame[:2] and ids[-2:] == frame[-2:]
    assert tokenizer.decode(read[0]).endswith("pain? \nAssistant:")


@pytest.mark.parametrize(
    ("said", "answer", "reasoning"),
    [
        ("<think>\n\n</think>\n\nyes", "yes", ""),
        ("<think>\nIt thins.\n</think>\n\nyes", "yes", "It thins."),
        ("<think>\nIt thi", "", "It thi"),
        ("yes", "yes", ""),
    ],
)
def test_answers_come_without_what_the_template_writes_before_them(
    trained, said, answer, reasoning
):
    model = make_model(trained)
    model.encoder = Encoder(model.encoder.tokenizer, Jinja(chat_templates.THINKING))
    model.engine.generate = lambda prompts, *_: [model.encoder.tokenizer.encode(said)]
    assert [said[:2] for said in model.answer(["q"], 4)] == [(answer, reasoning)]
    assert model.generate(["q"], 4) == [answer]


def test_stops_in_whatever_tokens_they_are_written(trained, monkeypatch):
    model, question = make_model(trained), ["What is insulin for?"]
    written = []
    generate = model.engine.generate

    def kept(*arguments):
        written[:] = generate(*arguments)
        return written

    monkeypatch.setattr(model.engine, "generate", kept)
    (free,) = model.answer(question, 40)
    runs = [written[0][n : n + 8] for n in range(40)]
    encode = model.encoder.tokenizer.encode
    # A text that by itself is written in other tokens than here.
    stop = next(
        text
        for size, n in itertools.product(range(2, 6), range(2, 40))
        for text in (free.text[n : n + size],)
        if "\ufffd" not in text
        and not any(run[: len(encode(text))] == encode(text) for run in runs)
    )
    (cut,) = model.answer(question, 40, stops=["never said", stop])
    assert cut.text == free.text[: free.text.index(stop)] and cut.ended
    assert len(written[0]) < 40  # and nobody waits for more
    with pytest.raises(UserError, match="stops"):
        model.answer(["x"], 4, stops=[""])


class Says:
    """A decoder of one request, to which it says these ids until one of its stops is there."""

    def __init__(self, ids):
        self.ids, self.row = iter(ids), _Row()

    def submit(self, request):
        self.row = _Row(0, request, ids=list(request.prompt))

    def cancel(self, number):
        self.row.number = -1

    def step(self):
        if self.row.number < 0:
            return []
        token = next(self.ids)
        self.row.ids.append(token)
        ended = self.row.ended()
        self.row.number = -1 if ended else 0
        return [Said(0, (Token(token, 0.0),), ended)]


@pytest.mark.parametrize("by", ["the one who asks", "the template"])
def test_a_stop_begins_where_its_text_does(trained, monkeypatch, by):
    """In whatever tokens that is, as for the server; and no more is asked for."""
    model = make_model(trained)
    encode, stops = model.encoder.tokenizer.encode, ["is", " is"]
    written = [*encode("yes"), *encode(" "), *encode("is"), *encode(" no and no and no")]
    assert encode(" is") != [*encode(" "), *encode("is")]
    monkeypatch.setattr(model.engine, "decoding", lambda *_: Says(written))
    if by == "the template":
        model.stops, stops = model.stops._replace(texts=tuple(stops)), []
    reader = model.reader([1], stops)
    streamed = "".join(reader.add([token]).content for token in written)
    assert model.answer(["q"], 40, stops=stops) == [("yes", "", True)] and streamed == "yes"


def test_ends_written_as_text_are_cut(trained):
    model = make_model(trained)
    model.stops = model.stops._replace(texts=("###", "<end>"))
    encode = model.encoder.tokenizer.encode
    assert model.reader([1]).add(encode("yes<end> and ### more"), "length").content == "yes"
    assert model.reader([1]).add(encode("yes<en"), "length").content == "yes<en"


def test_several_turns(trained):
    model = make_model(trained)
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "again"},
    ]
    ((score, count),) = model.score([talk], ["no"])
    ((other, same),) = model.score(["again"], ["no"])
    assert count == same and score != pytest.approx(other, abs=1e-4)


def test_an_empty_prompt_is_an_error(trained):
    model = make_model(trained)

    class Nothing:
        def prompt(self, turns):
            return []

    model.encoder = Nothing()
    with pytest.raises(UserError, match="the prompt is empty and the template adds nothing"):
        model.generate([""], 4)
