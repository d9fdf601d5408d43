"""Templates in Jinja: what is prompt, what is said, and how many rows a conversation takes."""

import json

import pytest
import tokenizers as hf

from medmoe_jax.data import tokenizers as tk
from medmoe_jax.data.encode import Encoder, Frame
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.templates import doubts, load_template, stops
from medmoe_jax.errors import UserError
from tests.data import chat_templates as chat
from tests.data.samples import conversation, texts

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|return|>")
PLAIN_MARKS = ("<think>", "</think>")


def byte_level(folder, jinja=None, config=None, specials=MARKS):
    """A BPE on bytes with special tokens, and two added tokens that are not special."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens(list(specials))
    tokenizer.add_tokens(list(PLAIN_MARKS))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": None, "eos_token": "<|endoftext|>", **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": jinja}))
    return tk.load(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("words"))


def encoder(words, source, mask="completion", **options):
    template = Jinja(source, words.names, words.specials, options)
    return Encoder(words, template, mask)


def read(words, row):
    """What is said in a row: its targets as text, one for each answer."""
    runs, before = [], 0
    for token, target in zip(row.tokens.tolist(), row.loss_mask.tolist(), strict=True):
        if target:
            runs += [] if before else [[]]
            runs[-1].append(token)
        before = target
    return ["".join(map(written(words), run)) for run in runs]


def written(words):
    """The text of one token, special or not."""
    own = {i: text for text, i in words.specials.items()}
    return lambda token: own.get(token) or words.decode([token])


ONE = conversation("chest pain?", "aspirin")
TWO = conversation("chest pain?", "aspirin", "and fever?", "no")
THOUGHT = {
    "conversations": [
        {"role": "user", "content": "chest pain?"},
        {"role": "assistant", "content": "aspirin", "reasoning_content": "It thins."},
        {"role": "user", "content": "and fever?"},
        {"role": "assistant", "content": "no", "reasoning_content": "None."},
    ],
    "language": "",
}
EMPTY = "<think>\n\n</think>\n\n"
# Template, its options, conversation: what is said in each training row, by hand.
SAID = {
    "plain": (chat.PLAIN, {}, TWO, [["aspirin<|im_end|>", "no<|im_end|>"]]),
    "thinking": (
        chat.THINKING, {}, TWO, [[EMPTY + "aspirin<|im_end|>"], [EMPTY + "no<|im_end|>"]],
    ),
    "not thinking": (
        chat.THINKING, {"enable_thinking": False}, TWO, [["aspirin<|im_end|>"], ["no<|im_end|>"]],
    ),
    "thoughts": (
        chat.THINKING, {}, THOUGHT,
        [
            ["<think>\nIt thins.\n</think>\n\naspirin<|im_end|>"],
            ["<think>\nNone.\n</think>\n\nno<|im_end|>"],
        ],
    ),
    "an opened block": (chat.OPENED, {}, TWO, [["aspirin<|im_end|>"], ["no<|im_end|>"]]),
    "begun thoughts": (
        chat.BEGUN, {}, THOUGHT,
        [["It thins.\n</think>\n\naspirin<|im_end|>"], ["None.\n</think>\n\nno<|im_end|>"]],
    ),
    "no generation prompt": (
        chat.NO_PROMPT, {}, TWO,
        [["<|im_start|>assistant\naspirin<|im_end|>", "<|im_start|>assistant\nno<|im_end|>"]],
    ),
    "channels": (
        chat.CHANNELS, {}, TWO, [[" final\naspirin<|return|>"], [" final\nno<|return|>"]],
    ),
    "eos at the end": (chat.LAST_EOS, {}, TWO, [["aspirin<|im_end|>", "no<|im_end|>"]]),
    "two marks": (chat.TWO_MARKS, {}, TWO, [["aspirin<|im_end|>", "no<|im_end|>"]]),
    "counts": (chat.COUNTS, {}, TWO, [["aspirin<|im_end|>"], ["no<|im_end|>"]]),
    "looks at ends": (chat.LOOKS, {}, ONE, [["aspirin~<|im_end|>"]]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_in_each_row(words, name):
    source, options, row, wanted = SAID[name]
    encode = encoder(words, source, **options)
    assert [read(words, one) for one in encode.rows(row)] == wanted
    assert encode(row).tokens.tolist() == encode.rows(row)[-1].tokens.tolist()


@pytest.mark.parametrize("row", [ONE, TWO, THOUGHT], ids=["one", "two", "thought"])
@pytest.mark.parametrize("name", sorted(set(chat.ALL) - {"dated"}))
def test_every_answer_follows_exactly_its_prompt(words, name, row):
    """Each id after the prompt is a target up to the answer's end, in exactly one training row."""
    encode = encoder(words, chat.ALL[name])
    if row is THOUGHT and not encode.template.thinks:
        with pytest.raises(UserError, match=r"turn \d: the chat template has no place for reaso"):
            encode.rows(row)
        return
    turns, rows = row["conversations"], encode.rows(row)
    taught = 0
    for number in range(1, len(turns), 2):
        prompt = encode.prompt(turns[:number])
        text = encode.template.render(turns[:number], (), True)
        assert "".join(map(written(words), prompt)) == text  # as inference renders it
        holding = [
            one for one in rows
            if one.tokens[: len(prompt)].tolist() == prompt and one.loss_mask[len(prompt)]
        ]  # fmt: skip
        assert len(holding) == 1
        mask = holding[0].loss_mask[len(prompt) :].tolist()
        end = mask.index(0) if 0 in mask else len(mask)
        said = holding[0].tokens[len(prompt) : len(prompt) + end].tolist()
        assert said[-1] in encode.stops.ids and not set(said[:-1]) & set(encode.stops.ids)
        taught += end
    assert taught == sum(int(one.loss_mask.sum()) for one in rows)


