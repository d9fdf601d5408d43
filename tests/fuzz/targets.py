"""A target for each parser of ours: bytes in, a value or a UserError out, and never anything else.

A target writes one input, made from a whole one, into an empty folder, and reads it as the commands
do. What it raises beside UserError is a fault.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from safetensors.numpy import save

from medmoe_jax import json_text
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.checkpoints import (
    bases,
    files,
    gguf_models,
    huggingface,
    llama2c,
    peft,
    released,
    seals,
    upcycled,
)
from medmoe_jax.checkpoints.gguf_file import open_gguf
from medmoe_jax.checkpoints.lease import _Entry
from medmoe_jax.checkpoints.manifest import BankEntry, Manifest
from medmoe_jax.checkpoints.safetensors_files import open_safetensors
from medmoe_jax.checkpoints.torch_files import open_torch
from medmoe_jax.cli.session import read_rows
from medmoe_jax.data import blocks, gguf_tokenizer, medical, ollama, tokenizers
from medmoe_jax.data import files as row_files
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.medical import cards, formats, locate
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.templates import doubts, load_template, markers, stops
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import records, user_tasks
from medmoe_jax.evaluation.compare import compare
from medmoe_jax.evaluation.report import Report
from tests import gguf_files, naive, tiny, torch_zip
from tests.data import chat_templates
from tests.fuzz.mutations import changed_bytes, changed_json, changed_text, changed_value

Target = Callable[[Random, Path], object]
TARGETS: dict[str, Target] = {}

ROWS = [
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
                  {"role": "assistant", "content": "A", "reasoning_content": "R"}]},
    {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "75"},
        {"role": "assistant", "content": "A"}],
     "tools": '[{"type": "function", "function": {"name": "f"}}]'},
    {"prompt": "Q", "response": "A", "language": "en"},
    {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["q", "a"]]},
]  # fmt: skip


def target(run: Target) -> Target:
    """Adds a target under its function's name."""
    TARGETS[run.__name__] = run
    return run


# Rows ---------------------------------------------------------------------------------------------


