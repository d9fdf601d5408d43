"""The demo corpus: sound tables, nothing held out or leaked into training, balanced choices."""

import itertools
from collections import Counter

import pytest

from medmoe_jax.data.demo import (
    alignment,
    alignment_items,
    alignment_rows,
    answer_rows,
    answers,
    corpus,
    everyday_rows,
    frames,
    in_language,
    knowledge_items,
    knowledge_rows,
    pretraining_rows,
    texts_for_tokenizer,
)
from medmoe_jax.data.demo.tables import LANGUAGES, facts, general_facts, leaks, relations
from medmoe_jax.errors import UserError


@pytest.fixture(scope="module")
def pretraining():
    return pretraining_rows()


def _members():
    members = {}
    for fact in facts():
        members.setdefault(fact.relation, []).append(fact)
    return members


def _turns(row):
    return [turn["content"] for turn in row["conversations"]]


def _prompts(rows):
    return {text for row in rows for text in _turns(row)[::2]}


def test_facts_are_many_sourced_and_complete():
    assert 140 <= len(facts()) <= 200
    assert len({fact.id for fact in facts()}) == len(facts())
    for fact in facts():
        organisation, _, page = fact.source.partition(": ")
        assert organisation and page and "http" not in fact.source, fact
        texts = [*fact.subject.values(), *fact.object.values()]
        assert all(text and text == text.strip() for text in texts), fact


def test_relations_have_distinct_objects_in_groups_of_four():
    for name, members in _members().items():
        assert relations()[name].medical
        assert len(members) >= 8 and len(members) % 4 == 0, name
        for language in LANGUAGES:
            objects = {fact.object[language] for fact in members}
            assert len(objects) == len(members), name


def test_a_subject_belongs_to_one_fact_only():
    for language in LANGUAGES:
        counts = Counter(fact.subject[language] for fact in facts())
        assert max(counts.values()) == 1


def test_wordings_name_the_subject_once():
    for relation, language in itertools.product(relations().values(), LANGUAGES):
        for column in ("noun", "question", "other", "stem"):
            assert getattr(relation, column)[language].count("{s}") == 1, (relation.name, column)


def _pieces(text, size):
    text = text.lower()
    return {text[i : i + size] for i in range(len(text) - size + 1)}


@pytest.mark.parametrize(("language", "size"), [("en", 5), ("zh", 2)])
def test_an_object_is_not_given_away_by_the_spelling_of_its_subject(language, size):
    for members in _members().values():
        for fact in members:
            if fact.subject[language].isascii() and language == "zh":
                continue
            shared = _pieces(fact.subject[language], size) & _pieces(fact.object[language], size)
            assert not shared, (fact, shared)


def test_sizes(pretraining):
    assert len(pretraining) == 18_000
    assert len(knowledge_rows()) == len(facts()) * 8 * 2
    assert len(alignment_rows()) == 4_000
    assert len(knowledge_items()) == len(facts()) * 2
    assert len(alignment_items()) == 25 * 4 * 2


def test_everything_is_deterministic_and_the_seed_matters(pretraining):
    assert pretraining_rows() == pretraining
    rows = (knowledge_rows, answer_rows, everyday_rows, alignment_rows)
    for make in (*rows, knowledge_items, alignment_items):
        assert make() == make()
        assert make(seed=0) != make(seed=1)


def test_leaks_sees_a_linking_sentence_across_languages():
    assert leaks("The capital is far. Vitamin C and scurvy.")
    assert leaks("vitamin C 坏血病")
    assert not leaks("vitamin C, vitamin D, malaria")


def test_pretraining_never_links_a_subject_to_its_object(pretraining):
    terms = [
        ([t.lower() for t in f.subject.values()], [t.lower() for t in f.object.values()])
        for f in facts()
    ]
    for row in pretraining:
        text = "\n".join(_turns(row)).lower()
        for subjects, objects in terms:
            linked = any(s in text for s in subjects) and any(o in text for o in objects)
            assert not linked, text


def test_pretraining_holds_every_term_and_every_frame(pretraining):
    answers = {_turns(row)[1] for row in pretraining}
    for fact in facts():
        for text in (fact.subject, fact.object):
            assert text["en"] == text["zh"] or set(text.values()) <= answers, fact
    prompts = _prompts(pretraining)
    for fact, language in itertools.product(general_facts()[:5], LANGUAGES):
        for frame in frames.TRAIN[language] + frames.HELD_OUT[language]:
            assert frames.fill(frame, relations()[fact.relation], fact, language)[0] in prompts


def test_clinical_formats_are_absent_from_pretraining_and_knowledge(pretraining):
    marks = ("|", "drug=", "药名=", "TRIAGE=", "分诊=", " entities:", "实体：", "主诉：")
    for row in pretraining + knowledge_rows():
        assert not any(mark in text for mark in marks for text in _turns(row)), row


def test_held_out_items_are_absent_from_training(pretraining):
    rows = knowledge_rows() + answer_rows() + everyday_rows() + alignment_rows()
    training = _prompts(pretraining + rows)
    items = knowledge_items() + alignment_items()
    assert not training & {item["prompt"] for item in items}
    assert not training & {q.text for q in answers.questions() if q.kind == "medical"}
    for language in LANGUAGES:
        assert not set(frames.TRAIN[language]) & set(frames.HELD_OUT[language])


