"""lm-evaluation-harness on one model twice: through us, and through its own `hf` model type."""

import json
import shlex
import shutil
import sys

import numpy as np
import pytest
import tokenizers as hf

from medmoe_jax.api.opening import open_model
from medmoe_jax.checkpoints.huggingface import save_hf
from medmoe_jax.cli.main import main
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import recipe
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from tests import naive, tiny
from tests.data.test_tokenizer_parity import CHATML_TEMPLATE

pytestmark = pytest.mark.parity
lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("torch", exc_type=ImportError)

QUESTIONS = [
    {"question": f"What is {drug} for?", "choices": [use, "fever", f"{use} and sleep"], "answer": 0}
    for drug, use in zip(tiny.DRUGS, tiny.USES, strict=True)
]
COMMON = (
    "dataset_path: json\ntest_split: test\nfewshot_split: train\ndataset_kwargs:\n  data_files:\n"
)
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_free": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{% for n in range(9) %}{{question}} {{choices}} {% endfor %}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder: a tiny Llama, a byte-level vocabulary that writes bos, chatml."""
    folder = tmp_path_factory.mktemp("base")
    # As many rows as ids: `hf` gives rows of padding a probability, and we do not.
    decoder = tiny.DECODER.replace(vocab_size=300, max_positions=256)
    save_hf(folder, decoder, naive.random_params(decoder), "llama")
    vocabulary = hf.Tokenizer(hf.models.BPE())
    vocabulary.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = hf.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    vocabulary.train_from_iterator([json.dumps(q) for q in QUESTIONS], trainer)
    vocabulary.post_processor = hf.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    assert vocabulary.get_vocab_size() == 300
    vocabulary.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": CHATML_TEMPLATE})
    )
    return folder


@pytest.fixture(scope="module")
def ours(base):
    """The model of that folder, for lm-evaluation-harness."""
    from medmoe_jax.evaluation.harness import Harness

    config = recipe()
    config.base.path, config.data.template, config.data.length = str(base), "tokenizer", 64
    config.run.score_batch = 8
    return Harness(open_model(Run(open_setup(config), ""), "base"))


@pytest.fixture(scope="module")
def theirs(base):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(base), device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """The tasks, in files as users write them."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny.write_rows(folder / "test.jsonl", QUESTIONS[:5])
    tiny.write_rows(folder / "train.jsonl", QUESTIONS[5:])
    files = "".join(f"    {split}: {folder}/{split}.jsonl\n" for split in ("test", "train"))
    for name, text in TASKS.items():
        cache = f"  cache_dir: {folder}/cache\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{files}{cache}{text.lstrip()}")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def said(model, manager, tasks, **options):
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options
    )
    return found["samples"], found["results"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": True},
    ],
    ids=["plain", "turns"],
)
def test_every_item_is_scored_as_by_its_own_model(ours, theirs, manager, options):
    """Requests and answers item by item; the greedy ones are among both kinds."""
    tasks = [name for name in TASKS if not options or name != "tiny_rolling"]
    (mine, own), (right, other) = (said(m, manager, tasks, **options) for m in (ours, theirs))
    for task in tasks:
        pairs = list(zip(mine[task], right[task], strict=True))
        assert len(pairs) == 5
        for one, two in pairs:
            assert one["arguments"] == two["arguments"]
            for (a,), (b,) in zip(one["resps"], two["resps"], strict=True):
                if task == "tiny_choice":
                    np.testing.assert_allclose(a[0], b[0], rtol=1e-4)
                    assert a[1] == b[1]
                elif task == "tiny_rolling":
                    np.testing.assert_allclose(a, b, rtol=1e-4)
                else:
                    assert a == b
        for name, value in other[task].items():
            if isinstance(value, float):
                np.testing.assert_allclose(own[task][name], value, rtol=1e-4, err_msg=name)


PUBLISHED = {
    "GBaker/MedQA-USMLE-4-options-hf": ("test", "train"),
    "openlifescienceai/medmcqa": ("validation", "train"),
    "bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source": ("test", "train"),
    "cais/mmlu/anatomy": ("test", "dev"),
}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """What `datasets` makes of files stays with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(tmp_path, cached):
    """A folder with rows of our own for each of the published tasks, as the hub has them."""
    folder = tmp_path / "hub"
    for place, splits in PUBLISHED.items():
        for split in splits:
            rows = [published_row(f"{split} {n}", n % 3) for n in range(3)]
            (folder / place).mkdir(parents=True, exist_ok=True)
            tiny.write_rows(folder / place / f"{split}.jsonl", rows)
    (folder / "bigbio/pubmed_qa/dataset_infos.json").write_text("{}")
    return folder