def test_thoughts_in_the_content_are_thoughts(words):
    encode = encoder(words, chat.THINKING)
    inside = conversation("chest pain?", "<think>\nIt thins.\n</think>\n\naspirin")
    beside = {**THOUGHT, "conversations": THOUGHT["conversations"][:2]}
    assert encode(inside).tokens.tolist() == encode(beside).tokens.tolist()
    # Where a template has no place for them they are text like any other.
    kept = encoder(words, chat.PLAIN)(inside)
    assert read(words, kept) == ["<think>\nIt thins.\n</think>\n\naspirin<|im_end|>"]


def test_no_reasoning_after_a_prompt_that_has_closed_it(words):
    encode = encoder(words, chat.THINKING, enable_thinking=False)
    assert encode.frame == Frame()  # so that what a model says there is an answer
    turns = THOUGHT["conversations"]
    inside = conversation("chest pain?", "<think>\nIt thins.\n</think>\n\naspirin")
    for row in (inside, THOUGHT, {**THOUGHT, "conversations": turns[:2]}):
        with pytest.raises(UserError, match=r"turn 1: .* past the place of reasoning_content"):
            encode.rows(row)
    # An answer that is context may have been thought from; the template leaves that out.
    assert encode.prompt(turns[:3]) == encode.prompt(TWO["conversations"][:3])
    context = [turns[0], {**turns[1], "train_weight": 0}, *TWO["conversations"][2:]]
    (row,) = encode.rows({**THOUGHT, "conversations": context})
    assert read(words, row) == ["no<|im_end|>"]
    assert row.tokens.tolist() == encode(TWO).tokens.tolist()


@pytest.mark.parametrize("source", [chat.THINKING, None], ids=["jinja", "built-in"])
def test_the_mask_answer_leaves_out_the_reasoning(words, source):
    inside = conversation("chest pain?", "<think>\nIt thins.\n</think>\n\naspirin")
    encoders = [
        encoder(words, source, mask) if source else Encoder(words, load_template("chatml"), mask)
        for mask in ("completion", "answer")
    ]
    whole, answer = (encode(inside) for encode in encoders)
    assert whole.tokens.tolist() == answer.tokens.tolist()
    assert read(words, whole) == ["<think>\nIt thins.\n</think>\n\naspirin<|im_end|>"]
    assert read(words, answer) == ["aspirin<|im_end|>"]
    empty = encoders[1](ONE)
    assert read(words, empty) == [(EMPTY if source else "") + "aspirin<|im_end|>"]


