"""Clinical format tasks: short notes in, answers in a strict output format.

Four tasks, each in English and Chinese:
`triage_note` a line of complaint, duration and drug; `entities` the entities of one type;
`triage` a coded label (a red flag is urgent, else weeks and months are routine, days are soon);
`dose` a normalised prescription.
A case is a choice of table entries; a tenth of all cases is held out, and so are some frames.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from zlib import crc32

from medmoe_jax.data.demo.tables import LANGUAGES, Text, words

UNITS = (
    {"en": "days", "zh": "天"},
    {"en": "weeks", "zh": "周"},
    {"en": "months", "zh": "个月"},
)
SOON = {"en": "TRIAGE=SOON", "zh": "分诊=尽快"}
URGENT = {"en": "TRIAGE=URGENT", "zh": "分诊=紧急"}
ROUTINE = {"en": "TRIAGE=ROUTINE", "zh": "分诊=常规"}
DOSES = (5, 10, 20, 25, 50, 75, 100, 150, 200, 250, 300, 400, 500, 600)
FREQUENCIES = (
    ({"en": "once a day", "zh": "每日一次"}, 1),
    ({"en": "every night", "zh": "每晚一次"}, 1),
    ({"en": "twice a day", "zh": "每日两次"}, 2),
    ({"en": "every 12 hours", "zh": "每12小时一次"}, 2),
    ({"en": "three times a day", "zh": "每日三次"}, 3),
    ({"en": "every 8 hours", "zh": "每8小时一次"}, 3),
    ({"en": "four times a day", "zh": "每日四次"}, 4),
    ({"en": "every 6 hours", "zh": "每6小时一次"}, 4),
)


@dataclass(frozen=True)
class Case:
    """Fields of one prompt, its answer, and a key that is the same for the same choice."""

    key: str
    fields: dict[str, str]
    answer: str


@dataclass(frozen=True)
class FormatTask:
    """A task: `draw(rng, language)` makes a case, `frames` put its fields into a prompt."""

    name: str
    draw: Callable[[random.Random, str], Case]
    train_frames: dict[str, tuple[str, ...]]
    held_out_frames: dict[str, tuple[str, ...]]


def held_out(key: str) -> bool:
    """Say whether the case with this key is kept for evaluation (about one in ten)."""
    return crc32(key.encode()) % 10 == 0


def training_pairs(rows: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield `rows` of (prompt, answer, language), equally many per task and language."""
    streams = [(task, language) for task in TASKS for language in LANGUAGES]
    generators = [random.Random(f"{seed}/train/{t.name}/{language}") for t, language in streams]
    for i in range(rows):
        (task, language), rng = streams[i % len(streams)], generators[i % len(streams)]
        case = _draw_case(task, language, rng, wanted=False)
        frame = rng.choice(task.train_frames[language])
        yield frame.format(**case.fields), case.answer, language


def items(per_task: int, seed: int) -> Iterator[dict]:
    """Yield `per_task` items per task and language: held-out cases, half in held-out frames."""
    for task in TASKS:
        for language in LANGUAGES:
            rng = random.Random(f"{seed}/items/{task.name}/{language}")
            seen: set[str] = set()
            while len(seen) < per_task:
                case = _draw_case(task, language, rng, wanted=True)
                if case.key in seen:
                    continue
                pool = task.held_out_frames if len(seen) % 2 else task.train_frames
                seen.add(case.key)
                yield {
                    "prompt": rng.choice(pool[language]).format(**case.fields),
                    "answer": case.answer,
                    "choices": [],
                    "language": language,
                    "group": "alignment",
                    "task": task.name,
                }


def _draw_case(task: FormatTask, language: str, rng: random.Random, wanted: bool) -> Case:
    while True:
        case = task.draw(rng, language)
        if held_out(case.key) == wanted:
            return case


def _complaint(rng: random.Random) -> tuple[Text, bool]:
    """Draw a complaint and say whether it is a red flag; one in three is."""
    kind = "urgent" if rng.randrange(3) == 0 else "mild"
    return rng.choice(words()[kind]), kind == "urgent"


def _duration(rng: random.Random, language: str) -> tuple[str, int]:
    """Draw a duration as text, with the index of its unit."""
    count, unit = rng.randrange(2, 10), rng.randrange(len(UNITS))
    gap = " " if language == "en" else ""
    return f"{count}{gap}{UNITS[unit][language]}", unit


def _draw_triage_note(rng: random.Random, language: str) -> Case:
    complaint = _complaint(rng)[0]
    duration, _ = _duration(rng, language)
    drug = rng.choice(words()["drug"])
    fields = {"complaint": complaint[language], "duration": duration, "drug": drug[language]}
    line = {
        "en": "complaint: {complaint} | duration: {duration} | drug: {drug}",
        "zh": "主诉：{complaint} | 病程：{duration} | 用药：{drug}",
    }[language]
    key = f"note/{complaint['en']}/{duration}/{drug['en']}"
    return Case(key, fields, line.format(**fields))


