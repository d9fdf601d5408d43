"""What others wrote has limits: of time, of memory, and of what it does to a terminal or a page."""

import errno
import gzip
import io
import json
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors.numpy import save_file

from medmoe_jax import json_text, kinds
from medmoe_jax.checkpoints import files, peft, safetensors_files
from medmoe_jax.checkpoints.peft_options import Options
from medmoe_jax.checkpoints.torch_files import open_torch
from medmoe_jax.data import special_tokens
from medmoe_jax.data.files import read_items
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.medical.files import members, parse_xml, read_bytes, read_xlsx
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation.html import LinesSection, report_html, save_png
from medmoe_jax.screen import Screen, ScreenTable, harmless
from medmoe_jax.storage import packed
from medmoe_jax.training import terminal
from tests import tiny, torch_zip
from tests.data.chat_templates import PLAIN


def chat(written: str) -> Jinja:
    """A template that writes something for the content of every turn."""
    source = PLAIN.replace("{{ m.content }}", written)
    return Jinja(source, {"eos_token": "</s>"}, ("<|im_end|>", "</s>"))


def test_only_short_plain_digits_are_a_number():
    assert [kinds.whole_number(text) for text in ("0", "017", "9" * 18)] == [0, 17, 10**18 - 1]
    others = ("", "-1", "+1", " 1", "1.0", "1_0", "²", "١", "9" * 19, "9" * 5000)
    assert not any(kinds.whole_number(text) is not None for text in others)


# Templates ----------------------------------------------------------------------------------------

GREEDY = {
    "a long loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 99999999999 }}",
    "a list": "{{ [1] * 99999999999 }}",
    "a power": "{{ 9 ** 99999999 }}",
    "an alignment": "{{ 'a' | center(99999999999) }}",
    "an indent": "{{ m.content | indent(99999999999) }}",
    "a percent format": "{{ '%99999999999d' % 1 }}",
    "a computed width": "{{ '%*d' % (99999999, 1) }}",
    "a format": "{{ '{:>99999999999}'.format(1) }}",
    "a format within": "{{ '{:>{}}'.format(1, 99999999) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by blocks": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "nested lists": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "replacing": "{% set x = 'a' * 500000 %}{{ x | replace('a', x) }}",
    "joining": "{{ ['a' * 500000] * 500000 | join }}{{ (['a' * 500000] * 9999) | join }}",
    "calling itself twice": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(90) }}",
    "reading": "{% set x = 'a' * 900000 %}{% for i in range(90000) %}"
    "{{ 'b' in x }}{{ x.count('b') }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(9999) }}",
}


@pytest.mark.parametrize("written", GREEDY.values(), ids=GREEDY)
def test_a_template_that_asks_for_the_machine_is_refused(written):
    with pytest.raises(UserError, match="chat template"):
        chat(written)


@pytest.mark.parametrize("source", ["{{ " + "(" * 9000, "{% if 1 %}" * 200 + "{% endif %}" * 200,
                                    "{{ " + "7" * 5000 + " }}", "x" * 2_000_000])  # fmt: skip
def test_a_template_that_cannot_be_compiled(source):
    with pytest.raises(UserError, match="chat template"):
        Jinja(PLAIN + source)


def test_what_templates_do_is_done():
    """Every way in which the sandbox counts gives what Jinja gives."""
    written = (
        "{{ m.content ~ '|' ~ (1 ~ 'x') }}{{ m.content }}{% set x %}a{{ 'b' }}{% endset %}{{ x }}"
        "{% macro f(y) %}<{{ y }}>{% endmacro %}{{ f('c') }}{{ '%s-%d' % ('d', 4) }}"
        "{{ '{} {:>3}'.format('e', 'f') }}{{ ['g', 'h'] | join(',') }}{{ 'i' * 3 }}{{ 2 ** 3 }}"
        "{% for k, v in {'j': 1}.items() %}{{ k }}{{ v }}{{ loop.length }}{% endfor %}"
        "{{ 'klm'[1:] }}{{ [1, 2] + [3] }}{{ 7 % 4 }}{{ (1, 2) | length }}{{ 'n' in ['n'] }}"
        "{{ [3, 1] | sort | map('string') | join }}{% filter upper %}o{% endfilter %}"
        "{{ [{'p': 'q'}] | selectattr('p', 'equalto', 'q') | list | length }}{{ 'r' | tojson }}"
        "{% generation %}s{% endgeneration %}{% for t in [1, 2, 3] %}{% if t == 2 %}"
        "{% continue %}{% endif %}{{ t }}{% endfor %}"
    )
    turns = [{"role": "user", "content": "Q"}]
    text = "".join(piece.text for piece in chat(written).prompt(turns))
    said = 'Q|1xQab<c>d-4e   fg,hiii8j11lm[1, 2, 3]32True13O1"r"s13'
    assert text == f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("written", ["{{ m.content }}|{{ m.content }}", "{{ m.content * 2 }}",
                                     "{{ m.content | lower }}{{ m.content }}",
                                     "{{ m.content }}{{ m.content | tojson }}"])  # fmt: skip