@functools.cache
def _row_files() -> dict[str, bytes]:
    """A whole file of every kind that rows come in."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([["prompt", "response"], ["Q", 'an "A"\nB'], ["Q2", "A2"]])
    columns = pa.table({"prompt": ["Q", "Q2"], "response": ["A", "A2"]})
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pq.write_table(columns, parquet)
    with pa.ipc.new_stream(arrow, columns.schema) as sink:
        sink.write_table(columns)
    return {
        "jsonl": lines,
        "json": json.dumps(ROWS, indent=1).encode(),
        "csv": table.getvalue().encode(),
        "tsv": b"prompt\tresponse\nQ\tA\n",
        "jsonl.gz": gzip.compress(lines),
        "jsonl.zst": zstandard.compress(lines),
        "parquet": parquet.getvalue(),
        "arrow": arrow.getvalue(),
    }


@target
def rows(random: Random, folder: Path) -> None:
    """Files of rows of every kind, read as training does."""
    kind, whole = random.choice(list(_row_files().items()))
    path = folder / f"rows.{kind}"
    if kind in ("json", "jsonl") and random.random() < 0.5:
        content = changed_json(random, ROWS if kind == "json" else random.choice(ROWS))
    elif kind == "jsonl.gz" and random.random() < 0.5:
        content = gzip.compress(changed_bytes(random, _row_files()["jsonl"]))
    else:
        content = changed_bytes(random, whole)
    path.write_bytes(content)
    reader = RowReader()
    for where, item in row_files.read_items(path):
        reader(item, where)


@target
def streamed_rows(random: Random, folder: Path) -> None:
    """Files of rows in blocks, as a window reads them."""
    kind = random.choice(("jsonl", "parquet"))
    path = folder / f"rows.{kind}"
    path.write_bytes(changed_bytes(random, _row_files()[kind]))
    made = blocks.make_blocks(blocks.open_files(str(path), "train"), 2)
    for block in itertools.chain(*blocks.deal(made, 2)):
        for row in block.read():
            block.decode(row)
            block.place(row)


@target
def saved_data_set(random: Random, folder: Path) -> None:
    """What `datasets` writes beside its files."""
    state = {"_data_files": [{"filename": "data.arrow"}], "_split": "train"}
    (folder / "state.json").write_bytes(changed_json(random, state))
    (folder / "data.arrow").write_bytes(_row_files()["arrow"])
    if random.random() < 0.3:
        (folder / "dataset_dict.json").write_bytes(changed_json(random, {"splits": ["train"]}))
        (folder / "train").mkdir()
    list(row_files.read_items(folder))


TEMPLATES = [
    getattr(chat_templates, name)
    for name in vars(chat_templates)
    if name.isupper() and "message" in getattr(chat_templates, name)
]


@functools.cache
def _encoder() -> Encoder:
    return Encoder(tiny.tokenizer(), load_template("chatml"))


@functools.cache
def _jinja() -> list[Jinja]:
    found = []
    for source in TEMPLATES:
        try:
            found.append(Jinja(source, {"eos_token": "</s>", "bos_token": "<s>"}))
        except UserError:
            continue
    return found


@target
def conversations(random: Random, _: Path) -> None:
    """Conversation rows, encoded by a built-in template and rendered by some in Jinja."""
    row = RowReader()(changed_value(random, random.choice(ROWS)), "row")
    _encoder().rows(row)
    template = random.choice(_jinja())
    for pieces in template.rows(row["conversations"], row.get("tools", ())):
        text = "".join(piece.text for piece in pieces)
        assert "\ue000" not in text or "\ue000" in json.dumps(row, ensure_ascii=False)


# Templates ----------------------------------------------------------------------------------------

_JINJA = (
    *("{{ m.content }}", "{{ messages[0]['content'] * 9 }}", "{% for m in messages %}"),
    *("{% endfor %}", "{% if m.role == 'user' %}", "{% endif %}", "{{ m.content ~ m.content }}"),
    *("{% set x = x ~ x %}", "{{ range(9999999) | list }}", "{{ 'a' * 999999999 }}", "{{ loop }}"),
    *("{{ '%999999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}", "{{ 9 ** 9 ** 9 }}"),
    *("{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}", "{{ f(1) }}", "{{ x | tojson }}"),
    *("{{ m.content | center(99999999) }}", "{{ m.content | replace('', m.content) }}"),
    *("{% set ns = namespace(x=[]) %}", "{% set ns.x = ns.x + ns.x + [1] %}", "{{ lipsum(9999) }}"),
    *(
        "{{ m.content | upper }}",
        "{{ m | string }}",
        "{{ ''.__class__ }}",
        "{{ cycler(1).next() }}",
    ),
    *("{% for a in range(99999) %}{% for b in range(99999) %}", "{{ raise_exception('x') }}"),
    *("{% include 'x' %}", "{% extends 'x' %}", "{{ m.content | urlize }}", "{{ 1 / 0 }}", "{{"),
    *("{{ " + "(" * 500, "{% if 1 %}" * 60, "{{ [" * 200, "{% raw %}", "{{ '1' | int + 'a' }}"),
    *("{{ x | batch(99999999, 'x') | list }}", "{{ 'x' | indent(99999999) }}", "<|im_end|>\n"),
)


def changed_template(random: Random) -> str:
    source = random.choice(TEMPLATES)
    for _ in range(random.randint(1, 3)):
        at = random.randint(0, len(source))
        if random.random() < 0.6:
            marks = [i for i in range(len(source)) if source[i : i + 2] in ("{{", "{%")] or [0]
            at = random.choice(marks)
            source = source[:at] + random.choice(_JINJA) + source[at:]
        else:
            source = changed_text(random, source)
    return source


@target
def jinja(random: Random, _: Path) -> None:
    """Chat templates, and what they write; our marks are in none of it."""
    source = changed_template(random).replace("\ue000", "")
    template = Jinja(source, {"eos_token": "</s>"}, ("</s>", "<|im_end|>"))
    turns = RowReader()(random.choice(ROWS))["conversations"]
    for pieces in (*template.rows(turns), template.prompt(turns[:1])):
        assert not any("\ue000" in piece.text for piece in pieces)
    template.jinja()


@target
def ollama_template(random: Random, _: Path) -> None:
    """Ollama's template of a chat template."""
    template = Jinja(changed_template(random), {"eos_token": "</s>"})
    frame = ollama.frame_of(lambda turns: template.render(turns, (), True))
    ollama.modelfile("model.gguf", frame, [template.end])


# Tokenizers ---------------------------------------------------------------------------------------


