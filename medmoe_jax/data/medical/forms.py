"""From a record of a set to a row: exams, labels, free text, entities, relations.

A form takes a card, a record, where it stands, its language and the set's labels, and gives a row,
or None where the card leaves such records out.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence

from medmoe_jax.data.medical.cards import SEVERAL, MedicalSet
from medmoe_jax.data.medical.fields import (
    LETTERS,
    answers_of,
    filled,
    look,
    need,
    need_list,
    one_of,
    options_of,
    text,
)
from medmoe_jax.data.medical.files import REPAIR
from medmoe_jax.data.medical.row import Row, build
from medmoe_jax.errors import UserError

ANSWER_WORD = {
    "af": "Antwoord",
    "am": "መልስ",
    "ar": "الإجابة",
    "bm": "Jaabi",
    "de": "Antwort",
    "en": "Answer",
    "es": "Respuesta",
    "fr": "Réponse",
    "hi": "उत्तर",
    "ig": "Azịza",
    "it": "Risposta",
    "ja": "答え",
    "ko": "정답",
    "nso": "Karabo",
    "pt": "Resposta",
    "ru": "Ответ",
    "sn": "Mhinduro",
    "st": "Karabo",
    "tn": "Karabo",
    "ts": "Nhlamulo",
    "vi": "Đáp án",
    "xh": "Impendulo",
    "zh": "答案",
    "zu": "Impendulo",
}
Labels = Mapping[str, str]


def exam(entry: MedicalSet, record: dict, where: str, language: str, labels: Labels) -> Row | None:
    """A question with lettered options.

    Its answer is a letter, or, where several may be right (`several` is `keep`: all questions,
    `only`: those alone), a list of letters.
    """
    read = entry.read
    listed = options_of(record, str(read["options"]), where)
    right = answers_of(record, str(read["answer"]), listed, read.get("counts_from"), where)
    # Those without text are not shown; numbers count them.
    shown = [place for place, (_, option) in enumerate(listed) if option]
    if not 2 <= len(shown) <= len(LETTERS):
        raise UserError(f"{where}: {len(shown)} options in field {read['options']!r}; {REPAIR}")
    options = [listed[place] for place in shown]
    places = [shown.index(place) for place in right]
    several = read.get("several", "")
    if len(places) > 1 and not several:
        raise UserError(
            f"{where}: {len(places)} right options, where one is expected; {REPAIR}, or say in the "
            f"card what becomes of such questions: several = {' or '.join(map(repr, SEVERAL))}"
        )
    if (len(places) > 1 and several == "drop") or (len(places) == 1 and several == "only"):
        return None
    letters = LETTERS[: len(options)]
    question = text(record, str(read["question"]), where).strip()
    question = question.partition(str(read["cut"]))[0] if "cut" in read else question
    context = look(record, str(read["context"])) if "context" in read else None
    before = f"{text(record, str(read['context']), where).strip()}\n" if context else ""
    lists = several in ("keep", "only")
    return build(
        entry.name,
        language,
        before + question,
        ", ".join(letters[place] for place in places),
        after=_lettered(language, letters, [option for _, option in options]),
        choices="" if lists else letters,
        texts=tuple(option for _, option in options),
        guide=entry.guide,
        allowed=tuple(letters) if lists else (),
    )


def _lettered(language: str, letters: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    word = ANSWER_WORD.get(language, ANSWER_WORD["en"])
    return "\n" + "\n".join(lines) + f"\n{word} ({'/'.join(letters)}):"


def label(entry: MedicalSet, record: dict, where: str, language: str, labels: Labels) -> Row:
    """A text and one label of a closed set; `other` is one that a record's own list lacks."""
    read = entry.read
    if labels:
        raw = text(record, str(read["answer"]), where).strip()
        answer = labels[one_of(raw, labels, str(read["answer"]), where)]
        choices = tuple(dict.fromkeys(labels.values()))
    else:
        choices = tuple(dict.fromkeys(map(str, need(record, str(read["labels"]), where))))
        choices += (str(read["other"]),) if read.get("other", choices[0]) not in choices else ()
        answer = one_of(text(record, str(read["answer"]), where), choices, "answer", where)
    before, after = _around(entry, record, where)
    body = text(record, str(read["text"]), where)
    guide = entry.guide.replace("{labels}", _listed(choices, language))
    return build(
        entry.name,
        language,
        body,
        answer,
        before=before,
        after=after,
        choices=choices,
        guide=guide,
    )


def _around(entry: MedicalSet, record: dict, where: str) -> tuple[str, str]:
    """What stands before a record's text, and after it."""
    before, after = (str(entry.read.get(key, "")) for key in ("before", "after"))
    return filled(before, record, where), filled(after, record, where)


def _listed(words: Sequence[str], language: str) -> str:
    return ("、" if language in ("zh", "ja") else ", ").join(words)


def free_text(entry: MedicalSet, record: dict, where: str, language: str, labels: Labels) -> Row:
    """A text and another as its answer.

    `allowed` are the terms that may stand in the answer, or its least and greatest value; of what
    `tidy` names, empty lines and double spaces go.
    """
    read = entry.read
    before, after = _around(entry, record, where)
    body, answer = (text(record, str(read[k]), where) for k in ("text", "answer"))
    body = _tidy(body) if "text" in read.get("tidy", ()) else body
    answer = _tidy(answer) if "answer" in read.get("tidy", ()) else answer
    allowed: list[str] = []
    for path in str(read["allowed"]).split(",") if "allowed" in read else ():
        value = need(record, path.strip(), where)
        allowed += map(str, value) if isinstance(value, list) else [str(value)]
    return build(
        entry.name,
        language,
        body,
        answer,
        before=before,
        after=after,
        guide=entry.guide,
        allowed=tuple(allowed),
    )


