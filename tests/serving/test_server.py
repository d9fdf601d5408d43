"""The server on loopback under OpenAI's own client, with a decoder whose answers are known."""

import asyncio
import contextlib
import http.client
import itertools
import json
import threading
import types

import openai
import pytest

from medmoe_jax.data.templates import load_template
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.inference.worker import Worker
from medmoe_jax.serving.app import application
from medmoe_jax.serving.endpoint import Limits
from medmoe_jax.serving.models import Served
from medmoe_jax.serving.server import Server, bind
from tests import tiny
from tests.inference.scripted import Scripted, scored

KEY = "a-key-of-tests"
CONTEXT = 1 << 20
BODY = 4096


def answer(request):
    """What the prompt says after `say `, then the end; `forever ` repeats it."""
    tokenizer = tiny.tokenizer()
    text = tokenizer.decode(request.prompt)
    said = text.rpartition("say ")[2].partition("\n")[0].removesuffix("assistant")
    if "forever " in text:
        return itertools.cycle(tokenizer.encode("It is for pain. "))
    return itertools.chain(
        tokenizer.encode(said), itertools.repeat(tokenizer.special("<|im_end|>"))
    )


def served(name, rows, places, context=CONTEXT, clock=None, before_step=lambda: None, stride=1):
    """A model whose decoder is scripted."""
    decoding = Scripted(answer, rows, before_step, stride)
    engine = types.SimpleNamespace(
        config=types.SimpleNamespace(decoder=tiny.DECODER.replace(max_positions=context)),
        told=lambda prompts, n, languages: [[scored(token, n) for token in ids] for ids in prompts],
    )
    template = load_template("chatml", tiny.tokenizer())
    worker = Worker(decoding, places, *([clock] if clock else []))
    one = Served(name, LanguageModel(engine, tiny.tokenizer(), template), worker, {"stage": "s"})
    return one, decoding