@functools.cache
def _byte_level() -> dict:
    """A small tokenizer.json."""
    alphabet = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {text: i for i, text in enumerate([*alphabet, "he", "ll", "hell"])}
    size = len(vocabulary)
    added = [
        {"id": size + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Prepend", "prepend": "x"}, "pre_tokenizer": level,
        "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "ignore_merges": False, "vocab": vocabulary,
                  "merges": [["h", "e"], ["l", "l"], ["he", "ll"]]},
    }  # fmt: skip


BESIDE = {
    "tokenizer_config.json": {
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"},
        "additional_special_tokens": ["<|im_start|>"], "chat_template": chat_templates.PLAIN,
        "added_tokens_decoder": {"102": {"content": "<|new|>", "special": True, "lstrip": True}},
        "tokenizer_class": "Qwen2Tokenizer", "legacy": False, "add_bos_token": False,
    },
    "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}, "unk_token": "<unk>"},
    "added_tokens.json": {"<|more|>": 102},
    "generation_config.json": {"eos_token_id": [99, 100]},
    "config.json": {"model_type": "qwen2", "eos_token_id": 99},
}  # fmt: skip


@target
def tokenizer(random: Random, folder: Path) -> None:
    """tokenizer.json and tokenizer.model, the files beside them, and the template they bring."""
    model = random.random() < 0.4
    name = "tokenizer.model" if model else "tokenizer.json"
    whole = tiny.tokenizer().path.read_bytes() if model else json.dumps(_byte_level()).encode()
    changed = random.choice((name, *BESIDE))
    for other in random.sample(list(BESIDE), random.randint(0, 3)):
        (folder / other).write_text(json.dumps(BESIDE[other]))
    (folder / name).write_bytes(whole)
    if changed in BESIDE:
        content = changed_json(random, BESIDE[changed])
    elif model:
        content = changed_bytes(random, whole)
    else:
        content = changed_json(random, _byte_level())
    (folder / changed).write_bytes(content)
    read = tokenizers.load(folder)
    ids = read.encode_markup("hello <|im_end|>\n", start=True)
    read.decode(ids)
    _ = read.names, read.stop_ids, read.encodes_bos, read.pad_id, read.digest
    if read.chat_template is None:
        template = load_template("chatml", read)
    else:
        template = load_template("tokenizer", read)
    stops(template, read), markers(template, read), doubts(template, read)


# Models -------------------------------------------------------------------------------------------


@functools.cache
def _gguf() -> bytes:
    path = tiny.folder() / "fuzz.gguf"

    def more(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([*map(chr, range(65, 123)), "<|im_end|>", "he", "ll"])
        writer.add_token_types([1] * 58 + [3, 1, 1])
        writer.add_token_merges(["h e"])
        writer.add_eos_token_id(58)
        writer.add_chat_template(chat_templates.PLAIN)

    tiny.once(path, lambda path: gguf_files.write(path, "llama", num_hidden_layers=1, more=more))
    return path.read_bytes()


@target
def gguf(random: Random, folder: Path) -> None:
    """GGUF files: the header, the architecture, the tokenizer and some numbers."""
    path, whole = folder / "x.gguf", _gguf()
    head = whole.index(b"token_embd") + 800
    path.write_bytes(changed_bytes(random, whole[:head]) + whole[head:])
    file = open_gguf(path)
    for tensor in list(file.tensors.values())[:3]:
        tensor.rows(slice(0, 1))
    gguf_tokenizer.tokenizer_files(file.fields, str(path))
    gguf_models.describe(file)


CONFIGS = [
    gguf_files.hf_config("llama"),
    gguf_files.hf_config("gemma2"),
    {**gguf_files.hf_config("gemma3"), "layer_types": ["sliding_attention"] * 6},
    {**gguf_files.hf_config("phi3"), "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8,
                                                       "long_factor": [1.0] * 8}},
    {**gguf_files.hf_config("qwen2"), "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
     "layer_types": ["full_attention"] * 3, "use_sliding_window": False, "max_window_layers": 3},
    {"model_type": "gemma3", "text_config": gguf_files.hf_config("gemma3")},
]  # fmt: skip


@target
def config_json(random: Random, folder: Path) -> None:
    """config.json of a base."""
    (folder / "config.json").write_bytes(changed_json(random, random.choice(CONFIGS)))
    base = bases.open_base(str(folder), "", {}, 0)
    _ = base.family, base.notes, base.abstract(np.float32)