def published_row(name, answer):
    """A question with the fields of all four."""
    drugs = [f"{drug} {name}" for drug in tiny.DRUGS[:4]]
    return {
        "sent1": f"What helps {name}?",
        **{f"ending{n}": drug for n, drug in enumerate(drugs)},
        "label": answer,
        "question": f"Which drug, {name}? ",
        **{f"op{letter}": drug for letter, drug in zip("abcd", drugs, strict=True)},
        "cop": answer,
        "choices": drugs,
        "answer": answer,
        "CONTEXTS": [f"{name} was seen.", "Some slept."],
        "QUESTION": f"Did {name} help?",
        "final_decision": ("yes", "no", "maybe")[answer],
    }


def assert_equal_items(ours, theirs, tasks, data, items, **options):
    from benchmarks.harness import compared, samples

    (mine, own), (right, other) = (samples(m, tasks, data, **options) for m in (ours, theirs))
    for task, row in compared(mine, right).items():
        assert row["items"] == items and row["requests"] == items * (3 + (task != "pubmedqa"))
        assert row["largest relative difference"] < 1e-4, task
        assert row["other greedy flags"] == row["other scores"] == 0, task
        assert own[task]["acc,none"] == other[task]["acc,none"]
    return right


def test_published_medical_tasks_on_files_of_a_folder(ours, theirs, hub):
    """Their own prompts, item by item, and no word with the hub."""
    tasks = ["medqa_4options", "medmcqa", "pubmedqa", "mmlu_anatomy"]
    items = assert_equal_items(ours, theirs, tasks, hub, 3, num_fewshot=1)
    asked = {task: items[task][0]["arguments"][0][0] for task in tasks}
    drug = tiny.DRUGS[0]
    assert asked["mmlu_anatomy"].startswith("The following are multiple choice questions")
    assert f"Which drug, dev 0?\nA. {drug} dev 0\n" in asked["mmlu_anatomy"]
    assert f"Question: What helps test 0?\nA. {drug} test 0\n" in asked["medqa_4options"]
    assert f"Which drug, validation 0? \nChoices:\nA. {drug} validation 0" in asked["medmcqa"]
    text = "Abstract: test 0 was seen.\nSome slept.\nQuestion: Did test 0 help?\nAnswer:"
    assert asked["pubmedqa"].endswith(text)


@pytest.mark.data
@pytest.mark.slow
def test_published_medical_tasks_on_real_questions(ours, theirs, tmp_path, cached, data_dir):
    from benchmarks.harness import write_sets

    tasks = write_sets(tmp_path / "hub", 8, data_dir)
    assert len(tasks) == 9
    assert_equal_items(ours, theirs, tasks, tmp_path / "hub", 8)


def test_what_the_folder_lacks_is_named(hub):
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    from medmoe_jax.evaluation.published import from_folder

    tasks = TaskManager(include_path=f"{lm_eval.__path__[0]}/tasks/medqa", include_defaults=False)

    def opened(root=hub):
        with from_folder(root):
            return tasks.load(["medqa_4options"])

    place = hub / "GBaker/MedQA-USMLE-4-options-hf"
    (place / "dev.csv").write_text("a,b\n")  # of no split that the task reads
    before = ConfigurableTask.download
    assert opened()["tasks"]["medqa_4options"].dataset.keys() == {"test", "train"}
    assert ConfigurableTask.download is before
    (place / "test-00001.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="MedQA-USMLE-4-options-hf has csv and json files"):
        opened()
    (place / "test-00001.csv").unlink()
    (place / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"medqa_4options reads GBaker/.*no file of its split 'tra"):
        opened()
    shutil.rmtree(place)
    with pytest.raises(UserError, match=r"no folder .* get it by `hf download ") as caught:
        opened(hub / "my sets")
    command = shlex.split(str(caught.value).split("`")[1])
    name = "GBaker/MedQA-USMLE-4-options-hf"
    place = hub / "my sets" / name
    assert command[2:] == [name, "--repo-type=dataset", f"--local-dir={place}"]
    assert ConfigurableTask.download is before


def request(*arguments, kind="loglikelihood"):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def test_ids_and_greedy_answers(ours, theirs):
    """What is greedy is what generation gives, whatever ends a turn and whatever stands beside."""
    texts = ["What is", " leading", "<s>x", "a<|im_end|>b ", "发热", ""]
    for text in texts:
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), text
    pairs = [("What is ", "aspirin for?"), ("", "fever"), ("x" * 500, " sleep"), ("What", " is")]
    mine, right = (m.loglikelihood([request(*p) for p in pairs]) for m in (ours, theirs))
    np.testing.assert_allclose(*([one[0] for one in found] for found in (mine, right)), rtol=1e-4)
    greedy = ours._model.engine.generate([ours.tok_encode("What is")], 3, [-1])[0]
    ask = [(None, ours.tok_encode("What is"), ids) for ids in (greedy[:3], [*greedy[:2], 7], [9])]
    flags = [[flag for _, flag in m._loglikelihood_tokens(ask)] for m in (ours, theirs)]
    assert flags[0] == flags[1] == [True, greedy[2] == 7, greedy[0] == 9]
    talk = [{"role": "user", "content": "a <s>"}, {"role": "assistant", "content": "So: "}]
    for asks in (True, False):
        turns = talk[:1] if asks else talk
        assert ours.apply_chat_template(turns, asks) == theirs.apply_chat_template(turns, asks)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "repetition_penalty": 1.5, "top_p": 0},
        {"do_sample": True, "temperature": 0.7, "top_k": 1, "repetition_penalty": 1.5},
        {"do_sample": True, "temperature": 0.7, "min_p": 1.0, "top_p": 0.9},
        {"num_beams": 1},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_settings_of_a_draw_are_taken(ours, theirs, settings):
    """They leave one token to draw, so that both draw it."""
    asked = [request("What is", settings | {"max_gen_toks": 12}, kind="generate_until")]
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_no_stop_is_none(ours):
    said = []
    for until in ({}, {"until": None}, {"until": [None]}, {"until": []}):
        asked = request("What is", {"max_gen_toks": 12, **until}, kind="generate_until")
        said.append(ours.generate_until([asked]))
    assert said[0][0] and said[1:] == said[:1] * 3


