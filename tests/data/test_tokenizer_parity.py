"""Ids, decoded text and chat templates against transformers, for every kind of vocabulary."""

import json

import pytest
import sentencepiece
import tokenizers as hf

from medmoe_jax.data import templates as tp
from medmoe_jax.data import tokenizers as tk
from medmoe_jax.data.encode import Encoder
from tests.data.samples import CHATML, conversation, texts

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")

TEXTS = [
    "fever and cough",
    "The patient, aged 75, takes 1000 mg/day (since 2019).",
    "leading and trailing  ",
    "two  spaces,\ta tab,\nlines\n\nand\r\nmore \n",
    "患者主诉发热咳嗽三天。",
    "Пациент жалуется на кашель",
    "المريض يعاني من الحمى والسعال",
    "👩🏽‍⚕️ gave 💊 at 39 °C — naïve café e\u0301",
    "don't I'LL we've",
    "<|im_start|> and </s> and [INST] in a text",
    "x",
]
ROWS = [
    conversation("What is fever?", "A sign.", system="You are a doctor."),
    conversation("What is fever?", "A sign.", "and cough, since  Monday?", "Another. 75 mg"),
    conversation("患者发热三天，咳嗽。", "肺炎？", "👩🏽‍⚕️ 39 °C", "退热", system="你是医生。"),
    conversation("ما هي الحمى؟", "علامة.", "و السعال؟", "علامة أخرى", system="أنت طبيب."),
    conversation("line one\nline two ", "an answer\n\nwith lines", "x", "y"),
]

CHATML_TEMPLATE = (
    "{%- if tools %}{{ raise_exception('no tools') }}{%- endif %}"
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
HEADER_TEMPLATE = (
    "{{ bos_token }}{% if tools is not none %}{{ raise_exception('no tools') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|header|>' + message['role'] + '<|end_header|>\n\n' + message['content'] | trim }}"
    "{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\n\n' }}{% endif %}"
)
INST_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}"
    "{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + message['content'].strip() "
    "+ ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
MARK_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TURN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# The pre-tokenisation of the Qwen and Llama 3 families: words, up to three digits, lines.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(folder, config, jinja=None):
    config = {"clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja:
        (folder / "chat_template.jinja").write_text(jinja)


def byte_level(folder, specials, plain=()):
    """A BPE on bytes with special tokens, and added tokens that are not special."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.normalizer = hf.normalizers.NFC()
    split = hf.pre_tokenizers.Split(hf.Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [split, hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens(list(specials))
    tokenizer.add_tokens(list(plain))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def qwen(folder):
    """Template in the config, no bos, an added token that is not special."""
    byte_level(folder, ["<|endoftext|>", *CHATML], ["<tool_call>"])
    write(
        folder,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML_TEMPLATE,
        },
    )


def llama3(folder):
    """Template in a file of its own, bos from the post-processor."""
    marks = ["<|begin|>", "<|end|>", "<|header|>", "<|end_header|>", "<|eot|>"]
    tokenizer = byte_level(folder, marks)
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>"}
    write(folder, {**config, "eos_token": "<|eot|>"}, HEADER_TEMPLATE)


def metaspace(folder, added=()):
    """A tokenizer.json of the first Llamas: a space before every run of text, byte fallback."""
    tokenizer = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
    )
    decoders = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    tokenizer.decoder = hf.decoders.Sequence([*decoders, hf.decoders.Strip(" ", 1, 0)])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False
    )
    # As in those vocabularies, no merge reaches over a space into the next word.
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = hf.Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }


def llama2_json(folder):
    write(folder, {**metaspace(folder), "chat_template": INST_TEMPLATE})


def llama2_json_other(folder):
    """A class that does not know the field `legacy`."""
    write(folder, {**metaspace(folder), "legacy": False, "chat_template": INST_TEMPLATE})


def llama_class(folder, **config):
    """A class that makes the steps around the vocabulary anew."""
    fields = {"tokenizer_class": "LlamaTokenizerFast", "chat_template": INST_TEMPLATE}
    write(folder, {**metaspace(folder), **fields, **config})


def llama_class_legacy(folder):
    llama_class(folder, legacy=True)


def llama_class_unspaced(folder):
    llama_class(folder, legacy=True, add_prefix_space=False)


def mistral_model(folder):
    """A model for which the class is not asked."""
    llama_class(folder, legacy=False, add_prefix_space=False)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))


def phi3(folder):
    """Marks that take in the white space after them."""
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    config = metaspace(folder, [hf.AddedToken(name, rstrip=True) for name in names])
    write(folder, {**config, "eos_token": "<|end|>", "chat_template": MARK_TEMPLATE})


def sentence_pieces(folder, **options):
    """A sentencepiece model, and the fields of the config that name its tokens."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


def added_token(content, special=True):
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special, **flags}