@functools.cache
def _safetensors() -> bytes:
    return save({"a.weight": np.ones((3, 4), np.float32), "b": np.zeros(2, np.float16)})


@target
def safetensors(random: Random, folder: Path) -> None:
    """safetensors files."""
    path = folder / "model.safetensors"
    path.write_bytes(changed_bytes(random, _safetensors()))
    with open_safetensors(path) as tensors:
        for tensor in tensors.values():
            tensor.read()
    upcycled.holds_experts(folder)


@functools.cache
def _base_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tiny.base_path().iterdir()}


@target
def base_folder(random: Random, folder: Path) -> None:
    """The folder of a base: config, index and weights, up to where numbers go to the devices."""
    whole = _base_files()
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    if random.random() < 0.5:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        names = json.loads(content_header(whole["model.safetensors"]))
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}
        (folder / "model.safetensors.index.json").write_bytes(changed_json(random, index))
    else:
        head = 8 + int.from_bytes(whole["model.safetensors"][:8], "little")
        content = whole["model.safetensors"]
        changed = changed_bytes(random, content[:head]) + content[head:]
        (folder / "model.safetensors").write_bytes(changed)
    family, config = huggingface.describe(folder)
    with contextlib.ExitStack() as stack:
        huggingface._plan(huggingface.open_files(folder, stack), family, config)


def content_header(content: bytes) -> bytes:
    """The JSON header of a safetensors file."""
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


@target
def llama2c_file(random: Random, folder: Path) -> None:
    """The header of a llama2.c file."""
    header = np.array([4, 4, 1, 2, 1, 5, 2], "<i4").tobytes()
    path = folder / "model.bin"
    path.write_bytes(changed_bytes(random, header) + b"\0" * 528)
    llama2c.load(path)


# Adapters -----------------------------------------------------------------------------------------


@functools.cache
def _torch_file() -> bytes:
    path = tiny.folder() / "fuzz.bin"
    arrays = {"a.weight": np.ones((3, 4), np.float32), "b": np.zeros(2, np.float16)}
    tiny.once(path, lambda path: torch_zip.save(path, arrays))
    return path.read_bytes()


@target
def torch_file(random: Random, folder: Path) -> None:
    """`torch.save` files."""
    path = folder / "x.bin"
    if random.random() < 0.5:
        path.write_bytes(changed_bytes(random, _torch_file()))
    else:
        with zipfile.ZipFile(io.BytesIO(_torch_file())) as archive:
            pickled = archive.read("archive/data.pkl")
        torch_zip.write(path, changed_bytes(random, pickled), {"0": b"\0" * 48, "1": b"\0" * 4})
    with open_torch(path) as tensors:
        for tensor in tensors.values():
            tensor.read()


ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"],
    "exclude_modules": None, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": [0, 1],
    "layers_pattern": "layers", "modules_to_save": None, "bias": "none", "use_dora": False,
    "use_rslora": False, "lora_dropout": 0.0, "trainable_token_indices": None,
    "init_lora_weights": True, "ensure_weight_tying": False, "base_model_name_or_path": "x/y",
}  # fmt: skip


@functools.cache
def _adapter_weights() -> bytes:
    modules = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (24, 16)}
    out = {}
    for layer in range(tiny.DECODER.n_layers):
        for name, (D, O) in modules.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            out[f"{module}.lora_A.weight"] = np.ones((2, D), np.float32)
            out[f"{module}.lora_B.weight"] = np.ones((O, 2), np.float32)
    return save(out)


@functools.cache
def _base_params() -> dict:
    return naive.random_params(tiny.DECODER, 0)


@target
def peft_adapter(random: Random, folder: Path) -> None:
    """PEFT's folders."""
    options = dict(ADAPTER)
    if random.random() < 0.4:
        pattern = changed_text(random, r".*\.(0|1)\..*(q|down)_proj")
        key = random.choice(("target_modules", "exclude_modules", "layers_pattern"))
        options[key] = pattern
        if random.random() < 0.3:
            options["rank_pattern"] = {pattern: 2}
    (folder / "adapter_config.json").write_bytes(
        changed_json(random, options) if random.random() < 0.8 else json.dumps(options).encode()
    )
    weights = _adapter_weights()
    if random.random() < 0.2:
        weights = changed_bytes(random, weights)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    peft.read_peft(folder, tiny.DECODER, "llama", "x", _base_params)