@pytest.mark.parametrize("source", [chat.PLAIN, chat.THINKING, None])
def test_an_answer_of_weight_0_is_context(words, source):
    encode = encoder(words, source) if source else Encoder(words, load_template("chatml"))
    turns = [dict(turn) for turn in TWO["conversations"]]
    turns[1]["train_weight"] = 0
    rows = encode.rows({**TWO, "conversations": turns})
    assert [len(read(words, row)) for row in rows] == [1]
    assert read(words, rows[0])[0].endswith("no<|im_end|>")
    assert rows[0].tokens.tolist() == encode(TWO).tokens.tolist()


def test_white_space_is_stripped_where_the_template_strips_it(words):
    row = conversation(" q \n", "\n a ", system=" s\n")
    assert read(words, encoder(words, chat.STRIPS_SOME)(row)) == ["a<|im_end|>"]
    kept = encoder(words, chat.PLAIN)(row)
    assert read(words, kept) == ["\n a <|im_end|>"]
    shown = words.decode(encoder(words, chat.STRIPS_SOME)(row).tokens)
    assert shown == "system\n s\n\nuser\nq\nassistant\na\n"


def test_answers_without_text(words):
    for source in (chat.PLAIN, chat.THINKING, chat.OPENED):
        (said,) = read(words, encoder(words, source)(conversation("q", "")))
        assert said.endswith("<|im_end|>") and "assistant" not in said