class Running:
    """A server in a thread."""

    def __init__(self):
        self.now = [0.0]
        parts = {
            "main": served("main", 4, 40),
            "small": served("small", 1, 1),
            "short": served("short", 1, 4, context=64),
            "late": served("late", 1, 4, clock=lambda: self.now[0]),
            "strides": served("strides", 2, 8, stride=7),
        }
        self.models = {name: one for name, (one, _) in parts.items()}
        self.decoding = {name: one for name, (_, one) in parts.items()}
        self.bound = bind("127.0.0.1", 0)
        self.port = self.bound.getsockname()[1]
        app = application(list(self.models.values()), Limits(600.0, BODY), KEY)
        self.server, ready = Server(app, 60.0), threading.Event()
        arguments = (list(self.models.values()), self.bound, ready.set)
        self.thread = threading.Thread(target=self.server.serve_models, args=arguments)
        self.thread.start()
        assert ready.wait(timeout=60)

    def client(self, kind=openai.OpenAI, key=KEY):
        return kind(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60
        )

    def raw(self, path, body=None, key=KEY, kind="application/json", **headers):
        """`(status, JSON, headers)` of a request in bytes."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {"Authorization": f"Bearer {key}", "Content-Type": kind, **headers}
        link.request("POST" if body is not None else "GET", path, body, named)
        answer = link.getresponse()
        content = answer.read()
        link.close()
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status, json.loads(content) if is_json else content.decode(), answer.headers

    def close(self):
        self.server.should_exit = True
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()
        for one in self.models.values():
            one.worker.close()


@pytest.fixture(scope="module")
def running():
    one = Running()
    yield one
    one.close()


@pytest.fixture(scope="module")
def client(running):
    return running.client()


def user(text):
    return [{"role": "user", "content": text}]


def test_a_chat_completion(client):
    done = client.chat.completions.create(
        model="main", messages=user("say yes, it is"), temperature=0
    )
    (choice,) = done.choices
    tokenizer = tiny.tokenizer()
    assert choice.message.content == "yes, it is" and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" and choice.logprobs is None
    assert done.object == "chat.completion" and done.model == "main" and done.id
    said = len(tokenizer.encode("yes, it is")) + 1  # with what ended it
    read = len(tokenizer.encode("say yes, it is"))
    assert done.usage.completion_tokens == said and done.usage.prompt_tokens > read
    assert done.usage.total_tokens == said + done.usage.prompt_tokens


def test_a_stream_is_the_same_text_in_parts(client):
    stream = client.chat.completions.create(
        model="main",
        messages=[{"role": "system", "content": "s"}, *user("say 患者 has a fever 🩺")],
        stream=True,
        stream_options={"include_usage": True},
        n=2,
    )
    texts, ends, roles, usage = ["", ""], {}, [], None
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [(choice.index, choice.delta.role)] * bool(choice.delta.role)
            ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert texts == ["患者 has a fever 🩺"] * 2 and ends == {0: "stop", 1: "stop"}
    assert sorted(roles) == [(0, "assistant"), (1, "assistant")]
    assert usage.completion_tokens == 2 * (len(tiny.tokenizer().encode(texts[0])) + 1)


def test_stops_and_lengths_end_an_answer(running, client):
    def ask(**more):
        done = client.chat.completions.create(model="main", messages=user("say one two"), **more)
        return done.choices[0].message.content, done.choices[0].finish_reason

    assert ask(stop="two") == ("one ", "stop") and ask(stop=["x", " t"]) == ("one", "stop")
    first = tiny.tokenizer().decode(tiny.tokenizer().encode("one two")[:2])
    assert ask(max_tokens=2) == ask(max_completion_tokens=2) == (first, "length")
    assert running.models["main"].worker.pending == 0


@pytest.mark.parametrize("model", ["main", "strides"])
@pytest.mark.parametrize("room", [9, 60])
def test_what_comes_after_the_text_of_a_stop_is_neither_told_nor_counted(client, model, room):
    """However many tokens a decoder says before it is told to stop."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode("a b c d e f g h i j k l")
    size = next(n for n in range(len(ids)) if "c" in tokenizer.decode(ids[:n]))
    want = [tokenizer.decode([token]) for token in ids[:size]] * 2
    asked = {"model": model, "stop": "c", "n": 2, "max_tokens": room}
    talk = {"messages": user("say a b c d e f g h i j k l"), "logprobs": True, **asked}
    done = client.chat.completions.create(**talk)
    assert [c.message.content for c in done.choices] == ["a b "] * 2
    assert [one.token for c in done.choices for one in c.logprobs.content] == want
    assert done.usage.completion_tokens == 2 * size
    stream = client.chat.completions.create(
        **talk, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    told = [one.token for n in range(2) for chunk in chunks for c in chunk.choices
            if c.index == n for one in c.logprobs.content]  # fmt: skip
    assert told == want and chunks[-1].usage.completion_tokens == 2 * size
    done = client.completions.create(**asked, prompt="say a b c d e f g h i j k l", logprobs=0)
    assert [one for c in done.choices for one in c.logprobs.tokens] == want
    assert done.usage.completion_tokens == 2 * size


def test_log_probabilities_of_a_chat(client):
    done = client.chat.completions.create(
        model="main", messages=user("say yes"), logprobs=True, top_logprobs=2
    )
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer.encode("yes"), tokenizer.special("<|im_end|>")]
    content = done.choices[0].logprobs.content
    assert [one.token for one in content] == [
        *(tokenizer.decode([i]) for i in ids[:-1]),
        "<|im_end|>",
    ]
    assert all(one.logprob == -0.5 and len(one.top_logprobs) == 2 for one in content)
    assert bytes(content[0].bytes).decode() == content[0].token
    done = client.chat.completions.create(model="main", messages=user("say 患者 🩺"), logprobs=True)
    content = done.choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in content) == "患者 🩺<|im_end|>".encode()