def llama2(folder, **config):
    fields = sentence_pieces(folder)
    fields |= {"tokenizer_class": "LlamaTokenizer", "chat_template": INST_TEMPLATE}
    write(folder, {**fields, **config})


def llama2_legacy(folder):
    llama2(folder, legacy=True)


def llama2_unspaced(folder):
    llama2(folder, add_prefix_space=False)


def llama2_chatml(folder):
    """Tokens behind the model's own, one of which ends the turns."""
    tokens = {str(450 + i): added_token(name) for i, name in enumerate(CHATML)}
    tokens["452"] = added_token("<note>", special=False)
    llama2(
        folder,
        legacy=False,
        eos_token="<|im_end|>",
        added_tokens_decoder=tokens,
        chat_template=CHATML_TEMPLATE,
    )


def gemma(folder):
    """No space before a text; marks and runs of lines are pieces of the model."""
    marks = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n"]
    fields = sentence_pieces(folder, add_dummy_prefix=False, user_defined_symbols=marks)
    names = {"tokenizer_class": "GemmaTokenizer", "pad_token": "</s>", "mask_token": "<unk>"}
    tokens = {str(3 + i): added_token(mark) for i, mark in enumerate(marks[:2])}
    write(folder, {**fields, **names, "added_tokens_decoder": tokens}, TURN_TEMPLATE)


LLAMAS = (llama2, llama2_legacy, llama2_unspaced, llama2_chatml)
CLASSES = (llama_class, llama_class_legacy, llama_class_unspaced, mistral_model)
VOCABULARIES = (qwen, llama3, llama2_json, llama2_json_other, *CLASSES, phi3, *LLAMAS, gemma)