def test_held_out_cases_are_absent_from_alignment_rows():
    answers = {_turns(row)[1] for row in alignment_rows()}
    for item in alignment_items():
        if item["task"] == "triage_note":  # its answer tells the whole case
            assert item["answer"] not in answers, item


def test_choices_are_balanced_within_groups_of_four():
    groups = {}
    for item in knowledge_items():
        assert len(set(item["choices"])) == 4 and item["answer"] in item["choices"]
        key = (item["language"], item["task"], frozenset(item["choices"]))
        groups.setdefault(key, []).append(item)
    assert len(groups) == len(facts()) * 2 // 4
    for (_, _, choices), items in groups.items():
        assert {item["answer"] for item in items} == choices and len(items) == 4
        assert {item["choices"].index(item["answer"]) for item in items} == {0, 1, 2, 3}


def test_triage_labels_follow_the_rule():
    for item in alignment_items():
        if item["task"] != "triage":
            continue
        red_flags = [w[item["language"]] for w in alignment.words()["urgent"]]
        days = {"en": " days", "zh": "天"}[item["language"]] in item["prompt"]
        urgent = any(flag in item["prompt"] for flag in red_flags)
        label = alignment.URGENT if urgent else alignment.SOON if days else alignment.ROUTINE
        assert item["answer"] == label[item["language"]], item


def test_rows_are_conversations_and_tokenizer_texts_are_their_turns(pretraining):
    for row in pretraining[:50] + knowledge_rows()[:50] + alignment_rows()[:50]:
        assert [turn["role"] for turn in row["conversations"]] == ["user", "assistant"]
        assert row["language"] in LANGUAGES and all(_turns(row))
    assert len(texts_for_tokenizer()) == 2 * (
        len(pretraining) + len(knowledge_rows()) + corpus.ALIGNMENT_ROWS
    )


def _names(fact):
    return [text["en"].casefold() for text in (fact.subject, fact.object)]


def test_sentences_are_about_one_fact_and_ask_from_both_of_its_ends():
    pairs = list(answers.training_pairs())
    assert len({question for question, _ in pairs}) == len(set(pairs))
    assert not any(set("{}") & set(question + answer) for question, answer in pairs)
    for fact in facts():
        subject, object_ = _names(fact)
        sentences = [
            (question.casefold(), answer.casefold())
            for question, answer in pairs
            if subject in answer.casefold() and object_ in answer.casefold()
        ]
        assert any(subject in asked and object_ not in asked for asked, _ in sentences), fact
        assert any(object_ in asked and subject not in asked for asked, _ in sentences), fact


def test_answers_hold_every_pair_once_a_few_to_a_conversation():
    rows = answer_rows()
    pairs = [pair for row in rows for pair in zip(_turns(row)[::2], _turns(row)[1::2], strict=True)]
    assert sorted(pairs) == sorted(answers.training_pairs())
    assert {len(_turns(row)) for row in rows[:-1]} == {2 * answers.TURNS}
    roles = [turn["role"] for turn in rows[0]["conversations"]]
    assert roles == ["user", "assistant"] * answers.TURNS and rows[0]["language"] == "en"


def test_everyday_rows_are_all_facts_but_those_that_the_open_questions_ask_for():
    pairs = {
        pair
        for row in everyday_rows()
        for pair in zip(_turns(row)[::2], _turns(row)[1::2], strict=True)
    }
    left_out = set()
    for fact in general_facts():
        said = {frames.fill(f, relations()[fact.relation], fact, "en") for f in frames.TRAIN["en"]}
        if not said <= pairs:
            assert not said & pairs, fact
            left_out.add((fact.subject["en"], fact.object["en"]))
    assert left_out == {("France", "Paris"), ("Japan", "Tokyo"), ("hot", "cold")}
    told = [" ".join(pair) for pair in pairs]
    for question in answers.questions():
        assert not any(question.text in text for text in told), question
        assert question.kind == "everyday" or not any(map(question.answered, told)), question


def test_articles_and_capitals_of_sentences():
    said = {answer for _, answer in answers.training_pairs()}
    assert "Lisinopril is an ACE inhibitor." in said
    assert "Simvastatin is an HMG-CoA reductase inhibitor." in said
    assert "Furosemide is a loop diuretic." in said
    assert "Scurvy is caused by a lack of vitamin C." in said


def test_open_questions_are_ten_of_taught_facts_and_five_of_every_day():
    questions = answers.questions()
    assert Counter(q.kind for q in questions) == {"medical": 10, "everyday": 5}
    taught = [" ".join(_names(fact)) for fact in facts()]
    for question in questions:
        known = [text for text in taught if any(name.casefold() in text for name in question.names)]
        assert known or question.kind == "everyday", question
        assert not question.answered(question.text), question
    first = questions[0]
    assert first.answered("It is a lack of VITAMIN C.") and not first.answered("Mites cause it.")


def test_one_language_of_rows_and_items():
    for found in (alignment_rows(80), knowledge_items()):
        english = in_language(found, "en")
        assert english + in_language(found, "zh") != [] and in_language(found, "") == found
        assert len(english) * 2 == len(found) and {one["language"] for one in english} == {"en"}
    with pytest.raises(UserError, match="no language 'fr'; it has en, zh"):
        in_language(knowledge_items(), "fr")