def test_tools_and_their_calls(words):
    call = {"function": {"name": "dose", "arguments": {"drug": 'aspi"rin\n<|im_end|>'}}}
    turns = [
        {"role": "user", "content": "How much?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "75 mg"},
        {"role": "assistant", "content": "75 mg"},
    ]
    tools = [{"type": "function", "function": {"name": "dose", "parameters": {}}}]
    row = {"conversations": turns, "language": "", "tools": tools}
    encode = encoder(words, chat.TOOLS)
    called, answered = read(words, encode(row))
    assert called.startswith('<call>{"name": "dose"') and answered == "75 mg<|im_end|>"
    end = words.special("<|im_end|>")
    assert encode(row).tokens.tolist().count(end) == 5  # and none in the arguments
    assert (
        encode.prompt(turns[:1], tools)
        == encode(row).tokens.tolist()[: len(encode.prompt(turns[:1], tools))]
    )
    with pytest.raises(UserError, match=r"no place for tools \(it leaves out 'dose'\)"):
        encoder(words, chat.PLAIN).prompt(turns[:1], tools)
    with pytest.raises(UserError, match=r"no place for tool_calls \(it leaves out 'dose'\)"):
        encoder(words, chat.PLAIN).rows({**row, "tools": []})
    with pytest.raises(UserError, match="has no place for tool_calls, tools, role 'tool'"):
        Encoder(words, load_template("chatml")).rows(row)


DOSE = [{"type": "function", "function": {"name": "dose", "parameters": {}}}]
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
KEYS = CALLS.replace("c.function |", "[c.function.name, c.function.arguments.keys() | list] |")
# What a template writes of calls, the arguments of these, and what it leaves out first.
LEFT_OUT = {
    "calls": ("", [{"drug": "aspirin"}], "dose"),
    "calls without texts": ("", [{}], "dose"),
    "the second call": (CALLS.replace("tool_calls or []", "tool_calls[:1]"), [{}, {}], "dose"),
    "the name": (CALLS.replace("c.function |", "c.function.arguments |"), [{"mg": 75}], "dose"),
    "all arguments": (CALLS.replace("c.function |", "c.function.name |"), [{"mg": "75"}], "mg"),
    "a text": (KEYS, [{"drug": "aspirin"}], "aspirin"),
    "a key": (KEYS, [{"mg": {"a day": "75"}}], "a day"),
    "a number": (KEYS, [{"mg": [75, True]}], 75),
}


def called(*arguments, **more):
    """A conversation in which a function that is named in the question is called."""
    calls = [{"function": {"name": "dose", "arguments": one}} for one in arguments]
    turns = [
        {"role": "user", "content": "dose of aspirin, in mg, 75 a day?"},
        {"role": "assistant", "content": "", "tool_calls": calls, **more},
        {"role": "tool", "name": "dose", "content": "75 mg"},
        {"role": "assistant", "content": "75 mg"},
    ]
    return {"conversations": turns, "language": "", "tools": DOSE}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_calls_stand_whole_in_the_answers_that_are_learned(words, name):
    writes, arguments, missing = LEFT_OUT[name]
    row = called(*arguments)
    assert len(read(words, encoder(words, chat.TOOLS)(row))) == 2
    source = chat.TOOLS.replace(CALLS, "{% if m.tool_calls %}" + writes + "{% endif %}")
    with pytest.raises(UserError, match=rf"turn 1: .* tool_calls \(it leaves out {missing!r}\)"):
        encoder(words, source).rows(row)


# Drops the thoughts of all answers but the last.
THOUGHTS = "{{ '<think>' + m.reasoning_content + '</think>' if loop.last and m.reasoning_content }}"


@pytest.mark.parametrize("thoughts,missing", [("", "dose"), (THOUGHTS, "drug")])
def test_calls_that_are_context_are_written_too(words, thoughts, missing):
    source = chat.TOOLS.replace("{{ m.content }}", thoughts + "{{ m.content }}")
    thought = {"reasoning_content": "r"} if thoughts else {}
    row = called({"drug": "heparin"}, train_weight=0, **thought)
    encode = encoder(words, source)
    assert read(words, *encode.rows(row)) == ["75 mg<|im_end|>"]
    silent = encoder(words, source.replace(CALLS, ""))
    for ask in (silent.rows, lambda row: silent.prompt(row["conversations"][:3], row["tools"])):
        with pytest.raises(UserError, match=rf"turn 1: .* tool_calls \(.* out '{missing}'\)"):
            ask(row)


def test_tools_are_not_found_in_what_people_say(words):
    turns = called()["conversations"][:1]
    with pytest.raises(UserError, match=r"no place for tools \(it leaves out 'dose'\)"):
        encoder(words, chat.PLAIN).prompt(turns, DOSE)


def test_calls_in_a_form_of_the_templates_own(words):
    """Marks around each argument, sorted keys, Python's words for values, and no nulls."""
    source = chat.TOOLS.replace(
        CALLS,
        "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>"
        "{% for key, value in c.function.arguments | dictsort if value is not none %}"
        "<{{ key }}>{{ value }}</{{ key }}>{% endfor %}{% endfor %}",
    )
    row = called({"mg": 7.5, "drug": "a", "s": True, "n": None})
    said = read(words, encoder(words, source)(row))
    assert said[0] == "<dose><drug>a</drug><mg>7.5</mg><s>True</s><|im_end|>"


ROUGH = ["75 mg", '{"mg": 75}', "line 1\nline 2", ' "a"\t\\ \n', '75 "<|im_end|>"\nmg', "<think>"]


@pytest.mark.parametrize("result", ROUGH)
def test_results_may_be_written_as_json_text(words, result):
    row = called({"drug": "aspirin"})
    turns = row["conversations"]
    turns[2]["content"] = result
    encode = encoder(words, chat.RESULTS)
    text = encode.template.render(turns, DOSE, False)
    assert json.dumps(result.strip()) in text
    ids = encode(row).tokens.tolist()
    assert "".join(map(written(words), ids)) == text
    assert ids.count(words.special("<|im_end|>")) == 5  # and none in the result
    assert read(words, encode(row))[1] == "75 mg<|im_end|>"
    prompt = encode.prompt(turns[:3], DOSE)
    assert ids[: len(prompt)] == prompt


def test_what_is_advised_where_a_text_is_changed(words):
    row = called({"drug": "aspirin"})
    row["conversations"][2]["content"] = '"one" or "two" or "three"'
    cut = chat.RESULTS.replace("| trim |", "| truncate(9) |")
    with pytest.raises(UserError, match=r"turn 2: .* changes the text of a turn .* use another te"):
        encoder(words, cut).rows(row)
    # What the model is to say is not escaped.
    quoted = chat.PLAIN.replace("{{ m.content }}", "{{ m.content | tojson }}")
    with pytest.raises(UserError, match=r"turn 1: .* changes the text of a turn .* a built-in te"):
        encoder(words, quoted).rows(conversation('"q"', 'yes, "no"'))


TEXT_ARGUMENTS = chat.TOOLS.replace("c.function | tojson", "c.function.name + c.function.arguments")


def test_templates_that_expect_arguments_as_text(words):
    call = {"function": {"name": "dose", "arguments": {"drug": "aspirin"}}}
    turns = [*ONE["conversations"][:1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"conversations": turns, "language": ""}
    (said,) = read(words, encoder(words, TEXT_ARGUMENTS)(row))
    assert said == '<call>dose{"drug": "aspirin"}</call><|im_end|>'


@pytest.mark.parametrize("bad", ["c.id | default('') | length != 9", "not tools"])
@pytest.mark.parametrize("source", [chat.TOOLS, TEXT_ARGUMENTS], ids=["objects", "text"])
def test_what_a_template_asks_of_calls_does_not_change_the_arguments(words, source, bad):
    raises = "{% if " + bad + " %}{{ raise_exception('a bad call') }}{% endif %}"
    call = {"id": "dose00001", "function": {"name": "dose", "arguments": {"drug": "aspirin"}}}
    turns = [*ONE["conversations"][:1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "dose", "parameters": {}}}]
    row = {"conversations": turns, "language": "", "tools": tools}
    strict = encoder(words, source.replace("<call>", raises + "<call>"))
    assert strict(row).tokens.tolist() == encoder(words, source)(row).tokens.tolist()


def test_options_reach_the_template_or_are_errors():
    def load(source, **options):
        return Jinja(source, {"eos_token": "</s>"}, (), options)

    assert load(chat.THINKING, enable_thinking=False).options == {"enable_thinking": False}
    with pytest.raises(UserError, match=r"template_options\.thinking: .*\(it uses enable_thinking"):
        load(chat.THINKING, thinking=False)
    for name in ("messages", "eos_token", "add_generation_prompt"):
        with pytest.raises(UserError, match=rf"data\.template_options\.{name}: "):
            load(chat.LAST_EOS, **{name: "x"})
    with pytest.raises(UserError, match="the built-in template 'chatml' has no options"):
        load_template("chatml", None, {"enable_thinking": False})


def test_a_date_is_an_option_of_templates_that_ask_for_it(words):
    with pytest.raises(UserError, match=r"data\.template_options\.strftime_now='YYYY-MM-DD'"):
        encoder(words, chat.DATED)
    with pytest.raises(UserError, match="'today' is no date; write YYYY-MM-DD"):
        encoder(words, chat.DATED, strftime_now="today")
    encode = encoder(words, chat.DATED, strftime_now="2026-01-31")
    assert words.decode(encode(ONE).tokens).startswith("31 January 2026\n")


def test_what_ends_an_answer(words, tmp_path):
    end = words.special("<|im_end|>")
    for source in (chat.PLAIN, chat.LAST_EOS, chat.TWO_MARKS, chat.THINKING):
        assert encoder(words, source).stops == ((words.eos_id, end), ())
    assert encoder(words, chat.CHANNELS).stops.ids == (words.eos_id, words.special("<|return|>"))
    # A mark that is no token of this vocabulary ends an answer as text, always in the same ids.
    strange = chat.PLAIN.replace("<|im_end|>", "</turn>")
    encode = encoder(words, strange)
    assert encode.stops == ((words.eos_id,), ("</turn>",))
    ids = words.encode("</turn>")
    for answer in ("aspirin", "no", "is 1 <", "yes\n"):
        row = encode(conversation("q", answer))
        (at,) = (row.loss_mask.nonzero()[0].max() + 1,)
        assert row.tokens[at - len(ids) : at].tolist() == ids


def test_a_template_or_base_without_an_end(words, tmp_path):
    silent = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="nothing after an answer that could end it"):
        encoder(words, silent)
    endless = byte_level(tmp_path, config={"eos_token": None})
    with pytest.raises(
        UserError, match="has no eos token, and the template ends an answer with no"
    ):
        Encoder(endless, load_template("user_assistant"))
    assert stops(load_template("chatml"), endless).ids == (endless.special("<|im_end|>"),)
    early = chat.PLAIN.replace("{{ m.content }}", "<|im_end|>{{ m.content }}")
    with pytest.raises(UserError, match="which ends an answer, before the answer's text"):
        encoder(words, early.removesuffix(chat.ASK))


