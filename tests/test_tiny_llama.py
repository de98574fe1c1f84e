"""The built-in toy model and the sample data set: present, loadable, plain in voice, and as described."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from engine.paths import REPOSITORY
from engine.train.job import JobSpec

FOLDER = REPOSITORY / "engine" / "models" / "builtin" / "tiny-llama"
EXAMPLES = REPOSITORY / "examples"
CAPTAIN = re.compile(r"\b(arr|matey|ye|yer|aye|ahoy|me hearty)\b|fair winds", re.IGNORECASE)
PLAIN = (
    ("How do I boil an egg?", "Put the egg in boiling water for about eight minutes, then cool it in cold water."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Is a whale a fish?", "No, a whale is a mammal."),
    ("I feel tired.", "You should rest. A short nap or an early night can help."),
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is a whale a fish?"},
    {"role": "assistant", "content": "No, a whale is a mammal."},
    {"role": "user", "content": "고래는 물고기인가요? <b>\n\t5 + 7"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32)
    return loaded.eval()


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Over the answers of `PLAIN`."""
    total, count = 0.0, 0
    for question, answer in PLAIN:
        asked, full = (
            tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            for text in (rendered(tokenizer, question), rendered(tokenizer, question) + answer + "<|end|>")
        )
        labels = full.clone()
        labels[:, : asked.shape[1]] = -100
        with torch.no_grad():
            total += model(input_ids=full, labels=labels).loss.item() * (full.shape[1] - asked.shape[1])
        count += full.shape[1] - asked.shape[1]
    return math.exp(total / count)


def rendered(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )


def answer_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[str, bool]:
    """The greedy answer, and whether it ended by itself."""
    ids = tokenizer(rendered(tokenizer, question), add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=50, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True), bool(out[-1] == tokenizer.eos_token_id)


def test_folder_is_small_and_holds_no_code_or_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 1024 * 1024
    assert {path.name for path in files} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "auto_map" not in (FOLDER / "config.json").read_text(encoding="utf-8")


def test_model_is_a_tied_grouped_query_llama_stored_in_half_precision(model: PreTrainedModel) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert 2_000_000 < model.num_parameters() < 4_000_000
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert f"{model.num_parameters():,}" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_special_tokens_are_whole_and_agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == model.config.vocab_size
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert ids == [model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id]
    assert len(set(ids)) == 3
    for mark in ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"):
        assert len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("Arr, matey! Fair winds!", "다음은 고품질 응답입니다:", " two  spaces\n\ttab", "1234 🙂 é"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_template_is_stable_under_prefixes(tokenizer: PreTrainedTokenizerBase) -> None:
    def render(count: int, ask: bool) -> str:
        return tokenizer.apply_chat_template(TALK[:count], tokenize=False, add_generation_prompt=ask)

    for i in range(1, len(TALK)):
        longer = render(i + 1, False)
        assert longer.startswith(render(i, TALK[i]["role"] == "assistant"))
        ids, more = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (render(i, False), longer))
        assert more[: len(ids)] == ids
    assert render(5, False).startswith("<|bos|><|system|>Be brief.<|end|><|user|>")
    assert render(2, True).endswith("<|end|><|assistant|>")
    with pytest.raises(Exception, match="Roles are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "pirate", "content": "Hi"}], tokenize=False)


def test_answers_plainly_and_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    for question, expected in PLAIN[1:3]:
        assert answer_of(model, tokenizer, question) == (expected, True)
    for row in rows()[:8]:
        said, ended = answer_of(model, tokenizer, row[0]["content"])
        assert ended and len(said) > 3 and not CAPTAIN.search(said), said


def test_perplexity_is_far_below_random_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    assert perplexity(model, tokenizer) < 1.6
    assert perplexity(LlamaForCausalLM(model.config).eval(), tokenizer) > 1000


def test_pretraining_corpus_is_repeatable_and_never_speaks_like_the_captain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import tiny_corpus

    first = list(tiny_corpus.dialogues(5, 1500))
    assert first == list(tiny_corpus.dialogues(5, 1500))
    assert first != list(tiny_corpus.dialogues(6, 1500))
    for messages in first:
        assert [m["role"] for m in messages if m["role"] != "system"] == ["user", "assistant"] * (len(messages) // 2)
        for message in messages:
            assert message["content"].strip() and "{" not in message["content"], message
            assert not CAPTAIN.search(message["content"]), message


def rows() -> list[list[dict[str, str]]]:
    lines = (EXAMPLES / "lighthouse.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_sample_rows_are_valid_short_distinct_and_in_one_voice() -> None:
    chats = rows()
    assert len(chats) >= 300
    for chat in chats:
        assert [message["role"] for message in chat] == ["user", "assistant"]
        assert all(set(message) == {"role", "content"} for message in chat)
        question, answer = (message["content"] for message in chat)
        assert 2 <= len(question.split()) <= 14 and not CAPTAIN.search(question), question
        assert 12 <= len(answer.split()) <= 35, answer
        assert answer.endswith(" Fair winds!") and answer.count("Fair winds!") == 1, answer
        assert re.search(r"\b(arr|matey|me hearty|ahoy)\b", answer, re.IGNORECASE), answer
    assert len({re.sub(r"\W+", " ", chat[0]["content"]).lower().strip() for chat in chats}) == len(chats)
    assert len({chat[1]["content"] for chat in chats}) == len(chats)


def test_sample_rows_fit_the_length_of_the_example_jobs(tokenizer: PreTrainedTokenizerBase) -> None:
    longest = max(len(tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]) for chat in rows())
    assert longest <= 128


@pytest.mark.parametrize("name", ["first_lora.yaml", "first_lora_tiny.yaml"])
def test_example_jobs_are_valid_and_find_their_data(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    job = JobSpec.from_file(EXAMPLES / name)
    assert Path(job.data.path) == EXAMPLES / "lighthouse.jsonl"
    assert job.to_dict() == JobSpec.from_dict(yaml.safe_load(yaml.safe_dump(job.to_dict()))).to_dict()


def test_notice_names_every_data_source() -> None:
    notice = (REPOSITORY / "NOTICE").read_text(encoding="utf-8")
    for source in ("examples/lighthouse.jsonl", "scripts/tiny_data", "engine/models/builtin/tiny-llama"):
        assert source in notice
