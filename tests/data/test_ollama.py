"""Modelfiles for Ollama, whose templates are rendered here by a reader of the few words used."""

import json
import re

import pytest

from medmoe_jax.data import ollama
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.errors import UserError

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "What is scurvy?"},
    {"role": "assistant", "content": "A lack of vitamin C."},
    {"role": "user", "content": "And {{ beriberi }}?"},
]


def frame(source):
    template = Jinja(source, NAMES, ("<|im_end|>", "</s>", "<|eot_id|>", "<end_of_turn>"))
    return template, ollama.frame_of(lambda turns: template.render(turns, (), True))


def go(template, turns):
    """What Go's text/template makes of `if`, `else`, `range`, `eq` and fields."""
    words = re.split(r"\{\{ (.*?) \}\}", template)
    steps = [("text", word) if i % 2 == 0 else ("do", word) for i, word in enumerate(words)]
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")

    def run(at, scope, on):
        """`(text, where it stopped)` of the steps up to the `else` or `end` of this block."""
        out = ""
        while at < len(steps):
            kind, word = steps[at]
            if kind == "do" and (word == "end" or word.startswith("else")):
                break
            if kind == "text":
                out += word if on else ""
            elif word.startswith("if "):
                text, at = branches(at, word.removeprefix("if "), scope, on)
                out += text
            elif word == "range .Messages":
                for turn in turns:
                    text, end = run(at + 1, turn, on)
                    out += text
                at = end
            elif on:
                value = {".System": system, ".Content": scope.get("content"), '"{{"': "{{"}[word]
                out += value
            at += 1
        return out, at

    def branches(at, condition, scope, on):
        out, taken = "", False
        while True:
            if condition == ".System":
                holds = bool(system)
            elif condition:
                holds = scope["role"] == json.loads(condition.removeprefix("eq .Role "))
            else:
                holds = True
            text, at = run(at + 1, scope, on and holds and not taken)
            out, taken = out + text, taken or holds
            word = steps[at][1]
            if word == "end":
                return out, at
            condition = word.removeprefix("else").removeprefix(" if ")

    return run(0, {}, True)[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_built_in_template(name):
    template, found = frame(TEMPLATES[name].jinja("<s>", "</s>", ""))
    text = ollama.modelfile("m.gguf", found, [])
    source = re.fullmatch(r'FROM \./m\.gguf\nTEMPLATE """(.*)"""\n', text, re.DOTALL)[1]
    for turns in (TALK[:1], TALK, [SYSTEM, *TALK[:1]], [SYSTEM, *TALK]):
        assert go(source, turns) == template.render(turns, (), True)


QWEN3 = """{%- for m in messages %}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') if loop.last else m.content %}
{{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
"""
NUMBERED = """{% for m in messages %}{{ loop.index }}: {{ m.content }}</s>{% endfor %}"""


# The system text stands before the last question, as in Mistral's.
LAST = """{% set ns = namespace(said='') %}{% for m in messages %}{% if m.role == 'system' %}
{%- set ns.said = m.content + '\n\n' %}{% elif m.role == 'user' %}[INST] {% if loop.last %}
{{- ns.said }}{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}
{%- endfor %}"""


# Its marks are those that a text in a Modelfile stands between.
QUOTES = """{% for m in messages %}{{ m.role }}: ""\"{{ m.content }}""\"
{% endfor %}{% if add_generation_prompt %}assistant: ""\"{% endif %}"""


@pytest.mark.parametrize("source", [QWEN3, NUMBERED, LAST, QUOTES])
def test_conversations_without_one_frame_have_no_template(source):
    assert frame(source)[1] is None
    assert ollama.modelfile("m.gguf", None, ["</s>"]) == (
        'FROM ./m.gguf\nPARAMETER stop """</s>"""\n'
    )


def test_a_template_that_refuses_system_texts():
    source = TEMPLATES["chatml"].jinja()
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + source
    )
    assert frame(source)[1].system and frame(refusing)[1].system == ()


def test_what_a_modelfile_cannot_hold():
    found = ollama.OllamaFrame('"""', "", "", "", ())
    with pytest.raises(UserError, match="has no way to write"):
        ollama.modelfile("m.gguf", found, [])
    text = ollama.modelfile("m.gguf", ollama.OllamaFrame("{{ x", "?", "", "!", ()), ["\nUser:"])
    assert '{{ "{{" }} x{{ range' in text and 'PARAMETER stop """\nUser:"""' in text