def test_completions_of_texts_and_ids(client):
    tokenizer = tiny.tokenizer()
    for prompt in ("say yes", tokenizer.encode("say yes", start=True)):
        done = client.completions.create(model="main", prompt=prompt, stop="e")
        assert done.choices[0].text == "y" and done.choices[0].finish_reason == "stop"
    done = client.completions.create(
        model="main", prompt=["say yes", "say no"], n=2, echo=True, max_tokens=1
    )
    firsts = [tokenizer.decode(tokenizer.encode(text)[:1]) for text in ("yes", "no")]
    assert [(c.index, c.text) for c in done.choices] == [
        (0, "say yes" + firsts[0]), (1, "say yes" + firsts[0]),
        (2, "say no" + firsts[1]), (3, "say no" + firsts[1]),
    ]  # fmt: skip
    stream = client.completions.create(model="main", prompt="say no", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "say nono"


@pytest.mark.parametrize("room", [0, 1])
def test_prompts_are_scored_as_the_evaluation_harness_asks(client, room):
    """Each token's log-probability, the first without, and with it what was generated."""
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer.encode("say yes or no", start=True), [5, 7]]
    done = client.completions.create(
        model="main", prompt=prompts, echo=True, logprobs=1, max_tokens=room, temperature=0, seed=1
    )
    for ids, choice in zip(prompts, done.choices, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(told.top_logprobs) == len(told.text_offset)
        assert told.token_logprobs == [None, *[-0.5] * (len(ids) - 1 + room)]
        assert told.top_logprobs[0] is None and told.text_offset[0] == 0
        assert all(max(top.values()) == -0.5 for top in told.top_logprobs[1:])
    assert done.choices[0].finish_reason == "length"
    assert done.choices[1].finish_reason == ("stop" if room else "length")
    assert done.usage.completion_tokens == room * 2


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_places_of_the_text(client, stream):
    """Behind marks of an echoed prompt, and behind characters of several tokens."""
    prompt = "<|im_start|>患者, say 者 or so"
    done = client.completions.create(
        model="strides", prompt=prompt, echo=True, logprobs=0, max_tokens=40, stream=stream
    )
    choices = [one.choices[0] for one in done] if stream else done.choices
    text = "".join(choice.text for choice in choices)
    told = [(token, place) for choice in choices for token, place in
            zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)]  # fmt: skip
    assert text == prompt + "者 or so" and told[-1] == ("<|im_end|>", len(text))
    for token, place in told[:-1]:
        assert "\ufffd" in token or text[place:].startswith(token)


def test_models_are_listed(running, client):
    assert [one.id for one in client.models.list()] == [*running.models]
    one = client.models.retrieve("short")
    assert one.max_model_len == 64 and one.stage == "s"
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt'; known: main, small"):
        client.models.retrieve("gpt")


def test_thirty_two_streams_of_which_half_hang_up(running):
    """Those who stay get their own answers; the rows of the others are freed."""
    decoding = running.decoding["main"]
    earlier = decoding.count  # tests whose answers a stop's text has cut short

    async def one(client, number):
        leaves = number % 2
        text = f"forever {number} x" if leaves else f"say the answer to {number} is {number}"
        stream = await client.chat.completions.create(
            model="main", messages=user(text), stream=True
        )
        said = ""
        async with stream:
            async for chunk in stream:
                said += chunk.choices[0].delta.content or ""
                if leaves and len(said) > 6:
                    return None
        return said

    async def everybody():
        async with running.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, number) for number in range(32)))

    answers = asyncio.run(everybody())
    gone = 0
    while gone < 16:
        gone += decoding.cancelled.get(timeout=60) > earlier
    assert answers == [None if n % 2 else f"the answer to {n} is {n}" for n in range(32)]
    assert running.models["main"].worker.pending == 0 and not decoding.running
    assert decoding.most == 4


def figures_of(running):
    """What is told to Prometheus: `{figure: text}`."""
    status, page, _ = running.raw("/metrics")
    assert status == 200
    return dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")


def counted(running, model, status):
    """How many requests of a model have ended by a status."""
    figure = f'medmoe_requests_total{{model="{model}",status="{status}"}}'
    return float(figures_of(running).get(figure, 0))


def test_a_full_queue_is_answered_with_when_to_come_back(running, client):
    gone, whole = (counted(running, "small", status) for status in (499, 200))
    stream = client.chat.completions.create(model="small", messages=user("forever a"), stream=True)
    with stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="all of the 1 places") as caught:
            client.chat.completions.create(model="small", messages=user("say a"))
        assert caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.BadRequestError, match="may ask for 1 answers at most"):
            client.chat.completions.create(model="small", messages=user("say a"), n=2)
    running.decoding["small"].cancelled.get(timeout=60)
    assert counted(running, "small", 499) == gone + 1 and counted(running, "small", 200) == whole
    done = client.chat.completions.create(model="small", messages=user("say a"))
    assert done.choices[0].message.content == "a"


def test_more_answers_than_places_are_refused_before_anything_is_made(client):
    many = {"model": "main", "n": 10**9}
    for asked in (
        {"prompt": "say a", "max_tokens": 1},
        {"prompt": "say a", "max_tokens": 0, "echo": True},
        {"prompt": ["say a", "say b"], "max_tokens": 0, "echo": True, "logprobs": 1},
    ):
        with pytest.raises(openai.BadRequestError, match="answers at most") as caught:
            client.completions.create(**many, **asked)
        assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="answers at most"):
        client.chat.completions.create(**many, messages=user("say a"))
    with pytest.raises(openai.BadRequestError, match="top_k: 2147483648 is above"):
        client.completions.create(model="main", prompt="a", extra_body={"top_k": 2**31})
    told = [*user("say a"), {"role": "function", "name": "f", "content": "1"}, *user("say a")]
    told[0]["name"] = ""
    with pytest.raises(openai.BadRequestError, match="template has no place for name, role 'tool'"):
        client.chat.completions.create(model="main", messages=told)


