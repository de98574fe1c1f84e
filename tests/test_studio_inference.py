"""The inference process: real answers from the toy, and every way in which it can end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from studio.inference import Inference, InferenceError
from studio.inference_worker import Server

SAMPLING = {"max_new_tokens": 12, "temperature": 0.7, "seed": 1}
HELLO = [{"role": "user", "content": "What colour is grass?"}]


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inference]:
    """One for all tests: whatever a test does to the process, the next question must be answered."""
    inference = Inference(tmp_path_factory.mktemp("home"))
    yield inference
    inference.close()


def ask(inference: Inference, base: str = "tiny-llama", **changes: Any) -> str:
    pieces = inference.generate(base, {}, HELLO, [None], {**SAMPLING, **changes})
    return "".join(piece["text"] for piece in pieces if piece["type"] == "piece")


def pid(inference: Inference) -> int:
    assert inference._child is not None
    return inference._child.popen.pid


def test_the_same_seed_gives_the_same_answer_and_the_base_stays_loaded(inference: Inference) -> None:
    first = ask(inference)
    child = pid(inference)
    assert first and ask(inference) == first
    assert pid(inference) == child


def test_counting_needs_no_base_in_memory_and_names_wrong_fields(inference: Inference) -> None:
    small = inference.count("tiny-llama", {"method": "lora", "r": 4, "target_modules": "all-linear"})
    large = inference.count("tiny-llama", {"method": "lora", "r": 8, "target_modules": "all-linear"})
    assert large["trainable"] == 2 * small["trainable"] > 0
    unet, both = (
        inference.count("tiny-sd", {"method": "lora", "r": 4}, "text_to_image", {"train_text_encoder": option})
        for option in (False, True)
    )
    assert both["trainable"] > unet["trainable"] > 0
    with pytest.raises(InferenceError) as fault:
        inference.count("tiny-llama", {"method": "lora", "target_modules": ["no_such_layer"]})
    assert fault.value.code == "target" and "no_such_layer" in fault.value.message
    with pytest.raises(InferenceError) as fault:
        inference.count("tiny-llama", {"method": "lora", "rank": 4})
    assert fault.value.code == "config"


def test_a_prompt_longer_than_the_context_and_a_missing_base_are_named(
    inference: Inference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_MODELS", str(tmp_path))
    with pytest.raises(InferenceError) as fault:
        list(inference.generate("tiny-llama", {}, [{"role": "user", "content": "word " * 4000}], [None], SAMPLING))
    assert fault.value.code == "prompt"
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InferenceError) as fault:
        ask(inference, str(pickled))
    assert fault.value.code == "unsafe-file"


def test_a_killed_process_is_an_error_in_words_and_the_next_question_is_answered(inference: Inference) -> None:
    stream = inference.generate("tiny-llama", {}, HELLO, [None], {**SAMPLING, "max_new_tokens": 400})
    with pytest.raises(InferenceError) as fault:
        for news in stream:
            if news["type"] == "piece":
                os.kill(pid(inference), signal.SIGKILL)
    assert fault.value.code == "inference-ended" and "signal 9" in fault.value.message
    assert ask(inference)


def test_another_base_ends_the_process_that_holds_the_first(
    inference: Inference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_MODELS", str(tmp_path))
    ask(inference)
    before = pid(inference)
    with pytest.raises(InferenceError):
        ask(inference, str(tmp_path / "nowhere"))
    assert pid(inference) != before and not psutil.pid_exists(before)


def test_leaving_early_cancels_the_answer_and_keeps_the_process(inference: Inference) -> None:
    stream = inference.generate("tiny-llama", {}, HELLO, [None] * 4, {**SAMPLING, "max_new_tokens": 480})
    next(news for news in stream if news["type"] == "piece")
    child = pid(inference)
    began = time.monotonic()
    stream.close()
    assert ask(inference) and pid(inference) == child
    assert time.monotonic() - began < 10


def test_foretelling_gives_way_to_an_answer_and_is_whole_in_the_end(inference: Inference) -> None:
    job = {"model": "tiny-llama", "data": {"path": "rows.jsonl"}, "training": {"max_length": 64}}
    adapter = {"method": "lora", "r": 4}
    stages = inference.estimate({**job, "adapter": adapter})
    assert next(stages)["stage"] == "machine"
    counted = inference.count("tiny-llama", adapter)
    assert counted["trainable"] > 0
    seen = [stage["stage"] for stage in stages]
    assert seen.count("machine") == 1 and seen[-1] == "largest"
    rows = inference.method_costs({**job, "adapter": adapter}, [adapter, {"method": "ia3"}])
    others = inference.method_costs({**job, "adapter": adapter}, [adapter])
    assert next(rows)["method"] == "lora" and next(others)["method"] == "lora"
    # Two who foretell wait for each other; neither begins anew.
    assert [row["method"] for row in rows] == ["ia3"] and list(others) == []


def test_foretelling_that_nobody_wants_any_more_ends_before_its_next_stage(inference: Inference) -> None:
    job = {"model": "tiny-llama", "data": {"path": "rows.jsonl"}, "adapter": {"method": "lora"}}
    # The process is started anew: its first stage is seconds away.
    inference.close()
    assert list(inference.estimate(job, lambda: False)) == []
    assert list(inference.method_costs(job, [{"method": "ia3"}] * 500, lambda: False)) == []
    assert [stage["stage"] for stage in inference.estimate(job)][-1] == "largest"


def test_the_process_ends_with_its_idle_time_and_comes_back(
    inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    inference.close()
    monkeypatch.setenv("STUDIO_INFERENCE_IDLE", "0.3")
    inference.count("tiny-llama", {"method": "lora"})
    child = inference._child
    assert child is not None and child.popen.wait(20) == 0
    monkeypatch.undo()
    assert inference.count("tiny-llama", {"method": "lora"})["trainable"] > 0


def test_closing_leaves_no_process(inference: Inference) -> None:
    ask(inference)
    child = pid(inference)
    inference.close()
    assert not psutil.pid_exists(child)


def test_out_of_memory_is_reported_before_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    out = io.StringIO()
    server = Server(out)

    def explode(request: str, message: dict[str, Any]) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(server, "_generate", explode)
    server._answer({"id": "a", "op": "generate"})
    assert ended == [1] and '"code": "memory"' in out.getvalue() and "smaller" in out.getvalue()


def test_all_that_wait_hear_of_the_end_while_some_give_up() -> None:
    import io
    import queue
    from types import SimpleNamespace

    from studio.inference import _Child

    child = _Child(SimpleNamespace(stdout=io.StringIO(""), wait=lambda: 0), None)  # type: ignore[arg-type]

    class Asker(queue.Queue[Any]):
        def put(self, item: Any, *_: Any) -> None:
            super().put(item)
            child.waiting.pop("gives up", None)

    boxes = {name: Asker() for name in ("first", "gives up", "last")}
    child.waiting.update(boxes)
    child.read()
    assert child.ended and [box.get_nowait() for box in boxes.values()] == [None] * 3
