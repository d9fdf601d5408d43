"""`medmoe serve` on the tiny model: several models over one base, asked while the command runs."""

import http.client
import itertools
import json
import math
import os
import re
import signal
import sys
import threading

import openai
import pytest

from medmoe_jax.cli import serve
from medmoe_jax.cli.main import main
from medmoe_jax.training.setup import Setup
from tests import tiny

ASKED = [row["prompt"] for row in tiny.alignment_rows()[:2]]
MODELS = {"med": "align", "calm": "aggregate:noise,knowledge", "raw": "base"}


def served(arguments, ask, monkeypatch):
    """What `ask(url)` gives of a server that runs with these arguments until it is asked to end."""
    said, ready, answered = [], threading.Event(), []

    def note(text):
        said.append(text)
        if text.startswith("ready: "):
            ready.set()

    def client():
        try:
            if ready.wait(timeout=300):
                answered.append(ask(re.search(r"http\S+v1", said[-1])[0]))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(serve, "note", note)
    thread = threading.Thread(target=client)
    thread.start()
    status = main(["serve", "--port=0", *arguments])
    thread.join()
    assert status == 0 and said[-1] == "ended"
    return answered[0], said


@pytest.mark.slow
def test_models_of_one_base_answer_as_generate_and_score_do(
    config, workdir, tmp_path, monkeypatch, capsys
):
    loads, load = [], Setup._load
    monkeypatch.setattr(Setup, "_load", lambda self: loads.append(0) or load(self))
    tokenizer = tiny.tokenizer()
    prompt = [tokenizer.bos_id, *tokenizer.encode(f"User:{ASKED[0]}\nAssistant:")]
    yes = tokenizer.encode("yes")

    def ask(url):
        client = openai.OpenAI(base_url=url, api_key="none", timeout=300)
        chats = {
            (name, text): client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": text}],
                max_tokens=8,
                temperature=0,
            )
            .choices[0]
            .message.content
            for name, text in itertools.product(MODELS, ASKED)
        }
        told = client.completions.create(
            model="med", prompt=[prompt + yes], max_tokens=1, echo=True, logprobs=1, temperature=0
        )
        assert [one.id for one in client.models.list()] == list(MODELS)
        return chats, told.choices[0].logprobs

    asked = [f"--model={name}={what}" for name, what in MODELS.items()]
    (chats, told), said = served([config, f"--workdir={workdir}", *asked], ask, monkeypatch)
    assert len(loads) == 1, "the base is in memory once"
    assert any(line.startswith("calm: stage aggregate, attention, context 128") for line in said)
    for name, what in MODELS.items():
        stage, _, off = what.partition(":")
        source = tiny.write_rows(tmp_path / "in.jsonl", [{"prompt": text} for text in ASKED])
        out = tmp_path / "out.jsonl"
        more = [f"--off={bank}" for bank in off.split(",") if bank]
        model = [config, f"--workdir={workdir}", f"--stage={stage}"]
        command = ["generate", *model, *more, "--max-tokens=8"]
        assert main([*command, f"--input={source}", f"--output={out}"]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["response"] for row in rows] == [chats[name, text] for text in ASKED], name
    assert len({chats["med", ASKED[0]], chats["raw", ASKED[0]]}) == 2
    # As lm-evaluation-harness reads it, and as the engine scores.
    assert len(told.token_logprobs) == len(prompt + yes) + 1 and told.token_logprobs[0] is None
    assert all(not math.isnan(p) for p in told.token_logprobs[1:])
    greedy = [p == max(top.values()) for p, top in
              zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True)]  # fmt: skip
    assert greedy[-1], "what was generated greedily is the most probable"
    source = tiny.write_rows(tmp_path / "in.jsonl", [{"prompt": ASKED[0], "completion": "yes"}])
    command = ["score", config, f"--workdir={workdir}", f"--input={source}", f"--output={out}"]
    assert main(command) == 0
    whole = json.loads(out.read_text())["logprob"]  # with the end of the turn
    assert sum(told.token_logprobs[len(prompt) : -1]) >= whole


@pytest.mark.slow
def test_a_server_is_asked_by_the_address_that_it_prints(config, workdir, monkeypatch):
    def ask(url):
        assert url.startswith("http://127.0.0.2:")
        address, got = url.removeprefix("http://").removesuffix("/v1"), []
        for host in (address, address.replace("127.0.0.2", "127.0.0.3"), "evil.example"):
            link = http.client.HTTPConnection(address)
            link.request("GET", "/health", headers={"Host": host})
            got.append(link.getresponse().status)
            link.close()
        return got

    asked = [config, f"--workdir={workdir}", "--model=raw=base", "--host=127.0.0.2"]
    assert served(asked, ask, monkeypatch)[0] == [200, 403, 403]


def test_options_are_checked_before_anything_is_loaded(config, workdir, tmp_path, capsys):
    empty = tmp_path / "key"
    empty.write_text("\n")
    strange = tmp_path / "strange"
    strange.write_bytes(b"\xff\xfes\x00")
    for arguments, words in (
        (["--port=70000"], "--port: 70000 is above 65535"),
        (["--queue=-1"], "--queue: -1 is below 0"),
        (["--timeout=0"], "--timeout: 0.0 is not above 0"),
        (["--host=0.0.0.0"], "others can reach 0.0.0.0, so clients need a key"),
        ([f"--api-key-file={empty}"], f"--api-key-file: {empty} is empty"),
        ([f"--api-key-file={strange}"], f"--api-key-file: {strange} is not text"),
        (["--api-key-file=gs://b/k"], "--api-key-file: "),
        (["--model=align"], "--model: 'align' is not NAME=STAGE"),
        (["--model=a=align", "--model=a=base"], "the name 'a' is given twice"),
        (["--model=a=ghost"], "--model: 'ghost' is none of base, aggregate, align"),
        (["--model=a=align:ghost"], "there is no bank 'ghost'"),
        (["--zzz"], "unknown argument '--zzz'"),
    ):
        assert main(["serve", config, f"--workdir={workdir}", "--port=0", *arguments]) == 1
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys):
    def key(**given):
        defaults = {"host": "127.0.0.1", "api_key_file": None, "no_key": False}
        return serve._key(type("Arguments", (), defaults | given))

    assert key() == "" and key(host="::1") == "" and key(host="0.0.0.0", no_key=True) == ""
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert key(api_key_file=str(file), host="0.0.0.0") == "secret"
    assert "chmod 600" in capsys.readouterr().err
    file.chmod(0o600)
    monkeypatch.setenv(serve.KEY, "other")
    assert (key(), key(api_key_file=str(file))) == ("other", "secret")
    assert "chmod" not in capsys.readouterr().err
    for bad in ("two words", "ключ"):
        monkeypatch.setenv(serve.KEY, bad)
        with pytest.raises(ValueError, match="a key is one word of ASCII"):
            key()


def test_the_extra_is_asked_for_by_name(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("medmoe_jax.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert main(["serve", "--config=x"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'medmoe_jax[serve]'" in error and error.count("\n") == 1