def test_names_of_speakers_are_taken_without_effect(client):
    """Rows to train on have none; clients for several speakers send them."""
    talk = [{"role": "system", "content": "s"}, *user("say yes"), *user("say no")]
    talk[1:2] += [{"role": "assistant", "content": "yes"}]
    spoken = [message | {"name": f"speaker {n}"} for n, message in enumerate(talk)]
    plain, named = (
        client.chat.completions.create(model="main", messages=m) for m in (talk, spoken)
    )
    assert named.choices[0].message.content == "no" and named.usage == plain.usage
    with pytest.raises(openai.BadRequestError, match=r"\[0\]: name must be text, found a number"):
        client.chat.completions.create(model="main", messages=[user("a")[0] | {"name": 5}])


def test_as_many_are_made_as_are_told(client):
    for n in (1, 2):
        done = client.completions.create(model="main", prompt="say no", n=n, best_of=n)
        assert [choice.text for choice in done.choices] == ["no"] * n
    with pytest.raises(
        openai.BadRequestError, match="best_of: only n, here 2, can be served"
    ) as no:
        client.completions.create(model="main", prompt="say no", n=2, best_of=3)
    assert no.value.param == "best_of"


def test_a_client_that_hangs_up_before_a_whole_answer_frees_its_row(running):
    link = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    body = json.dumps({"model": "small", "messages": user("forever a")})
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    link.request("POST", "/v1/chat/completions", body, headers)
    link.sock.close()
    link.close()
    running.decoding["small"].cancelled.get(timeout=60)


def test_time_is_limited(running, client):
    """While a whole answer is made, and while one is under way."""
    running.now[0], before = 0.0, counted(running, "late", 504)
    stream = client.chat.completions.create(model="late", messages=user("forever a"), stream=True)
    chunks = iter(stream)
    next(chunks)
    running.now[0] = 1000.0
    with pytest.raises(openai.APIError, match="took longer than the 600 seconds"):
        for _ in chunks:
            pass
    assert counted(running, "late", 504) == before + 1 and counted(running, "late", 200) == 0
    done = client.chat.completions.create(model="late", messages=user("say a"))
    assert done.choices[0].message.content == "a"


def test_the_key_is_asked_for(running, client):
    for key in ("wrong", "", KEY + "x", "ключ".encode().decode("latin-1")):
        status, content, headers = running.raw("/v1/models", key=key)
        assert status == 401 and content["error"]["code"] == "invalid_api_key"
        assert headers["www-authenticate"] == "Bearer"
        assert running.raw("/metrics", key=key)[0] == 401
        assert running.raw("/health", key=key)[0] == 200
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        running.client(key="wrong").models.list()


def test_prompts_and_bodies_that_are_too_large_name_the_limit(running, client):
    with pytest.raises(openai.BadRequestError, match="context of this model is 64 tokens") as told:
        client.chat.completions.create(model="short", messages=user("say " + "yes " * 99))
    assert told.value.code == "context_length_exceeded" and told.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="asks for 60; shorten"):
        client.completions.create(model="short", prompt="say yes, yes", max_tokens=60)
    with pytest.raises(openai.APIStatusError, match="more than 4,096 bytes") as told:
        client.chat.completions.create(model="main", messages=user("a" * BODY))
    assert told.value.status_code == 413
    chunked = iter([b"{" + b" " * BODY, b"}"])
    assert running.raw("/v1/completions", chunked)[0] == 413


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"model": "main", "messages": [{"role": "user", "content": "say a"}]}
TELL = {"model": "main", "prompt": "say a"}