def _tidy(body: str) -> str:
    return "\n".join(" ".join(line.split()) for line in body.split("\n") if line.strip())


def entities(entry: MedicalSet, record: dict, where: str, language: str, labels: Labels) -> Row:
    """A text and the entities in it, one line a type, each mention once, in order.

    Chinese `{type}实体：a，b`, elsewhere `{type}: a; b`; a mention that holds a sign of the grammar
    stands in quotes. Without any entity, `none`. The record has tokens with BIO tags, a list of
    mentions of the one type, or `entities`.
    """
    read = entry.read
    types = _types(read["types"])
    body, found = _found(entry, record, where)
    for kind, *_ in found:
        if kind not in types:
            raise UserError(f"{where}: entity type {kind!r} is not one of {', '.join(types)}")
    named = [(types[kind], mention) for kind, mention, *_ in found]
    # Spans are counted from the first sign that is not a space, where the row's body begins.
    lead = len(body) - len(body.lstrip())
    spans = [(types[f[0]], f[2] - lead, f[3] - lead) for f in found if len(f) == 4]
    kinds = list(dict.fromkeys(types.values()))
    answer = answer_lines(
        named,
        kinds,
        suffix=str(read.get("suffix", ": ")),
        comma=str(read.get("comma", "; ")),
        none=str(read.get("none", "none")),
    )
    before = str(read.get("before", "")).replace("{types}", _listed(kinds, language))
    guide = entry.guide.replace("{types}", _listed(kinds, language))
    return build(entry.name, language, body, answer, before=before, guide=guide, spans=tuple(spans))


def _types(given) -> dict[str, str]:
    return given if isinstance(given, dict) else {kind: kind for kind in given}


def _found(entry: MedicalSet, record: dict, where: str) -> tuple[str, list[tuple]]:
    """The text of a record and `(type, mention[, start, stop])` of what is in it."""
    read = entry.read
    if "tokens" in read:
        tokens = need(record, str(read["tokens"]), where)
        tags = need(record, str(read["tags"]), where)
        if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags):
            raise UserError(f"{where}: tokens and tags are not two lists of one length; {REPAIR}")
        return _from_tags([str(t) for t in tokens], [str(t) for t in tags], str(read["glue"]))
    body = text(record, str(read["text"]), where)
    if "mentions" not in read:
        return body, list(record["entities"])
    mentions = need_list(record, str(read["mentions"]), where)
    try:
        mentions = ast.literal_eval(mentions) if isinstance(mentions, str) else mentions
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{where}: {read['mentions']!r} is no list ({error}); {REPAIR}") from error
    if not isinstance(mentions, list):
        raise UserError(f"{where}: {read['mentions']!r} is no list; {REPAIR}")
    (kind,) = _types(read["types"])
    return body, [(kind, str(mention)) for mention in mentions]


def _from_tags(tokens: list[str], tags: list[str], glue: str) -> tuple[str, list[tuple]]:
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token) + len(glue))
    found = []
    for kind, start, stop in spans(tags):
        mention = glue.join(tokens[start:stop])
        found.append((kind, mention, starts[start], starts[start] + len(mention)))
    return glue.join(tokens), found


def spans(tags: Sequence[str]) -> Iterable[tuple[str, int, int]]:
    """`(type, start, stop)` of BIO tags such as `B-Disease` or `I_drug`.

    An `I` that continues nothing of its type starts an entity, as in the CoNLL scorer.
    """
    start, kind = 0, None
    for i, tag in enumerate([*tags, "O"]):
        goes_on = tag[0] == "I" and tag[2:] == kind
        if kind is not None and not goes_on:
            yield kind, start, i
            kind = None
        if tag[0] != "O" and not goes_on:
            start, kind = i, tag[2:]


def answer_lines(
    entities: Iterable[tuple[str, str]], types: Sequence[str], *, suffix: str, comma: str, none: str
) -> str:
    """The answer text of `(type, mention)` pairs in the grammar of `entities`."""
    found: dict[str, dict[str, None]] = {kind: {} for kind in types}
    for kind, mention in entities:
        found[kind][quoted(mention, comma)] = None
    lines = [f"{kind}{suffix}{comma.join(found[kind])}" for kind in types if found[kind]]
    return "\n".join(lines) or none


def quoted(mention: str, comma: str) -> str:
    """A mention, in quotes where it holds the sign that parts mentions."""
    mention = mention.replace("\n", " ").strip()
    return f'"{mention}"' if comma.strip() in mention else mention


def relations(entry: MedicalSet, record: dict, where: str, language: str, labels: Labels) -> Row:
    """A text and the pairs in it, one line each: `{head} -> {tail}`."""
    pairs = need(record, "pairs", where) if record.get("pairs") else []
    return build(
        entry.name,
        language,
        text(record, str(entry.read["text"]), where),
        "\n".join(dict.fromkeys(f"{head} -> {tail}" for head, tail in pairs)) or "none",
        before=str(entry.read.get("before", "")),
        guide=entry.guide,
    )


Form = Callable[[MedicalSet, dict, str, str, Labels], Row | None]
FORMS: dict[str, Form] = {
    "exam": exam,
    "label": label,
    "text": free_text,
    "entities": entities,
    "relations": relations,
}