def test_the_ends_that_a_model_names(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [402, 400, 5]}')
    words = byte_level(tmp_path)
    assert words.text_of(402) == "<|im_end|>" and words.eos_id == 400
    # 5 is an ordinary piece of text, at which no answer may end.
    assert words.stop_ids == (402, 400)
    assert stops(load_template("user_assistant"), words).ids == (400, 402)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 402}')
    assert tk.load(tmp_path).stop_ids == (402,)


def test_doubts_about_a_template(words, plain_tokenizer, tmp_path):
    assert doubts(load_template("chatml"), words) == []
    assert doubts(load_template("user_assistant"), plain_tokenizer) == []
    assert doubts(load_template("plain"), plain_tokenizer) == []  # which has no template
    talks = byte_level(tmp_path, "{{ messages[0].content }}")
    (bare,) = doubts(load_template("plain", talks), talks)
    assert "writes nothing around turns, and this tokenizer brings a chat template" in bare
    (marks,) = doubts(load_template("chatml"), plain_tokenizer)
    assert "its marks <|im_start|>, <|im_end|> are no tokens of this vocabulary" in marks
    named = byte_level(tmp_path, config={"bos_token": "<|return|>"})
    assert doubts(load_template("chatml"), named) == []  # the file puts none before a text
    begins = json.loads((tmp_path / "tokenizer.json").read_text())
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    token = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["!"]}}
    begins["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": token,
    }  # fmt: skip
    begins["added_tokens"].append(
        begins["added_tokens"][0] | {"id": 0, "content": "<s>", "special": True}
    )
    del begins["model"]["vocab"]["!"]
    begins["model"]["vocab"]["<s>"] = 0
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_text(json.dumps(begins))
    begins = tk.load(bare)
    (bos,) = doubts(load_template("chatml"), begins)
    assert "never writes <s>" in bos and "(bos)" in bos
    assert doubts(load_template("user_assistant", begins), begins) == []


def test_white_space_around_a_text_belongs_to_what_stands_beside_it(words):
    """Text between two tokens of their own is encoded as one, whoever wrote it."""
    source = chat.PLAIN.replace("<|im_end|>\n", "<|im_end|> ").replace("<|im_start|>", "a ")
    encode = encoder(words, source)
    ids = encode(TWO).tokens.tolist()
    assert ids == words.encode_markup(encode.template.render(TWO["conversations"], (), False))
    assert len(words.encode(" a")) < len(words.encode(" ") + words.encode("a"))


def test_masks_that_ask_for_frames(words):
    with pytest.raises(UserError, match="mask: 'qwen_legacy' asks for the frames of all turns"):
        encoder(words, chat.PLAIN, "qwen_legacy")
