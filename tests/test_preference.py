"""Preference tuning: its losses against TRL and by formula, its reference, and what a run changes on held-out pairs."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import LoraConfig, PromptTuningConfig, get_peft_model
from engine.data import NotTakenError, load
from engine.errors import ConfigError, DataError
from engine.models.loading import load_causal_lm
from engine.paths import REPOSITORY
from engine.tasks import get_task
from engine.tasks.base import Loaded
from engine.tasks.preference import Pair, Preference, log_probs
from engine.tasks.sequences import pad_rows
from engine.train.events import Recorder
from engine.train.job import JobSpec, TrainingSpec
from engine.train.worker import run
from studio import presets

SAMPLE = REPOSITORY / "examples" / "captain_preferences.jsonl"
DPO = Preference()


class Never:
    def poll(self) -> str | None:
        return None


class At:
    """Asks for one thing once, at the given poll."""

    def __init__(self, poll: int, what: str) -> None:
        self.left, self.what = poll, what

    def poll(self) -> str | None:
        self.left -= 1
        return self.what if self.left == 0 else None


def quiet(phase: str, fraction: float | None, message: str) -> None:
    pass


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(*load_causal_lm("tiny-llama", precision="fp32"))


def numbers(count: int = 7, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed log-probabilities of the model and of the reference, and lengths, (count, 2) each."""
    chance = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 30, (count, 2), generator=chance)
    sums, reference = (-lengths * (0.2 + 3 * torch.rand((count, 2), generator=chance)) for _ in range(2))
    return sums.to(dtype), reference.to(dtype), lengths


# --- the losses ----------------------------------------------------------------------------------------------------


def by_formula(task: Preference, c: float, r: float, c0: float, r0: float, nc: int, nr: int) -> float:
    """One pair in Python's float64, from the papers."""
    if task.loss_kind == "orpo":

        def odds(mean: float) -> float:
            return math.exp(mean) / (1 - math.exp(mean))

        return -c / nc - task.beta * math.log(1 / (1 + odds(r / nr) / odds(c / nc)))
    if task.loss_kind == "ipo":
        return float((((c - c0) / nc - (r - r0) / nr) - 1 / (2 * task.beta)) ** 2)
    better = 1 / (1 + math.exp(-task.beta * ((c - c0) - (r - r0))))
    return -(1 - task.label_smoothing) * math.log(better) - task.label_smoothing * math.log(1 - better)


@pytest.mark.parametrize(
    "task", [DPO, Preference("dpo", 0.3, 0.2), Preference("ipo", 0.4), Preference("orpo", 0.7)], ids=str
)
def test_losses_by_formula(task: Preference) -> None:
    sums, reference, lengths = numbers()
    losses, rewards = task.pair_losses(sums, reference, lengths)
    for number in range(len(sums)):
        c, r = sums[number].tolist()
        c0, r0 = reference[number].tolist()
        assert float(losses[number]) == pytest.approx(
            by_formula(task, c, r, c0, r0, *lengths[number].tolist()), abs=1e-5
        )
        if task.loss_kind != "orpo":
            assert rewards[number].tolist() == pytest.approx([task.beta * (c - c0), task.beta * (r - r0)], abs=1e-5)