@pytest.fixture(scope="module", params=VOCABULARIES, ids=lambda make: make.__name__)
def pair(request, tmp_path_factory):
    """Our tokenizer and transformers', of one folder."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return tk.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


def test_a_space_before_a_text(pair):
    """Sentencepiece puts its own space before that, too; transformers leaves it out there."""
    ours, theirs = pair
    ids = ours.encode(" fever", start=True)
    if isinstance(ours, tk.SentencePiece) and ours.encode("x", True) != ours.encode("x"):
        upstream = sentencepiece.SentencePieceProcessor(model_file=str(ours.path))
        assert ids == upstream.encode(" fever")
    else:
        assert ids == theirs(" fever", add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text(pair, text):
    ours, theirs = pair
    ids = ours.encode(text, start=True)
    assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours.decode(ids, start=True) == theirs.decode(ids, skip_special_tokens=True)


AROUND = (
    "a</s>b",
    "a </s> b",
    " </s>  b",
    "</s>",
    "x</s>\n</s>y ",
    "\n\nx</s>1.5 mg",
    "<s><s>fever</s>",
    "x</s>\x1f\x1cy</s>\x85\u2028\u3000z",
    "\u2581\u2581x</s>",
)


@pytest.mark.parametrize("text", AROUND)
def test_text_beside_a_special_token(pair, text):
    ours, theirs = pair
    for end in ("</s>", ours.text_of(ours.eos_id)):
        marked = text.replace("</s>", end)
        ids = ours.encode_markup(marked, start=True)
        assert ids == theirs(marked, add_special_tokens=False).input_ids


def described(folder, where, token):
    """A folder with one more token, in its tokenizer.json or in the file beside it."""
    path, beside = folder / "tokenizer.json", folder / "tokenizer_config.json"
    index = tk.load(folder).vocab_size
    if where == "json":
        tokenizer = hf.Tokenizer.from_file(str(path))
        tokenizer.add_tokens([hf.AddedToken(**token)])
        tokenizer.save(str(path))
    else:
        config = json.loads(beside.read_text())
        known = {
            str(i): added_token(one.content, one.special)
            for i, one in hf.Tokenizer.from_file(str(path)).get_added_tokens_decoder().items()
        }
        config["added_tokens_decoder"] = {**known, str(index): token}
        beside.write_text(json.dumps(config))


@pytest.mark.parametrize("where", ["json", "config"])
@pytest.mark.parametrize("make", [qwen, llama_class, llama_class_unspaced, mistral_model])
def test_what_a_token_takes_in(make, where, tmp_path):
    make(tmp_path)
    sides = {"lstrip": True, "rstrip": True, "normalized": make is not mistral_model}
    described(tmp_path, where, {**added_token("<note>", special=False), **sides})
    ours, theirs = tk.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a <note> b", "a\x1f<note>\x1c\n x", " <note>", "a\xa0\u2003<note>\u3000x"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode_markup(text, start=True) == ids
        assert ours.encode(text, start=True) == ids


@pytest.mark.parametrize(
    ("make", "fields", "same"),
    [
        (llama_class, {"legacy": False}, {"legacy": False, "add_prefix_space": True}),
        (llama_class, {"legacy": False}, {"legacy": False, "tokenizer_class": "LlamaTokenizer"}),
        (llama2, {"add_prefix_space": True}, {}),
    ],
)
def test_the_digest_tells_where_a_dummy_space_stands(make, fields, same, tmp_path):
    digests = []
    for changed in (fields, same, fields | {"add_prefix_space": False}):
        make(tmp_path, **changed)
        digests.append(tk.load(tmp_path).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_class_that_does_not_know_legacy(tmp_path):
    llama_class(tmp_path, legacy=True, tokenizer_class="CodeLlamaTokenizer")
    ours, theirs = tk.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in AROUND:
        ids = ours.encode_markup(text, start=True)
        assert ids == theirs(text, add_special_tokens=False).input_ids


def test_special_tokens(pair):
    ours, theirs = pair
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    known = {token.content: i for i, token in theirs.added_tokens_decoder.items()}
    assert {text: ours.special(text) for text in known if text != "<unk>"} == {
        text: i for text, i in known.items() if text != "<unk>"
    }
    assert all(ours.text_of(i) == text for text, i in known.items())
    # What a post-processor adds to a plain text is the template's bos here.
    added = [] if ours.bos_id is None else [ours.bos_id]
    assert plain_prompt(ours) == theirs("fever").input_ids
    assert plain_prompt(ours) == [*added, *ours.encode("fever", start=True)]


def plain_prompt(tokenizer):
    template = tp.load_template("plain", tokenizer)
    return Encoder(tokenizer, template).prompt([{"role": "user", "content": "fever"}])


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("make", VOCABULARIES, ids=lambda make: make.__name__)
def test_bos_before_a_plain_text(make, told, tmp_path):
    """Where a tokenizer.json stands, its last step tells, whatever the config says."""
    make(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": told}))
    ours, theirs = tk.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("fever").input_ids
    assert plain_prompt(ours) == ids
    assert ours.encodes_bos == (theirs.bos_token_id in ids)


def test_bos_that_is_named_and_not_put_before_a_text(tmp_path):
    qwen(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "bos_token": "<|endoftext|>"}
    path.write_text(json.dumps(config))
    ours, theirs = tk.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.bos_id == theirs.bos_token_id is not None
    assert plain_prompt(ours) == theirs("fever").input_ids == ours.encode("fever", start=True)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_chat(pair, row):
    """Text and ids of whole conversations and of prompts; content in which markup is text."""
    ours, theirs = pair
    turns = row["conversations"]
    template = tp.load_template("tokenizer", ours)
    encoder = Encoder(ours, template)
    for ids, pieces, given, options in (
        (encoder(row).tokens.tolist(), template.rows(turns)[0], turns, {}),
        (
            encoder.prompt(turns[:-1]),
            template.prompt(turns[:-1]),
            turns[:-1],
            {"add_generation_prompt": True},
        ),
    ):
        text = theirs.apply_chat_template(given, tokenize=False, **options)
        assert "".join(piece.text for piece in pieces) == text
        wanted = theirs.apply_chat_template(given, tokenize=True, return_dict=False, **options)
        assert ids == wanted, theirs.convert_ids_to_tokens(wanted)


def test_an_answer_reads_as_it_was_written(pair):
    """Decoded after its prompt, an answer is the text that was trained on."""
    ours, _ = pair
    encoder = Encoder(ours, tp.load_template("tokenizer", ours))
    for row in ROWS:
        turns = row["conversations"]
        prompt, whole = encoder.prompt(turns[:-1]), encoder(row)
        end = int(whole.loss_mask.nonzero()[0].max()) + 1
        answer = whole.tokens[len(prompt) : end].tolist()
        text = ours.decode(answer, start=ours.begins_after(prompt))
        assert text.strip() == turns[-1]["content"].strip()
        assert text.startswith(turns[-1]["content"][0]) or template_adds_space(ours)


def template_adds_space(tokenizer) -> bool:
    return "' ' + message" in tokenizer.chat_template


def test_what_a_template_sets_where_the_model_speaks(tmp_path):
    """It holds there alone."""
    qwen(tmp_path)
    spoken = "{% set mark = '' %}{% generation %}{% set mark = '!' %}{% endgeneration %}{{ mark }}"
    source = CHATML_TEMPLATE.replace("{%- endfor %}", spoken + "{%- endfor %}")
    ours, theirs = tk.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "spoken.jinja").write_text(source)
    template = tp.load_template(str(tmp_path / "spoken.jinja"), ours)
    turns = ROWS[1]["conversations"]
    text = theirs.apply_chat_template(turns, chat_template=source, tokenize=False)
    assert "".join(piece.text for piece in template.rows(turns)[0]) == text
