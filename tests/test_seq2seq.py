"""Encoder-decoder models: the task's options, rows and loss, a run of the command line, answers, and B4's count."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from engine.errors import CheckpointError, ConfigError, DataError, ModelError, PromptError
from engine.generation import Sampling
from engine.inspection import adapter_config
from engine.model import PeftModel, get_peft_model
from engine.models.encoder_decoder import load_seq2seq_lm
from engine.seq2seq import positions, write
from engine.tasks import get_task
from engine.tasks.base import Loaded
from engine.tasks.seq2seq import IGNORED, TASK, Pair, Seq2Seq
from engine.train.events import Recorder
from engine.train.job import JobSpec
from engine.train.order import step_rows
from engine.train.worker import run

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("red", "blue", "green", "cat", "dog", "bird", "runs", "sleeps", "sings", "say", "it", ":", "to", "translate")
TARGETS = ["q", "v", "wi_0", "wi_1", "wo"]


class Never:
    def poll(self) -> str | None:
        return None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with gated GELU and random weights, and a tokenizer of whole words, as a plain folder."""
    folder = tmp_path_factory.mktemp("base") / "small-t5"
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(base: Path) -> Loaded:
    return Loaded(*load_seq2seq_lm(str(base), precision="fp32"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The target is the source's words the other way round."""
    rng, path = random.Random(0), tmp_path / "rows.jsonl"
    rows = [[rng.choice(WORDS[:3]), rng.choice(WORDS[3:6]), rng.choice(WORDS[6:9])] for _ in range(80)]
    path.write_text("".join(json.dumps({"source": " ".join(r), "target": " ".join(reversed(r))}) + "\n" for r in rows))
    return path


def job(base: Path, data: Path, adapter: dict[str, Any] | None = None, **training: Any) -> JobSpec:
    settings = {"max_steps": 40, "batch_size": 16, "learning_rate": 2e-2, "precision": "fp32", "max_length": 32}
    return JobSpec.from_dict(
        {
            "model": str(base),
            "task": "seq2seq",
            "options": {"prefix": "say it : ", "beams": 2, "max_new_tokens": 8},
            "data": {"path": str(data), "eval_split": 0.2},
            "adapter": adapter or {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": TARGETS},
            "training": settings | {"eval_every": 1000, "checkpoint_every": 1000} | training,
        }
    )


def gain(spec: JobSpec, out: Path) -> float:
    """How far a run lowers the evaluation loss, in nats per token."""
    recorder = Recorder()
    assert run(spec, out, recorder, Never()) == "done"
    done = recorder.of("done")[0]
    return float(done["first_eval_loss"] - done["eval_loss"])


def test_a_run_learns_and_one_without_a_learning_rate_does_not(base: Path, data: Path, tmp_path: Path) -> None:
    assert gain(job(base, data), tmp_path / "run") > 1.0
    # The smallest rate that a job may have stands for none.
    assert abs(gain(job(base, data, learning_rate=1e-30), tmp_path / "none")) < 0.01


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora"},
        {"method": "dora", "r": 4},
        {"method": "ia3", "target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
        {"method": "prompt_tuning", "num_virtual_tokens": 4, "num_transformer_submodules": 1},
        {"method": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 16, "num_transformer_submodules": 1},
        {"method": "prefix_tuning", "num_virtual_tokens": 4, "num_transformer_submodules": 1},
    ],
    ids=lambda adapter: adapter["method"],
)
def test_every_kind_of_method_trains(base: Path, data: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    assert gain(job(base, data, adapter, max_steps=20), tmp_path / "run") > 0.02


def test_the_loss_is_the_models_own(loaded: Loaded) -> None:
    rows = [Pair((3, 4, 5, 1), (5, 1)), Pair((6, 1), (7, 8, 9, 1))]
    batch = TASK.collator(loaded)(rows)
    assert batch["labels"].tolist() == [[5, 1, IGNORED, IGNORED], [7, 8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[0, 5, 1, 0], [0, 7, 8, 9]]
    with torch.no_grad():
        part = TASK.loss(loaded.model, batch)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        own = loaded.model(**inputs).loss
        alone = [TASK.loss(loaded.model, TASK.collator(loaded)([row])).total for row in rows]
    assert part.count == 6 == TASK.targets(batch)
    assert float(part.total) / 6 == pytest.approx(float(own), abs=1e-5)
    assert float(part.total) == pytest.approx(float(sum(alone)), abs=1e-4)


def test_rows_are_cut_with_their_end_kept_and_empty_ones_left_out(loaded: Loaded, base: Path, data: Path) -> None:
    training = job(base, data, max_length=8).training
    rows = [
        {"source": "cat " * 20, "target": "dog", "line": 1},
        {"source": "cat", "target": " ", "line": 2},
        {"source": "cat", "target": "dog " * 20, "line": 3},
    ]
    encoded = TASK.encode(rows, loaded, training, lambda *told: None)
    assert [(len(row.source), len(row.target)) for row in encoded.rows] == [(8, 2), (2, 8)]
    assert all(row.source[-1] == row.target[-1] == 1 for row in encoded.rows)
    assert "2 of 3 rows" in encoded.notes[0] and "1 rows were left out" in encoded.notes[1]
    with pytest.raises(DataError, match="both a source and a target"):
        TASK.encode(rows[1:2], loaded, training, lambda *told: None)


def test_prefixes() -> None:
    translate = Seq2Seq(prefix="translate {source} to {target}: ", source="English", target="Korean")
    assert translate.asked("a {b}") == "translate English to Korean: a {b}"
    assert Seq2Seq(prefix="summarize: ").asked("x") == "summarize: x"
    assert Seq2Seq(prefix="Say {text} again.").asked("x") == "Say x again."
    assert Seq2Seq(prefix="{{json}} ").asked("x") == "{json} x"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix": "translate {source}: "}, "option source is empty"),
        ({"prefix": "{text.__class__} "}, "text.__class__"),
        ({"prefix": "{0} "}, "{0}"),
        ({"prefix": "{text!r}"}, "nothing but the name"),
        ({"prefix": "{text} {text}"}, "more than once"),
        ({"prefix": "open { "}, "prefix is 'open { '"),
        ({"prefix": 5}, "needed: text"),
        ({"beams": 0}, "1 to 32"),
        ({"beams": True}, "beams is True"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"beam": 4}, "no option 'beam'"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        get_task("seq2seq", options)
    assert words in str(caught.value)


def test_a_decoder_alone_is_refused() -> None:
    with pytest.raises(ModelError, match="no encoder and decoder"):
        load_seq2seq_lm("tiny-llama")


def test_answers(loaded: Loaded) -> None:
    beams = Sampling(max_new_tokens=5, temperature=0, beams=4)
    inputs = loaded.processor("red cat", return_tensors="pt", return_token_type_ids=False)
    out = loaded.model.generate(**inputs, num_beams=4, max_new_tokens=5, do_sample=False)
    plain = loaded.processor.decode(out[0], skip_special_tokens=True).strip()
    assert write(loaded.model, loaded.processor, "red cat", beams)[0] == plain
    drawn = [
        write(loaded.model, loaded.processor, "red cat", Sampling(12, temperature=2, top_p=1, seed=seed))[0]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(PromptError, match="empty"):
        write(loaded.model, loaded.processor, "  ", beams)


def test_positions() -> None:
    assert positions(T5Config()) is None
    assert positions(BartConfig(max_position_embeddings=77)) == 77


def test_rows_of_like_length_stand_together() -> None:
    rows = [random.Random(i).randrange(1, 100) for i in range(203)]

    def steps(first: int, count: int) -> list[list[int]]:
        stream = step_rows(rows, 8, 3, first, lambda row: row)
        return [next(stream) for _ in range(count)]

    epoch = steps(0, 26)
    assert sorted(row for step in epoch for row in step) == sorted(rows)
    assert sum(max(step) - min(step) for step in epoch) / 26 < 20
    assert steps(7, 30) == steps(0, 37)[7:]
    whole = [step[0] for step in epoch[:16]]
    assert whole != sorted(whole)


def test_the_command_line_trains_and_generates(base: Path, data: Path, tmp_path: Path) -> None:
    job(base, data, max_steps=60).save(tmp_path / "job.yaml")

    def engine(*argv: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "engine", *argv, "--json"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    engine("train", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run"))
    folder = str(tmp_path / "run" / "adapter")
    asked = ["--prompt", "say it : red cat runs", "--max-new-tokens", "8"]
    said = engine("generate", "--model", str(base), "--adapter", folder, *asked)
    assert [result["who"] for result in said] == ["base", "adapter"]
    assert said[0]["text"] != said[1]["text"]
    # The adapter knows what stood before each source, so a prompt may come without it.
    bare = engine("generate", "--model", str(base), "--adapter", folder, "--prompt", "red cat runs", *asked[2:])
    assert [result["text"] for result in bare] == [result["text"] for result in said]
    (tmp_path / "run" / "adapter" / "prefix.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"prefix\.json"):
        TASK.restored(tmp_path / "run" / "adapter")
    # The base of random weights ends nowhere near an answer; three words of the right kinds are learned.
    assert len(said[1]["text"].split()) == 3 and said[1]["reason"] == "stop"
    model, tokenizer = load_seq2seq_lm(str(base), precision="fp32")
    tuned = PeftModel.from_pretrained(model, folder)
    how = Sampling(max_new_tokens=8, temperature=0)
    assert write(tuned, tokenizer, "say it : red cat runs", how)[0] == said[1]["text"]
    assert write(tuned, tokenizer, "say it : red cat runs", how, None)[0] == said[0]["text"]


def test_flan_t5_large_by_its_config() -> None:
    """B4 on the architecture of google/flan-t5-large: d_model 1024, d_ff 2816, d_kv 64, 16 heads, 24 + 24 layers.

    q and v of 24 + 2 * 24 attentions, 16 * (1024 + 1024) each; three matrices of 48 feed-forwards, 16 * (1024 + 2816).
    """
    config = T5Config(
        vocab_size=32128, d_model=1024, d_ff=2816, d_kv=64, num_heads=16, num_layers=24,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    recipe = {"method": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": TARGETS}
    tuned = get_peft_model(model, adapter_config(recipe, TASK.task_type))
    trainable, _ = tuned.get_nb_trainable_parameters()
    assert trainable == 72 * 2 * 16 * 2048 + 48 * 3 * 16 * 3840 == 13_565_952