@pytest.mark.parametrize(
    ("path", "body", "status", "words", "param"),
    [
        (CHAT, b"", 400, "is not JSON", None),
        (CHAT, b'{"model": "main"', 400, "is not JSON", None),
        (CHAT, b"\xff\xfe", 400, "is not JSON", None),
        (CHAT, b"[" * 2000 + b"]" * 2000, 400, "nested too deeply", None),
        (CHAT, b'{"model": ' + b"9" * 4000 + b"}", 400, "messages: is missing", "messages"),
        (CHAT, b"[1]", 400, "must be a JSON object, found a list", None),
        (CHAT, b'{"model": "\\ud800"}', 400, "half of a surrogate pair", None),
        (CHAT, {"model": "main"}, 400, "messages: is missing", "messages"),
        (CHAT, {"messages": ASK["messages"]}, 400, "model: is missing", "model"),
        (CHAT, ASK | {"model": 3}, 400, "model: must be text, found a number", "model"),
        (CHAT, ASK | {"model": "gpt"}, 404, "there is no 'gpt'; known: main", "model"),
        (CHAT, ASK | {"messages": []}, 400, "must be a list of messages", "messages"),
        (CHAT, ASK | {"messages": ["a"]}, 400, "messages[0]: must be an object", "messages"),
        (CHAT, ASK | {"messages": [{"role": "x", "content": ""}]}, 400, "role 'x'", "messages"),
        *((CHAT, ASK | {"messages": [message]}, 400, "[0]: needs 'role' and 'content'", "messages")
          for message in ({"role": "user"}, {"content": "a"},
                          {"role": "user", "content": None, "tool_calls": []})),
        (CHAT, ASK | {"messages": [{"role": "user", "content": "a", "tool_call_id": "1"}]}, 400,
         "[0]: only a tool's message has 'tool_call_id'", "messages"),
        (CHAT, ASK | {"messages": [{"role": "user", "content": "a", "audio": 1}]}, 400, "'audio'",
         "messages"),
        (CHAT, ASK | {"messages": [*user("a"), {"role": "assistant", "content": "b"}]}, 400,
         "the last one is of the role 'assistant'", "messages"),
        (CHAT, ASK | {"messages": [*user("a"), {"role": "tool", "content": "b"}]}, 400,
         "or leave it out", None),
        (CHAT, ASK | {"temperature": -1}, 400, "temperature: -1.0 is below 0", "temperature"),
        (CHAT, ASK | {"temperature": "hot"}, 400, "must be a number, found text", "temperature"),
        (CHAT, b'{"messages": [], "temperature": NaN}', 400, "list of messages", "messages"),
        *((CHAT, ASK | {name: 10**400}, 400, f"{name}: has more digits", name) for name in
          ("temperature", "top_p", "min_p", "repetition_penalty", "max_tokens", "n", "seed")),
        (CHAT, ASK | {"top_p": -0.5}, 400, "top_p: -0.5 is below 0", "top_p"),
        (CHAT, ASK | {"n": 0}, 400, "n: 0 is below 1", "n"),
        (CHAT, ASK | {"n": 1.5}, 400, "n: must be a whole number", "n"),
        (CHAT, ASK | {"max_tokens": 0}, 400, "max_tokens: 0 is below 1", "max_tokens"),
        (CHAT, ASK | {"max_tokens": 3, "max_completion_tokens": 4}, 400, "give one of them",
         "max_completion_tokens"),
        (CHAT, ASK | {"stop": ["a", ""]}, 400, "none empty", "stop"),
        (CHAT, ASK | {"stream": 1}, 400, "must be true or false", "stream"),
        (CHAT, ASK | {"stream_options": {}, "seed": 2**70}, 400, "seed: ", "seed"),
        (CHAT, ASK | {"stream_options": {"include_usage": True}}, 400, "needs stream=true",
         "stream_options"),
        (CHAT, ASK | {"stream": True, "stream_options": {"include_usage": "false"}}, 400,
         "values must be true or false", "stream_options"),
        (CHAT, ASK | {"top_logprobs": 2}, 400, "needs logprobs=true", "top_logprobs"),
        (CHAT, ASK | {"logprobs": True, "top_logprobs": 21}, 400, "21 is above 20", "top_logprobs"),
        (CHAT, ASK | {"tools": [{"type": "function"}]}, 400, "tools: only [] can be", "tools"),
        (CHAT, ASK | {"frequency_penalty": 1}, 400, "only 0 can be served", "frequency_penalty"),
        (CHAT, ASK | {"response_format": {"type": "json_object"}}, 400, "response_format: only",
         "response_format"),
        (CHAT, ASK | {"beams": 4}, 400, "beams: there is no such parameter", "beams"),
        (TEXT, TELL | {"prompt": []}, 400, "prompt: must be text, ids", "prompt"),
        (TEXT, TELL | {"prompt": [[1], "a", [True]]}, 400, "prompt: must be text, ids", "prompt"),
        (TEXT, TELL | {"prompt": [9999]}, 400, "ids must be from 0 to 303", "prompt"),
        (TEXT, TELL | {"prompt": [-1]}, 400, "ids must be from 0 to 303", "prompt"),
        (TEXT, TELL | {"max_tokens": 0}, 400, "leaves nothing to tell", "max_tokens"),
        (TEXT, TELL | {"best_of": 3}, 400, "best_of: only n, here 1, can be served", "best_of"),
        (TEXT, TELL | {"messages": []}, 400, "messages: there is no such", "messages"),
        ("/v1/embeddings", TELL, 404, "POST /v1/embeddings: Not Found", None),
        ("/v1/models", TELL, 405, "POST /v1/models: Method Not Allowed", None),
    ],
)  # fmt: skip
def test_bad_requests_get_one_clear_error(running, path, body, status, words, param):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, content, _ = running.raw(path, body)
    assert got == status and content.keys() == {"error"}
    error = content["error"]
    foreign = ("'from'", "data.ignore", " row")  # words for files, which a client has none of
    assert not [word for word in foreign if word in error["message"]]
    assert error.keys() == {"message", "type", "param", "code"} and error["param"] == param
    assert words in error["message"] and error["type"] == "invalid_request_error"