def trl_dpo_loss(kind: str, beta: float, c: Any, r: Any, c0: Any, r0: Any, nc: int, nr: int) -> float:
    """What TRL's trainer makes of these sums: its own method, with a model that answers with them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer
    width = max(nc, nr) + 1
    each = torch.zeros(2, width - 1, dtype=torch.float64)
    mask = torch.zeros(2, width, dtype=torch.long)
    for row, (total, length) in enumerate(((c, nc), (r, nr))):
        each[row, :length] = total / length
        mask[row, 1 : length + 1] = 1
    zeros = torch.zeros(2, width - 1)

    def model(**inputs: Any) -> Any:
        return SimpleNamespace(log_probs=each, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def same(value: Any) -> Any:
        return value

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=0.0,
        use_weighting=False, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones(2, width, dtype=torch.long),
        "attention_mask": torch.ones(2, width, dtype=torch.long),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor([c0], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor([r0], dtype=torch.float64),
    }
    return float(DPOTrainer._compute_loss(trainer, model, inputs, False))


@pytest.mark.parametrize(
    ("kind", "theirs", "beta"), [("dpo", "sigmoid", 0.1), ("dpo", "sigmoid", 0.5), ("ipo", "ipo", 0.3)]
)
def test_losses_as_trl_computes_them(kind: str, theirs: str, beta: float) -> None:
    sums, reference, lengths = numbers()
    losses, _ = Preference(kind, beta).pair_losses(sums, reference, lengths)
    for number, loss in enumerate(losses.tolist()):
        args = (*sums[number].tolist(), *reference[number].tolist(), *lengths[number].tolist())
        assert loss == pytest.approx(trl_dpo_loss(theirs, beta, *args), abs=1e-5)


def test_the_odds_ratio_as_trl_computes_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOTrainer
    sums, reference, lengths = numbers()
    means = (sums / lengths).double()
    trainer = SimpleNamespace(beta=0.6, accelerator=SimpleNamespace(device=torch.device("cpu")))
    ratio = ORPOTrainer.odds_ratio_loss(trainer, means[:, 0], means[:, 1])[0]
    losses, _ = Preference("orpo", 0.6).pair_losses(sums, reference, lengths)
    assert (losses - (-means[:, 0] - ratio)).abs().max() < 1e-5


def test_an_answer_that_is_certain_gives_no_infinity_by_rounding() -> None:
    losses, _ = Preference("orpo").pair_losses(torch.tensor([[-1e-6, -8.0]]), torch.zeros(1, 2), torch.tensor([[4, 4]]))
    assert losses.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "ppo"}, "options.loss is 'ppo'"),
        ({"beta": 0}, "options.beta"),
        ({"beta": "strong"}, "options.beta"),
        ({"label_smoothing": 0.5}, "options.label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "only dpo"),
        ({"loss_kind": "dpo"}, "no option 'loss_kind'"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        get_task("preference", options)
    assert get_task("preference", {"loss": "ipo", "beta": 0.3}) == Preference("ipo", 0.3)


# --- rows and batches ----------------------------------------------------------------------------------------------


def encode(loaded: Loaded, examples: list[dict[str, Any]], task: Preference = DPO, **training: Any) -> Any:
    return task.encode(examples, loaded, TrainingSpec(batch_size=3, **training), quiet)


def pair_of(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected, "line": 1}


def test_log_probabilities_are_of_the_answers_alone(loaded: Loaded) -> None:
    """Against one plain forward pass a sequence, whose last tokens are the answer's."""
    examples = load(SAMPLE).examples[:5]
    rows = encode(loaded, examples).rows
    batch = DPO.collator(loaded)(rows)
    assert DPO.targets(batch) == 5 and "attention_mask" not in batch
    with torch.no_grad():
        found = log_probs(loaded.model, batch)
    for row, pair, example in zip(found, rows, examples, strict=True):
        for value, tokens, role in zip(row, (pair.chosen, pair.rejected), ("chosen", "rejected"), strict=True):
            words = loaded.processor.decode([i for i, keep in zip(tokens.ids, tokens.learned, strict=True) if keep])
            assert example[role] in words and example["prompt"][0]["content"] not in words
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([tokens.ids])).logits[0].double().log_softmax(-1)
            places = [n for n, keep in enumerate(tokens.learned) if keep]
            assert float(value) == pytest.approx(sum(float(logits[n - 1, tokens.ids[n]]) for n in places), abs=1e-3)


def test_only_the_last_answer_counts(loaded: Loaded) -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    (row,) = encode(loaded, [{"prompt": turns, "chosen": "yes", "rejected": "no", "line": 1}]).rows
    words = loaded.processor.decode([i for i, keep in zip(row.chosen.ids, row.chosen.learned, strict=True) if keep])
    assert "yes" in words and "assistant" not in words.split("<")[0]


def test_packed_pairs_are_the_padded_pairs(loaded: Loaded) -> None:
    rows = encode(loaded, load(SAMPLE).examples[:4]).rows
    packed = DPO.collator(loaded)(rows)
    answers = [tokens for pair in rows for tokens in (pair.chosen, pair.rejected)]
    padded = {**packed, **pad_rows(answers, loaded.processor.pad_token_id)}
    del padded["position_ids"]
    with torch.no_grad():
        assert (log_probs(loaded.model, packed) - log_probs(loaded.model, padded)).abs().max() < 1e-3


def test_pairs_that_say_nothing_are_left_out_and_counted(loaded: Loaded) -> None:
    long = "word " * 200
    examples = [pair_of("Hi?", "Yes.", "No."), pair_of(long, "Yes.", "No."), pair_of("Hi?", long + "a", long + "b")]
    encoded = encode(loaded, examples, max_length=64)
    assert len(encoded.rows) == 1
    assert [note.split(" ")[0] for note in encoded.notes] == ["2", "1", "1"]
    assert "both answers are the same" in encoded.notes[2]
    with pytest.raises(DataError, match="two different answers"):
        encode(loaded, examples[1:], max_length=64)
    with pytest.raises(ConfigError, match="loss_on"):
        encode(loaded, examples, loss_on="all")