_ROSTER = {"x": (BankSpec("x", ("attn.q", "mlp.down"), 0, 2, rank=2, alpha=4.0), "train")}


@target
def released_adapter(random: Random, folder: Path) -> None:
    """Folders of the authors' released formats."""
    (folder / "adapter_config.json").write_bytes(changed_json(random, ADAPTER))
    (folder / "config.json").write_bytes(changed_json(random, {"num_experts_per_token": 2}))
    (folder / "adapter_model.safetensors").write_bytes(_adapter_weights())
    if random.random() < 0.4:
        (folder / "non_lora_trainables.bin").write_bytes(changed_bytes(random, _torch_file()))
    released.read_adapter(folder, tiny.DECODER, "llama", _ROSTER, (), _base_params)


# Tasks, records, work directories -----------------------------------------------------------------

TASK = [
    {"prompt": "Q", "answer": "yes", "choices": ["yes", "no"], "texts": ["a", "b"], "part": "x"},
    {"messages": [{"role": "user", "content": "Q"}], "answer": "A", "metric": "rouge_l"},
    {"prompt": "Q", "answer": "A", "language": "en"},
]
RECORD = {
    "task": "t", "split": "test", "id": "1", "metric": "accuracy", "prompt": "Q", "choices": ["a"],
    "prediction": "a", "answer": "a", "right": 1.0, "ranking": ["a"], "spans": [[0, 1, "x"]],
    "source": "s", "texts": [], "allowed": [], "scores": [0.5], "language": "en", "part": "",
}  # fmt: skip
METRICS = ("accuracy", "exact_match", "rouge_l", "f1")


@target
def user_task(random: Random, folder: Path) -> None:
    """A user's own task."""
    path = folder / "task.jsonl"
    line = random.choice(TASK)
    path.write_bytes(json.dumps(line).encode() + b"\n" + changed_json(random, line) + b"\n")
    user_tasks.read(path)


@target
def evaluation_records(random: Random, folder: Path) -> None:
    """Records of an evaluation, and their comparison."""
    record = {**RECORD, "metric": random.choice(METRICS)}
    path = folder / "records.jsonl"
    path.write_bytes(json.dumps(record).encode() + b"\n" + changed_json(random, record) + b"\n")
    found = records.read(path)
    compare(found, found, resamples=2)


@target
def evaluation_report(random: Random, folder: Path) -> None:
    """report.json of an evaluation."""
    result = dict(task="t", language="en", group="g", kind="choice", metric="accuracy", score=0.5,
                  low=0.4, high=0.6, majority=None, n=3)  # fmt: skip
    path = folder / "report.json"
    whole = {"results": [result], "settings": {}, "about": {"x": "y"}, "failures": []}
    path.write_bytes(changed_json(random, whole))
    report = Report.load(path)
    report.table(), report.notes(), report.average("g")


@target
def rows_to_score(random: Random, folder: Path) -> None:
    """Rows of `medmoe score` and `generate`."""
    path = folder / "rows.jsonl"
    path.write_bytes(changed_bytes(random, b'{"prompt": "Q", "response": "A"}\n' * 2))
    read_rows(str(path), ("prompt",))


