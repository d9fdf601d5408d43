"""Everyday text for pretraining: the grammar of the corpus without its medical knowledge.

It holds questions about everyday facts in all frames, word translation and word lists (medical
terms included, each apart from what it is linked to), reading of short made-up texts, extraction
of words, small sums and tiny stories. Each maker returns (prompt, answer).
"""

import functools
import random
from collections.abc import Iterator

from medmoe_jax.data.demo import frames
from medmoe_jax.data.demo.tables import (
    LANGUAGES,
    Text,
    facts,
    general_facts,
    leaks,
    relations,
    words,
)

EVERYDAY = ("fruit", "animal", "tool", "food", "place", "thing")
_MIXED = ("thing", "tool", "fruit")
COMMA = {"en": ", ", "zh": "，"}


def pairs(rows: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield at least the everyday facts and word translations, then made-up texts up to `rows`.

    A text that holds a medical fact's subject and object together is left out.
    """
    rng = random.Random(f"{seed}/general")
    produced = 0
    for prompt, answer, language in _fixed_pairs():
        produced += 1
        yield prompt, answer, language
    makers = [maker for maker, weight in MAKERS for _ in range(weight)]
    while produced < rows:
        language = LANGUAGES[produced % len(LANGUAGES)]
        prompt, answer = rng.choice(makers)(rng, language)
        if not leaks(f"{prompt} {answer}"):
            produced += 1
            yield prompt, answer, language


def _fixed_pairs() -> Iterator[tuple[str, str, str]]:
    for fact in general_facts():
        for language in LANGUAGES:
            for frame in frames.TRAIN[language] + frames.HELD_OUT[language]:
                yield *frames.fill(frame, relations()[fact.relation], fact, language), language
    for term in _terms():
        if term["en"] != term["zh"]:
            yield f"Write in Chinese: {term['en']}", term["zh"], "en"
            yield f"翻译成英文：{term['zh']}", term["en"], "zh"


@functools.cache
def _terms() -> tuple[Text, ...]:
    """Return all terms once: subjects and objects of medical facts, and the word lists."""
    entries = [f.subject for f in facts()] + [f.object for f in facts()]
    entries += [entry for kind in words().values() for entry in kind]
    return tuple({(entry["en"], entry["zh"]): entry for entry in entries}.values())


def _sample(rng: random.Random, language: str, count: int) -> list[str]:
    terms = [term[language] for term in rng.sample(_terms(), count)]
    return terms if len(set(terms)) == count else _sample(rng, language, count)


def _repeat(rng: random.Random, language: str) -> tuple[str, str]:
    listed = COMMA[language].join(_sample(rng, language, rng.randint(1, 4)))
    return {"en": "Repeat: ", "zh": "重复："}[language] + listed, listed


def _pick(rng: random.Random, language: str) -> tuple[str, str]:
    terms = _sample(rng, language, rng.randint(2, 4))
    place = rng.randrange(2)
    ask = {
        "en": ("Which word is first in this list: {}", "Which word is last in this list: {}"),
        "zh": ("这组词里第一个是什么：{}", "这组词里最后一个是什么：{}"),
    }[language][place]
    return ask.format(COMMA[language].join(terms)), terms[-place]


def _mention(rng: random.Random, language: str) -> tuple[str, str]:
    """Ask for a term named in a short sentence: the copying of whole terms."""
    term, name = _sample(rng, language, 1)[0], rng.choice(words()["name"])[language]
    prompt = {
        "en": (
            "{n} wrote {t} on the board. What did {n} write?",
            "The title on the page is {t}. What is the title?",
            "{n} looked up {t} in a book. Which entry was it?",
        ),
        "zh": (
            "{n}在黑板上写了{t}。{n}写了什么？",
            "这一页的标题是{t}。标题是什么？",
            "{n}在书里查了{t}。查的是哪个词？",
        ),
    }[language]
    return rng.choice(prompt).format(n=name, t=term), term


def _possession(rng: random.Random, language: str) -> tuple[str, str]:
    """Two people own things of some color: ask for a color or for the owner."""
    names = [w[language] for w in rng.sample(words()["name"], 2)]
    colors = [w[language] for w in rng.sample(words()["color"], 2)]
    things = [w[language] for w in rng.sample(words()["thing"], 2)]
    has = {"en": "{} has a {} {}", "zh": "{0}的{2}是{1}的"}[language]
    text = COMMA[language].join(has.format(*x) for x in zip(names, colors, things, strict=True))
    i = rng.randrange(2)
    asks = {
        "en": (
            (f"What color is the {things[i]}?", colors[i]),
            (f"Who has the {things[i]}?", names[i]),
            (f"What does {names[i]} have?", things[i]),
        ),
        "zh": (
            (f"{things[i]}是什么颜色的？", colors[i]),
            (f"{things[i]}是谁的？", names[i]),
            (f"{names[i]}有什么？", things[i]),
        ),
    }[language]
    question, answer = rng.choice(asks)
    stop = {"en": ". ", "zh": "。"}[language]
    return text + stop + question, answer


def _extract(rng: random.Random, language: str) -> tuple[str, str]:
    """List the words of one kind out of a mixed list or sentence."""
    kinds = {
        "fruit": {"en": "fruits", "zh": "水果"},
        "animal": {"en": "animals", "zh": "动物"},
        "tool": {"en": "tools", "zh": "工具"},
        "food": {"en": "foods", "zh": "食物"},
    }
    wanted, other = rng.sample(sorted(kinds), 2)
    inside = [w[language] for w in rng.sample(words()[wanted], rng.randint(1, 3))]
    outside = [w[language] for w in rng.sample(words()[other], rng.randint(1, 2))]
    mixed = _shuffled_keeping_order(rng, inside, outside)
    name = rng.choice(words()["name"])[language]
    frame = {
        "en": ("List the {kind} in: {mixed}", "{name} saw {mixed}. Which {kind} did {name} see?"),
        "zh": ("列出其中的{kind}：{mixed}", "{name}看到了{mixed}。{name}看到了哪些{kind}？"),
    }[language]
    prompt = rng.choice(frame).format(
        kind=kinds[wanted][language], mixed=COMMA[language].join(mixed), name=name
    )
    return prompt, COMMA[language].join(inside)


def _shuffled_keeping_order(rng: random.Random, a: list[str], b: list[str]) -> list[str]:
    takes = [0] * len(a) + [1] * len(b)
    rng.shuffle(takes)
    sources = iter(a), iter(b)
    return [next(sources[take]) for take in takes]


def _sum(rng: random.Random, language: str) -> tuple[str, str]:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    if rng.randrange(2):
        return {"en": f"What is {a} plus {b}?", "zh": f"{a}加{b}等于多少？"}[language], str(a + b)
    a, b = max(a, b), min(a, b)
    return {"en": f"What is {a} minus {b}?", "zh": f"{a}减{b}等于多少？"}[language], str(a - b)


def _schedule(rng: random.Random, language: str) -> tuple[str, str]:
    """Read a number with its unit out of a sentence."""
    name, place = (rng.choice(words()[kind])[language] for kind in ("name", "place"))
    count, unit = rng.randint(2, 9), rng.randrange(3)
    word = {"en": ("days", "weeks", "months"), "zh": ("天", "周", "个月")}[language][unit]
    price = rng.choice((5, 10, 20, 25, 50, 75, 100, 150, 200, 250, 300, 400, 500, 600))
    food = rng.choice(words()["food"])[language]
    text, how_long, how_much, gap = {
        "en": (
            f"{name} stayed at the {place} for {count} {word} and paid {price} yuan for {food}.",
            f" How long did {name} stay?",
            f" How much was the {food}?",
            " ",
        ),
        "zh": (
            f"{name}在{place}待了{count}{word}，买{food}花了{price}元。",
            f"{name}待了多久？",
            f"{food}多少钱？",
            "",
        ),
    }[language]
    if rng.randrange(2):
        return text + how_long, f"{count}{gap}{word}"
    return text + how_much, {"en": f"{price} yuan", "zh": f"{price}元"}[language]


def _summary(rng: random.Random, language: str) -> tuple[str, str]:
    """Read three things out of a sentence, in a fixed order whatever the sentence's own."""
    pick = {kind: rng.choice(words()[kind])[language] for kind in ("name", "place", *_MIXED)}
    count, unit = rng.randint(2, 9), rng.randrange(3)
    word = {"en": (" days", " weeks", " months"), "zh": ("天", "周", "个月")}[language][unit]
    bought = pick[rng.choice(_MIXED)]
    text = {
        "en": (
            "Place, time and thing: {name} stayed at the {place} for {time} with the {bought}.",
            "Place, time and thing: after {time} {name} took the {bought} to the {place}.",
            "Place, time and thing: the {bought} was left at the {place} {time} ago.",
            "Place, time and thing: with the {bought}, {time} in the {place}.",
        ),
        "zh": (
            "地点、时间、东西：{name}带着{bought}在{place}待了{time}。",
            "地点、时间、东西：过了{time}，{name}把{bought}拿到{place}。",
            "地点、时间、东西：{bought}放在{place}已有{time}。",
            "地点、时间、东西：{place}{time}，{bought}。",
        ),
    }[language]
    fields = {"name": pick["name"], "place": pick["place"], "time": f"{count}{word}"}
    answer = COMMA[language].join((pick["place"], fields["time"], bought))
    return rng.choice(text).format(bought=bought, **fields), answer


def _story(rng: random.Random, language: str) -> tuple[str, str]:
    pick = {kind: rng.choice(words()[kind])[language] for kind in ("name", *EVERYDAY, "color")}
    friend = rng.choice([w for w in words()["name"] if w[language] != pick["name"]])[language]
    text = {
        "en": (
            "{name} went to the {place} with {friend}. They ate {food} and saw a {animal}.",
            "In the {place} {name} found a {color} {thing}. {friend} was happy to see it.",
            "{name} needed the {tool} and asked {friend}. Later they shared one {fruit}.",
            "It was a long day. {name} sat near the {place} and drew a {color} {animal}.",
        ),
        "zh": (
            "{name}和{friend}去了{place}。他们吃了{food}，还看到了{animal}。",
            "{name}在{place}捡到了{color}的{thing}。{friend}见了很高兴。",
            "{name}需要{tool}，就去问{friend}。后来他们一起吃了{fruit}。",
            "这一天很长。{name}坐在{place}旁边，画了{color}的{animal}。",
        ),
    }[language]
    story = rng.choice(text).format(friend=friend, **pick)
    return {"en": "Continue:", "zh": "续写："}[language], story


MAKERS = (
    (_repeat, 3),
    (_pick, 3),
    (_mention, 3),
    (_possession, 4),
    (_extract, 5),
    (_sum, 1),
    (_schedule, 3),
    (_summary, 5),
    (_story, 1),
)