# --- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=4, target_modules="all-linear"), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")],
)
def test_the_reference_is_the_base_whatever_the_adapter_says(config: Any) -> None:
    base, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    examples = load(SAMPLE).examples[:5]
    alone = [pair.reference for pair in encode(Loaded(base, tokenizer), examples).rows]
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.adapter_parameters().values():
            parameter.normal_(std=0.1)
    model.train()
    rows = encode(Loaded(model, tokenizer), examples).rows
    assert model.training
    assert torch.tensor([pair.reference for pair in rows]).allclose(torch.tensor(alone), atol=1e-3)
    with torch.no_grad():
        changed = log_probs(model.eval(), DPO.collator(Loaded(model, tokenizer))(rows))
    assert (changed - torch.tensor(alone)).abs().max() > 0.1


def test_the_reference_is_computed_once_a_base_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    here, examples = Loaded(base, tokenizer, tmp_path / "cache"), load(SAMPLE).examples[:5]
    calls: list[int] = []
    plain = Preference._reference

    def counted(self: Preference, pairs: list[Pair], *rest: Any) -> Any:
        calls.append(len(pairs))
        return plain(self, pairs, *rest)

    monkeypatch.setattr(Preference, "_reference", counted)
    first = encode(here, examples).rows
    assert encode(here, examples).rows == first and calls == [5]
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    assert encode(here, examples).rows == first and calls == [5], "an adapter is no other base"
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"damaged")
    assert encode(here, examples).rows == first and calls == [5, 5]
    encode(here, examples[:4])
    assert calls == [5, 5, 4]
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.1)
    assert encode(here, examples).rows != first and calls == [5, 5, 4, 5]
    encode(here, examples, Preference("orpo"))
    assert calls == [5, 5, 4, 5]


# --- runs ----------------------------------------------------------------------------------------------------------


def job(path: Path = SAMPLE, options: dict[str, Any] | None = None, **training: Any) -> JobSpec:
    usual = {"max_steps": 12, "batch_size": 4, "learning_rate": 2e-3, "precision": "fp32", "max_length": 128,
             "eval_every": 100, "checkpoint_every": 100}  # fmt: skip
    return JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "task": "preference",
            "options": options or {},
            "data": {"path": str(path), "eval_split": 0.1},
            "adapter": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            "training": usual | training,
        }
    )


def train(spec: JobSpec, out: Path, control: Any = None, resume: bool = False) -> Recorder:
    recorder = Recorder()
    run(spec, out, recorder, control or Never(), resume)
    return recorder


def metrics(recorder: Recorder) -> tuple[dict[str, float], dict[str, float]]:
    """Of the held-out pairs, before and after."""
    found = [event["metrics"] for event in recorder.of("eval")]
    return found[0], found[-1]