@target
def work_directory(random: Random, folder: Path) -> None:
    """Manifests, logs, seals and leases of a work directory."""
    manifest = Manifest(
        "a", "", "f", "b", "", [{"op": "add"}], {"x": BankEntry("train")}, 3, {}, {}
    )
    (folder / "manifest.json").write_bytes(changed_json(random, manifest.to_json()))
    (folder / "metrics.jsonl").write_bytes(
        changed_bytes(random, b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    )
    (folder / "SEAL.json").write_bytes(changed_json(random, {"metrics.jsonl": [3, "x"]}))
    seals.damage(folder)
    holder = {"host": "h", "system": "s", "process": 1, "process_start": 2, "started": "now",
              "token": "t"}  # fmt: skip
    _ = _Entry(1, changed_json(random, holder).decode(errors="replace"), 0).holder
    for read in (
        lambda: Manifest.read(folder / "manifest.json"),
        lambda: files.read_metrics(folder / "metrics.jsonl"),
        lambda: files.MetricsLog(folder / "metrics.jsonl", 1).close(),
    ):
        try:
            read()
        except UserError:
            continue


@target
def json_lines(random: Random, _: Path) -> None:
    """JSON of any kind."""
    list(json_text.lines(changed_json(random, ROWS), "file"))


# Medical sets -------------------------------------------------------------------------------------


def _zip(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def _sheet() -> bytes:
    book, out = openpyxl.Workbook(), io.BytesIO()
    book.active.append(["question", "answer"])
    book.active.append(["Q", 3])
    book.save(out)
    return out.getvalue()


_MEDQUAD = (
    b'<?xml version="1.0"?><Document id="1"><Focus>x</Focus><QAPairs><QAPair pid="1">'
    b'<Question qid="1" qtype="use">Q</Question><Answer>A</Answer></QAPair></QAPairs></Document>'
)
_TMX = b'<tmx><body><tu tuid="a:1"><tuv><seg>x</seg></tuv><tuv><seg>y</seg></tuv></tu></body></tmx>'


@functools.cache
def _medical_files() -> dict[str, tuple[str, bytes]]:
    """By format: the name and the content of a whole file."""
    exam = [{"question": "Q", "options": {"A": "a", "B": "b"}, "answer": "A"}]
    lines = "".join(json.dumps(one) + "\n" for one in exam).encode()
    table = b'question,options,answer\nQ,"A. a\nB. b",A\n'
    return {
        "json": ("x.json", json.dumps(exam).encode()),
        "json.gz": ("x.json.gz", gzip.compress(json.dumps(exam).encode())),
        "jsonl": ("x.jsonl", lines),
        "jsonl.gz": ("x.jsonl.gz", gzip.compress(lines)),
        "csv": ("x.csv", table),
        "csv.zip": ("x.csv.zip", _zip({"a.csv": table, "b.csv": table})),
        "tsv": ("x.tsv", b"Q\ta\tA\n"),
        "parquet": ("x.parquet", _row_files()["parquet"]),
        "xlsx": ("x.xlsx", _sheet()),
        "bio": ("x.txt", b"a\tO\nb\tB-X\n\nc\tO\n"),
        "pubtator_sentences": ("x.txt", b"1|t|Ab c.\n1|a|D e.\n1\t0\t2\tAb\tX\tD1\n\n"),
        "pubtator_relations": ("x.txt", b"1|t|Ab c.\n1|a|D.\n1\t0\t2\tAb\tX\tD1\n1\tCID\tD1\tD1\n"),
        "pairs_xml": ("x.xml", b'<d><pair pid="1" value="y"><a>x</a><b>y</b></pair></d>'),
        "medquad": ("x.zip", _zip({"a/1.xml": _MEDQUAD, "b/2.xml": _MEDQUAD})),
        "tico": ("x.tmx.zip", _zip({"a.tmx": _TMX})),
        "pubmedqa": ("ori_pqal.json", json.dumps({"1": {"QUESTION": "Q"}}).encode()),
    }  # fmt: skip


_CARD = next(iter(medical.SETS.values()))


@target
def medical_set(random: Random, folder: Path) -> None:
    """The files of medical sets in every format."""
    name, (file, whole) = random.choice(list(_medical_files().items()))
    path = folder / file
    if file.endswith(".zip") and random.random() < 0.5:
        member = {"tico": _TMX, "medquad": _MEDQUAD}.get(name, b"question,answer\nQ,A\n")
        ending = {"tico": ".tmx", "medquad": ".xml"}.get(name, ".csv")
        whole = _zip({f"a{ending}": changed_bytes(random, member)})
    elif file.endswith(".json") and random.random() < 0.6:
        whole = changed_json(random, json.loads(whole))
    else:
        whole = changed_bytes(random, whole)
    path.write_bytes(whole)
    (folder / "test_ground_truth.json").write_bytes(changed_json(random, {"1": "yes"}))
    entry = dataclasses.replace(
        _CARD, name="x", format=name, columns=("question", "options", "answer"), records="",
        read={"separator": "\t"},
    )  # fmt: skip
    found = locate.Found(path, {"language": "es"})
    for _ in formats.records(entry, found):
        pass


CARD = """
[x]
title = "X"
folder = "x"
files = { train = ["a.json"], test = ["b.json"] }
form = "exam"
group = "g"
get = "somewhere"
licence = "MIT"
checked = "files"
question = "q"
options = "o"
answer = "a"
"""


@target
def card(random: Random, folder: Path) -> None:
    """Cards of sets."""
    path = folder / "cards.toml"
    path.write_bytes(changed_text(random, CARD).encode(errors="surrogatepass"))
    cards.load_cards(path)
