"""Records of sets whose questions must be put together: BioASQ, DDXPlus, CMB."""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping

from medmoe_jax.data.medical.cards import MedicalSet
from medmoe_jax.data.medical.fields import look, need
from medmoe_jax.data.medical.files import (
    REPAIR,
    Records,
    decode,
    members,
    parse_json,
    read_csv,
    read_json,
    read_text,
)
from medmoe_jax.data.medical.locate import Found
from medmoe_jax.errors import UserError
from medmoe_jax.storage.packed import open_zip

_OPTIONS = 10  # diagnoses to choose among


def bioasq(entry: MedicalSet, found: Found) -> Records:
    """Yes/no questions with the snippets that answer them."""
    whole = parse_json(read_text(found.path), found.path)
    if not isinstance(whole, dict) or not isinstance(whole.get("questions"), list):
        raise UserError(f"{found.path}: there is no list 'questions' in it; {REPAIR}")
    for number, record in enumerate(whole["questions"], 1):
        where = f"{found.path}: question {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object; {REPAIR}")
        if record.get("type") == "yesno":
            snippets = look(record, "snippets.text") or []
            answer = record.get("exact_answer")
            answer = answer[0] if isinstance(answer, list) and answer else answer
            yield (
                where,
                {
                    "question": need(record, "body", where),
                    "context": "\n".join(t.strip() for t in snippets if isinstance(t, str)),
                    "answer": str(answer or "").strip().casefold(),
                },
            )


def answers_apart(entry: MedicalSet, found: Found) -> Records:
    """Questions of a JSON file; where they have no answers, those of a file apart, by `id`."""
    rows = list(read_json(read_text(found.path), found.path))
    if all("answer" in record for _, record in rows):
        yield from rows
        return
    name = "CMB-test-choice-answer.json"
    places = [parent / name for parent in found.path.parents[:4]]
    beside = next((place for place in places if place.is_file()), None)
    if beside is None:
        raise UserError(f"{found.path}: its questions have no answers, and {name} is not above it")
    answers = {r.get("id"): r.get("answer") for _, r in read_json(read_text(beside), beside)}
    for where, record in rows:
        if record.get("id") not in answers:
            raise UserError(f"{where}: {beside.name} has no answer to question {record.get('id')}")
        yield where, {**record, "answer": answers[record["id"]]}


def patients(entry: MedicalSet, found: Found) -> Records:
    """Patients of DDXPlus in words, with ten diagnoses to choose among.

    Those are the right one, the others of the patient's own differential diagnosis in their order,
    and, where it is shorter, further pathologies; their order is drawn for each patient, by a seed.
    """
    folder = found.path.parent
    evidences = parse_json(read_text(folder / "release_evidences.json"), folder)
    conditions = sorted(parse_json(read_text(folder / "release_conditions.json"), folder))
    for number, (where, record) in enumerate(_rows(found.path)):
        right = str(need(record, "PATHOLOGY", where))
        differential = [pair[0] for pair in _list(record, "DIFFERENTIAL_DIAGNOSIS", where)]
        draw = random.Random(f"{found.path.name} {number}")
        others = draw.sample(conditions, len(conditions))
        options = list(dict.fromkeys([right, *differential, *others]))[:_OPTIONS]
        draw.shuffle(options)
        sex = {"M": "male", "F": "female"}.get(str(record.get("SEX")), "")
        told = [f"Age: {need(record, 'AGE', where)}, sex: {sex}"]
        told += _told(_list(record, "EVIDENCES", where), evidences, where)
        yield where, {"case": "\n".join(told), "options": options, "answer": right}


def _rows(path) -> Records:
    """A CSV file that is zipped as upstream has it, whatever its name in there."""
    if path.suffix == ".csv":
        yield from read_csv(read_text(path), path)
        return
    with open_zip(path) as archive:
        names = archive.namelist()
    for where, raw in members(path, names[0] if names else ""):
        yield from read_csv(decode(raw, where), where)


def _list(record: dict, field: str, where: str) -> list:
    try:
        value = ast.literal_eval(str(need(record, field, where)))
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{where}: field {field!r} is no list ({error}); {REPAIR}") from error
    if not isinstance(value, list):
        raise UserError(f"{where}: field {field!r} is no list; {REPAIR}")
    return value


def _told(codes: list, evidences: Mapping, where: str) -> list[str]:
    """A line a question that was answered: with yes, or with its values."""
    answers: dict[str, list[str]] = {}
    for code in codes:
        name, _, value = str(code).partition("_@_")
        if name not in evidences:
            raise UserError(f"{where}: {name!r} is no known evidence; {REPAIR}")
        meaning = evidences[name].get("value_meaning", {}).get(value, {}).get("en", value)
        answers.setdefault(name, []).extend([str(meaning)] if value else [])
    return [
        f"{evidences[name]['question_en']} {', '.join(values) or 'yes'}"
        for name, values in answers.items()
    ]