def test_what_is_longer_than_the_context_is_cut_as_by_its_own_model(ours, theirs):
    """Their context is as long as ours, and so are the windows of a text that is longer."""
    assert ours.max_length == theirs.max_length == 256
    text = " ".join(f"{drug} {use}" for drug, use in zip(tiny.DRUGS, tiny.USES, strict=True)) * 9
    ids = ours.tok_encode(text)
    exact = ours._tokenizer.decode(ids[1:257])
    assert len(ids) > 600 and len(ours.tok_encode(exact)) == 257
    for kind, asked in {
        "loglikelihood": [(text, " sleep"), (text, text[:200]), (exact, " fever and sleep")],
        "loglikelihood_rolling": [(text,), (exact,), (exact + "a",), (exact[:-1],)],
        "generate_until": [(text, {"max_gen_toks": 12, "until": []})],
    }.items():
        mine, right = (
            getattr(m, kind)([request(*args, kind=kind) for args in asked]) for m in (ours, theirs)
        )
        if kind == "generate_until":
            assert mine == right
        else:
            np.testing.assert_allclose(mine, right, rtol=1e-4)


def test_a_draw_without_its_bounds_is_another(ours):
    """So that the test above would see a bound that is lost."""
    wide = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 12}
    said = [
        ours.generate_until([request("What is", wide | more, kind="generate_until")])
        for more in ({}, {"top_k": 1}, {"top_k": 1, "repetition_penalty": 1.5})
    ]
    assert len({text for (text,) in said}) == 3


def test_the_command_fills_in_the_model(base, monkeypatch, capsys):
    from lm_eval.api.registry import get_model
    from lm_eval.api.task import ConfigurableTask

    given = []
    methods = []

    def called():
        given.append(sys.argv)
        methods.append(ConfigurableTask.download)

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", called)
    config = ["--config=base_only", f"--config.base.path={base}"]
    asked = ["--tasks", "x", "--limit", "2"]
    before = sys.argv
    assert main(["lm-eval", *config, "--stage=base", "run", *asked]) == 0
    assert given == [["lm-eval", "run", "--model", "medmoe", *asked]] and sys.argv is before
    monkeypatch.setattr("medmoe_jax.evaluation.harness.register", lambda model: None)
    data = f"--data={base}"
    assert main(["lm-eval", *config, "--stage=base", data, "run", *asked]) == 0
    assert given[1] == given[0] and methods[0] is ConfigurableTask.download is not methods[1]
    model = get_model("medmoe").create_from_arg_obj({}, {"batch_size": 1, "device": None})
    assert model.loglikelihood([request("What", " is")])[0][0] < 0
    capsys.readouterr()
    for more, told in (
        (["run"], "say what to run"),
        (asked, "say what to run"),
        (["run", "--model", "hf"], "--model: the model is that of --config"),
        (["run", "-M", "hf"], "-M: the model is that of --config"),
        (["--data=nowhere", "run", *asked], "--data: no folder nowhere"),
    ):
        assert main(["lm-eval", *config, *more]) == 1
        assert told in capsys.readouterr().err


def test_what_it_cannot_do_is_refused(ours):
    long, odd = {"max_gen_toks": 500}, {"until": [], "num_beams": 2}
    with pytest.raises(UserError, match="500 new tokens do not fit a context of 256"):
        ours.generate_until([request("x", long, kind="generate_until")])
    with pytest.raises(UserError, match="gen_kwargs: num_beams is none of"):
        ours.generate_until([request("x", odd, kind="generate_until")])