def test_only_json_is_read(running):
    """A page in a browser cannot send that to another site without being allowed to."""
    status, content, _ = running.raw(CHAT, json.dumps(ASK).encode(), kind="text/plain")
    assert status == 415 and "must be application/json" in content["error"]["message"]


def test_what_never_changes_an_answer_is_taken(running):
    labels = {"user": "u", "metadata": {"a": "b"}, "store": False, "seed": None, "tools": []}
    neutral = {"logit_bias": {}, "presence_penalty": 0.0, "response_format": {"type": "text"}}
    status, content, _ = running.raw(CHAT, json.dumps(ASK | labels | neutral).encode())
    assert status == 200 and content["choices"][0]["message"]["content"] == "a"


def test_figures_for_prometheus(running, client):
    client.chat.completions.create(model="main", messages=user("say yes"))
    figures = figures_of(running)
    assert float(figures['medmoe_requests_total{model="main",status="200"}']) >= 1
    assert float(figures['medmoe_said_tokens_total{model="main"}']) >= 2
    assert float(figures['medmoe_prompt_tokens_total{model="main"}']) >= 2
    assert float(figures['medmoe_request_seconds_count{model="main"}']) >= 1
    assert float(figures['medmoe_first_token_seconds_count{model="main"}']) >= 1
    assert figures['medmoe_places{model="main"}'] == "40.0"
    assert figures['medmoe_pending_requests{model="main"}'] == "0.0"


def test_a_second_server_at_the_port_is_told_so(running):
    with pytest.raises(ValueError, match=f"port {running.port}; end it, or give another port"):
        bind("127.0.0.1", running.port)
    with pytest.raises(ValueError, match=r"--host, --port: 192\.0\.2\.1, port 80: "):
        bind("192.0.2.1", 80)  # an address of examples, which no machine has


def test_a_server_without_a_key_is_asked_by_its_own_names_only():
    """Not by a name of somebody's page that points here."""
    from medmoe_jax.serving.app import Guard

    guard = Guard(None, "", ("localhost", "127.0.0.1", "[::1]", "Ward7"))
    for host, let_in in {
        "localhost": True, "localhost:8000": True, "127.0.0.1:80": True, "[::1]:80": True,
        "[::1]": True, "LocalHost:80": True, "ward7": True, "WARD7:1": True,
        "evil.example": False, "evil.example:8000": False, "": False,
    }.items():  # fmt: skip
        scope = {"type": "http", "path": "/v1/models", "headers": [(b"host", host.encode())]}
        assert (guard._refusal(scope) is None) == let_in, host


def test_a_model_that_fails_ends_the_server_and_is_not_hidden():
    """Those who wait are told, health says so, and the fault is raised where the server was."""

    def fail():
        raise RuntimeError("the device is gone")

    one, _ = served("main", 1, 4, before_step=fail)
    bound, ready, ended = bind("127.0.0.1", 0), threading.Event(), []
    server = Server(application([one]), 60.0)

    def serve():
        server.serve_models([one], bound, ready.set)
        ended.append(one.worker.failure)

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(timeout=60)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    client = openai.OpenAI(base_url=url, api_key="x", timeout=60)
    with pytest.raises(openai.InternalServerError, match="the server has failed"):
        client.chat.completions.create(model="main", messages=user("say a"))
    thread.join(timeout=60)
    assert "the device is gone" in str(ended[0])
    with pytest.raises(RuntimeError, match="the device is gone"), contextlib.closing(one.worker):
        pass