@pytest.mark.parametrize(
    "options", [{}, {"loss": "ipo", "beta": 0.5}, {"loss": "dpo", "label_smoothing": 0.1}], ids=str
)
def test_the_margin_grows_on_held_out_pairs(tmp_path: Path, options: dict[str, Any]) -> None:
    recorder = train(job(options=options), tmp_path / "run")
    before, after = metrics(recorder)
    assert abs(before["margin"]) < 1e-3, "the adapter starts as the reference"
    assert after["margin"] > 0.5 and after["accuracy"] > 0.9
    assert after["margin"] == pytest.approx(after["reward_chosen"] - after["reward_rejected"], abs=1e-4)
    done = recorder.of("done")[0]
    assert done["eval_loss"] < 0.8 * done["first_eval_loss"]
    if not options:
        assert done["first_eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_without_a_learning_rate_the_margin_stays(tmp_path: Path) -> None:
    """The counterpart of the test above: its thresholds are not reached by accident."""
    before, after = metrics(train(job(learning_rate=1e-12), tmp_path / "run"))
    assert abs(after["margin"] - before["margin"]) < 1e-3


def test_without_a_reference_the_margin_grows_too(tmp_path: Path) -> None:
    recorder = train(job(options={"loss": "orpo", "beta": 0.5}), tmp_path / "run")
    before, after = metrics(recorder)
    assert after["margin"] > before["margin"] + 0.3
    assert not (tmp_path / "run" / "cache").exists()


def test_a_resumed_run_takes_the_reference_that_is_there(tmp_path: Path) -> None:
    spec = job(max_steps=6, eval_every=3, sample_prompts=["How do I cook rice?"])
    whole = train(spec, tmp_path / "whole")
    assert [event for event in whole.of("status") if event["phase"] == "reference"]
    assert len(whole.of("sample")) == 3
    first = train(spec, tmp_path / "run", At(14, "pause"))
    assert first.of("paused")
    rest = train(spec, tmp_path / "run", resume=True)
    assert not [event for event in rest.of("status") if event["phase"] == "reference"]
    curve = {event["step"]: event["loss"] for event in first.of("step") + rest.of("step")}
    assert len(first.of("step")) < 6 and len(curve) == 6
    assert max(abs(curve[event["step"]] - event["loss"]) for event in whole.of("step")) < 1e-5
    assert metrics(rest)[1] == pytest.approx(metrics(whole)[1], abs=1e-4)


@pytest.mark.parametrize("change", [{"full": True, "adapter": {}}, {"quantization": "nf4"}], ids=str)
def test_the_reference_of_a_whole_model_and_of_one_in_codes(tmp_path: Path, change: dict[str, Any]) -> None:
    """Full fine-tuning has no adapter to switch off: its reference is the base as it was, also when resumed."""
    rate = 1e-4 if "full" in change else 2e-3
    spec = JobSpec.from_dict(job(max_steps=6, eval_every=3, learning_rate=rate).to_dict() | change)
    recorder = train(spec, tmp_path / "run", At(14, "pause"))
    assert abs(metrics(recorder)[0]["margin"]) < 0.02 and recorder.of("paused")
    rest = train(spec, tmp_path / "run", resume=True)
    assert not [event for event in rest.of("status") if event["phase"] == "reference"]
    assert metrics(rest)[1]["margin"] > 0.3


def test_accumulation_is_the_larger_batch(tmp_path: Path) -> None:
    curves = []
    for number, (size, times) in enumerate(((8, 1), (2, 4))):
        recorder = train(job(max_steps=4, batch_size=size, gradient_accumulation=times), tmp_path / str(number))
        curves.append([event["loss"] for event in recorder.of("step")])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_chats_are_no_preferences_and_the_error_names_the_task(tmp_path: Path) -> None:
    with pytest.raises(NotTakenError, match="causal_lm"):
        train(job(REPOSITORY / "examples" / "lighthouse.jsonl"), tmp_path / "a")
    chat = JobSpec.from_dict(job().to_dict() | {"task": "causal_lm"})
    with pytest.raises(NotTakenError, match="is for: preference"):
        train(chat, tmp_path / "b")


def test_pairs_of_equal_answers_are_a_warning_of_the_run(tmp_path: Path) -> None:
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()[:12]
    row = json.loads(lines[3])
    lines[3] = json.dumps({**row, "rejected": row["chosen"]})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recorder = train(job(tmp_path / "rows.jsonl", max_steps=1), tmp_path / "run")
    assert "Line 4" in recorder.of("warning")[0]["message"] and "the same" in recorder.of("warning")[0]["message"]


def test_the_quick_recipe_and_its_counterpart(tmp_path: Path) -> None:
    """The preset as it stands; without a learning rate it does not reach the same margin."""
    recipe = presets.tasks()["preference"].presets["quick-look"]
    margins = []
    for name, rate in (("run", recipe.training["learning_rate"]), ("still", 1e-12)):
        training = {**recipe.training, "precision": "fp32", "learning_rate": rate}
        spec = job(options=dict(recipe.options), **training)
        spec = JobSpec.from_dict(spec.to_dict() | {"adapter": dict(recipe.adapter)})
        margins.append(metrics(train(spec, tmp_path / name))[1]["margin"])
    assert margins[0] > 0.5 > 1e-3 > abs(margins[1])


def test_every_recipe_and_the_form_name_options_of_the_task() -> None:
    form = presets.tasks()["preference"]
    plain = Preference()
    assert {field.name: field.default for field in form.options} == {
        "loss": plain.loss_kind, "beta": plain.beta, "label_smoothing": plain.label_smoothing
    }  # fmt: skip
    assert "loss_on" not in {field.name for field in form.fields}
    for recipe in form.presets.values():
        get_task("preference", recipe.options)
    assert form.presets["dpo"].training["learning_rate"] == 1e-6
    JobSpec.from_file(REPOSITORY / "examples" / "preference_tiny.yaml")


def test_the_samples_are_what_their_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import sample_data

    sample_data.write(tmp_path)
    expected = {"captain_preferences.jsonl": ("preferences", 304), "captain_parallel.csv": ("parallel", 304),
                "question_topics.csv": ("labels", 320), "old_english.csv": ("parallel", 1200),
                "small_functions.jsonl": ("alpaca", 123)}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == set(expected)
    notice = (REPOSITORY / "NOTICE").read_text(encoding="utf-8")
    for name, (format, rows) in expected.items():
        kept = REPOSITORY / "examples" / name
        assert kept.read_bytes() == (tmp_path / name).read_bytes(), "run python scripts/sample_data.py"
        prepared = load(kept)
        assert (prepared.format, prepared.kept, prepared.skipped) == (format, rows, 0)
        assert f"examples/{name}" in notice