def _draw_entities(rng: random.Random, language: str) -> Case:
    symptoms = rng.sample(words()["mild"] + words()["urgent"], rng.choice((2, 2, 3)))
    drugs = rng.sample(words()["drug"], rng.choice((1, 2)))
    kind = rng.randrange(2)
    comma, conjunction = {"en": (", ", " and "), "zh": ("，", "和")}[language]
    names = {"en": ("symptom", "drug"), "zh": ("症状", "药物")}[language]
    answer = {"en": "{type} entities: {list}", "zh": "{type}实体：{list}"}[language]
    listed = [[entry[language] for entry in group] for group in (symptoms, drugs)]
    joined = [conjunction.join((comma.join(g[:-1]), g[-1])) if g[1:] else g[0] for g in listed]
    fields = {"type": names[kind], "symptoms": joined[0], "drugs": joined[1]}
    key = "entities/" + "/".join(sorted(entry["en"] for entry in symptoms + drugs))
    return Case(key, fields, answer.format(type=names[kind], list=comma.join(listed[kind])))


def _draw_triage(rng: random.Random, language: str) -> Case:
    complaint, red_flag = _complaint(rng)
    other = rng.choice([w for w in words()["mild"] if w is not complaint])
    duration, unit = _duration(rng, language)
    label = URGENT if red_flag else SOON if unit == 0 else ROUTINE
    fields = {"a": complaint[language], "b": other[language], "duration": duration}
    return Case(f"triage/{complaint['en']}/{other['en']}/{duration}", fields, label[language])


def _draw_dose(rng: random.Random, language: str) -> Case:
    drug = rng.choice(words()["drug"])
    dose = rng.choice(DOSES)
    frequency, per_day = rng.choice(FREQUENCIES)
    fields = {
        "drug": drug[language],
        "dose": f"{dose} mg" if language == "en" else f"{dose}毫克",
        "frequency": frequency[language],
    }
    line = {
        "en": "drug={drug}; dose={dose}mg; freq={per_day}/day",
        "zh": "药名={drug}；剂量={dose}mg；频次={per_day}/日",
    }[language]
    answer = line.format(drug=drug[language], dose=dose, per_day=per_day)
    return Case(f"dose/{drug['en']}/{dose}/{frequency['en']}", fields, answer)


TASKS = (
    FormatTask(
        "triage_note",
        _draw_triage_note,
        {
            "en": (
                "Note: {complaint} for {duration}, took {drug}.",
                "Note: the patient took {drug} after {duration} of {complaint}.",
                "Note: {drug} was used for {complaint} that began {duration} ago.",
            ),
            "zh": (
                "整理病历：{complaint}{duration}，服用{drug}。",
                "整理病历：患者自服{drug}，{complaint}已有{duration}。",
                "整理病历：因{complaint}用过{drug}，持续{duration}。",
            ),
        },
        {
            "en": ("Note: after {duration} with {complaint} she tried {drug}.",),
            "zh": ("整理病历：出现{complaint}已{duration}，曾用{drug}。",),
        },
    ),
    FormatTask(
        "entities",
        _draw_entities,
        {
            "en": (
                "Find the {type} entities: He has {symptoms} and takes {drugs}.",
                "Find the {type} entities: After {drugs} there was still {symptoms}.",
                "Find the {type} entities: {drugs} for {symptoms}.",
            ),
            "zh": (
                "找出{type}实体：患者有{symptoms}，服用{drugs}。",
                "找出{type}实体：用{drugs}后仍有{symptoms}。",
                "找出{type}实体：因{symptoms}开了{drugs}。",
            ),
        },
        {
            "en": ("Find the {type} entities: She took {drugs} because of {symptoms}.",),
            "zh": ("找出{type}实体：她因为{symptoms}吃了{drugs}。",),
        },
    ),
    FormatTask(
        "triage",
        _draw_triage,
        {
            "en": (
                "Triage this patient: {a} and {b} for {duration}.",
                "Triage this patient: {b} for {duration}, also {a}.",
                "Triage this patient: {duration} of {a}, with some {b}.",
            ),
            "zh": (
                "请给患者分诊：{a}伴{b}{duration}。",
                "请给患者分诊：{b}{duration}，还有{a}。",
                "请给患者分诊：{duration}来{a}，也有{b}。",
            ),
        },
        {
            "en": ("Triage this patient: has had {b} and {a} for {duration}.",),
            "zh": ("请给患者分诊：{b}和{a}已{duration}。",),
        },
    ),
    FormatTask(
        "dose",
        _draw_dose,
        {
            "en": (
                "Prescription: {drug} {dose} {frequency}",
                "Prescription: {frequency} {dose} of {drug}",
                "Prescription: take {drug}, {dose}, {frequency}",
            ),
            "zh": (
                "处方：{drug}{dose}，{frequency}",
                "处方：{frequency}，{drug}{dose}",
                "处方：口服{dose}{drug}，{frequency}",
            ),
        },
        {
            "en": ("Prescription: {frequency} give {drug} {dose}",),
            "zh": ("处方：给予{drug}，{frequency}，{dose}",),
        },
    ),
)