def test_a_text_that_is_written_twice_stays_text(written):
    """Neither our marks nor the vocabulary's come out of what people wrote, changed or not."""
    turns = [
        {"role": "user", "content": 'aaaa <|im_end|> "b" 0 1'},
        {"role": "assistant", "content": "cccccccccccc<|IM_END|>dd dd ddddddddd"},
    ]
    for pieces in chat(written).rows(turns):
        markup = [piece.text for piece in pieces if piece.kind == "markup"]
        assert sum(text.count("<|im_end|>") for text in markup) == 2
        assert not any("\ue000" <= c <= "\ue0ff" for piece in pieces for c in piece.text)


@pytest.mark.parametrize("change", ["replace('0', '99')", "replace('1', '0')"])
def test_a_template_cannot_change_the_numbers_of_marks(change):
    turns = [{"role": "user", "content": "10"}, {"role": "assistant", "content": "xyz"}]
    with pytest.raises(UserError, match="changes the text of a turn"):
        chat(f"{{{{ m.content | {change} }}}}").rows(turns)


def test_long_conversations_are_within_the_limits():
    turns = [{"role": role, "content": f"{n} text " * 9} for n in range(500)
             for role in ("user", "assistant")]  # fmt: skip
    written = "{{ m.content | trim }}{{ messages | length >= 1 }}{{ m.role == 'user' }}"
    text = chat(written).render(turns, (), True)
    assert text.count("499 text") == 18 and text.count("TrueTrue") == 500


# Regular expressions ------------------------------------------------------------------------------

CATASTROPHES = ("(.*.*)*x", "(([a-z._]+)+)+!", "(a|a|.)*" * 8 + "!")


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_patterns_of_adapters_take_no_time(pattern):
    module = "model.layers.0.self_attn." + "a" * 40
    for fields in (
        {"target_modules": pattern},
        {"target_modules": ["q"], "modules_to_save": [pattern]},
        {"target_modules": [module], "layers_to_transform": 0, "layers_pattern": pattern},
    ):
        Options(fields).targets(module, True)
    scaled = Options({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {pattern: 3}})
    assert scaled.scaling(module).rank in (2, 3)


def test_a_pattern_that_looks_around_leaves_it_to_the_tensors(tmp_path):
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    D = tiny.DECODER.d_model
    save_file({f"{module}.lora_{x}.weight": np.ones(shape, np.float32)
               for x, shape in (("A", (2, D)), ("B", (D, 2)))},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    options["target_modules"] = r"model\.layers\.(?!0).*\.q_proj"
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    read = peft.read_peft(tmp_path, tiny.DECODER, "llama", "x", dict)
    assert (read.spec.start, read.spec.stop, read.spec.sites) == (1, 2, ("attn.q",))
    assert "look around" in read.notes[0]


# Files --------------------------------------------------------------------------------------------


def test_small_files_that_unpack_into_huge_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "FREE", 1 << 16)
    bomb = b'{"a": "' + b"x" * (1 << 21) + b'"}\n'
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(bomb))
    (tmp_path / "r.jsonl.zst").write_bytes(zstandard.compress(bomb))
    with zipfile.ZipFile(tmp_path / "r.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", bomb)
    for read in (
        lambda: list(read_items(tmp_path / "r.jsonl.gz")),
        lambda: list(read_items(tmp_path / "r.jsonl.zst")),
        lambda: read_bytes(tmp_path / "r.jsonl.gz"),
        lambda: list(members(tmp_path / "r.zip", ".csv")),
        lambda: list(read_xlsx(tmp_path / "r.zip")),
    ):
        with pytest.raises(UserError, match=r"r\.\w+(\.\w+)?: unpacks into more than 200 times"):
            read()


def encrypted(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "x")
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    return path


def test_archives_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"e\.zip!a\.csv: is encrypted"):
        list(members(encrypted(tmp_path / "e.zip"), ".csv"))
    damaged = bytearray(gzip.compress(os.urandom(9000)))
    damaged[3000:3100] = bytes(100)
    (tmp_path / "r.jsonl.gz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"r\.jsonl\.gz: not a whole gzip file"):
        read_bytes(tmp_path / "r.jsonl.gz")
    raw = zlib.compressobj(wbits=31)
    content = bytearray(raw.compress(b'{"prompt": "Q"}\n' * 99) + raw.flush())
    content[14] ^= 0xFF
    (tmp_path / "r.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.jsonl\.gz: not a"):
        list(read_items(tmp_path / "r.jsonl.gz"))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_wherever_it_lies_in_a_member(tmp_path, method):
    """Each library says it by an error of its own."""
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.csv", random.Random(1).randbytes(600))
    whole, said = path.read_bytes(), set()
    for at in range(30, 600, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            list(members(path, ".csv"))
        except UserError as error:
            assert "not a whole" in str(error), error
            said.add(type(error.__cause__))
    assert len(said) > 1


def test_a_disk_that_fails_is_no_damage():
    with (
        pytest.raises(OSError, match="Input/output error"),
        packed.damage_named("x.zip", "zip file"),
    ):
        raise OSError(errno.EIO, "Input/output error")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    for name in ("adapter_config.json", "model.safetensors", "t.zip", "x.bin"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: Options.read(tmp_path),
        lambda: safetensors_files.open_safetensors(tmp_path / "model.safetensors").__enter__(),
        lambda: list(members(tmp_path / "t.zip", ".csv")),
        lambda: open_torch(tmp_path / "x.bin").__enter__(),
        lambda: files.read_json("/dev/zero"),
    ):
        with pytest.raises((UserError, FileNotFoundError), match=r"ordinary file|missing"):
            read()


def test_names_of_files_stay_in_their_folder(tmp_path):
    for name in ("../x.safetensors", "/etc/passwd", "a\0b", "x" * 300, "", ".."):
        index = {"weight_map": {"a": name}}
        (tmp_path / safetensors_files.INDEX).write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"index\.json: .* is no name of a file beside it"):
            safetensors_files.listed(tmp_path)
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(UserError, match=r"state\.json: .* is no name of a file beside it"):
            list(read_items(tmp_path))


def test_a_torch_file_cannot_ask_for_memory(tmp_path):
    """A place in the memo, or a shape, that is larger than the file."""
    memo = b"\x80\x02}r" + struct.pack("<I", 2**31 - 2) + b"."
    read = {"a": torch_zip.tensor("0", "FloatStorage", 0, (2**31 - 1,), (0,), 1)}
    for content in (memo, torch_zip.pickled(read)):
        torch_zip.write(tmp_path / "x.bin", content, {"0": bytes(4)})
        with open_torch(tmp_path / "x.bin") as tensors:
            for tensor in tensors.values():
                with pytest.raises(UserError, match="too short for a view"):
                    tensor.read()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": ' + b"7" * 5000 + b"}", "too many digits"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested too deeply"),
        (b"[1]", "expected a JSON object"),
        (b"\0", "not JSON"),
    ],
)
def test_settings_in_other_forms(tmp_path, content, words):
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer_config\.json.*{words}"):
        files.read_json(path)
    with pytest.raises(UserError, match=rf"tokenizer_config\.json.*{words}"):
        special_tokens.read_beside(tmp_path)


def test_settings_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert json_text.loads('{"a":' * 99 + "1" + "}" * 99)


def test_xml_in_an_encoding_that_is_not_known():
    with pytest.raises(UserError, match="f: not XML"):
        parse_xml(b'<?xml version="1.0" encoding="x-none"?><a/>', "f")


def test_kinds():
    assert kinds.fits([1, 2], list[int]) and not kinds.fits([True], list[int])
    assert kinds.fits(1, kinds.Number) and not kinds.fits(float("nan"), kinds.Number)
    assert kinds.fits({"a": None}, dict[str, int | None]) and not kinds.fits("a", list[str])
    assert kinds.wrong_fields({"a": 10**5000}, {"a": str}) == [
        "a: a number of thousands of digits is not text"
    ]


# Terminals and pages ------------------------------------------------------------------------------

STEERING = "a\x1b]0;title\x07b\x9b2Jc\u202ed\r\x00\ud800"


def test_what_is_printed_steers_nothing(capsys):
    assert harmless("é\n\t中") == "é\n\t中"
    shown = "a\\x1b]0;title\\x07b\\x9b2Jc\\u202ed\\r\\x00\\ud800"
    assert harmless(STEERING) == shown
    terminal.say(STEERING)
    assert capsys.readouterr().out == shown + "\n"
    out = io.StringIO()
    screen = Screen(file=out)
    screen.width = 200
    screen.print(ScreenTable([STEERING], (), [["[/x][red]" + STEERING]]))
    screen.print(STEERING)
    assert "[/x][red]" in out.getvalue()
    assert out.getvalue().count(shown) == 3 and "\x1b" not in out.getvalue()


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    lines = [(name, [1, 2], [0.5, 0.1]) for name in (r"$\frac{a$", "$x^$")]
    section = LinesSection("$t_{$", lines)
    page = report_html(tmp_path / "p.html", [section]).read_text()
    assert r"$\frac{a$" in page and "$x^$" in page
    save_png(tmp_path / "p.png", section)
