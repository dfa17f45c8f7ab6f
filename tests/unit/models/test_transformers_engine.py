"""The engine for real models, against transformers itself, with small random models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.catalog import Catalog, ModelSpec
from models.engine import load_engine
from models.prompt import load_prompt_format
from models.protocol import Ended, Event, GenerationRequest, InvalidRequest, ModelLoadError, SamplingParams
from models.transformers_engine import TransformersEngine

Ask = Callable[..., GenerationRequest]
Finish = Callable[..., dict[str, Ended]]
EOS = 257


def load(folder: Path, **spec: Any) -> TransformersEngine:
    engine = load_engine(ModelSpec(name="tiny", path=str(folder), **{"slots": 4, **spec}), "cpu")
    assert isinstance(engine, TransformersEngine)
    return engine


@pytest.fixture
def llama(tiny_model: Callable[..., tuple[Path, Any]]) -> Iterator[TransformersEngine]:
    engine = load(tiny_model()[0])
    yield engine
    engine.close()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def reference(model: Any, prompt: list[int], max_tokens: int, **settings: Any) -> tuple[int, ...]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, **settings
    )
    return tuple(output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_greedy_equals_generate_token_by_token(
    architecture: str, tiny_model: Callable[..., tuple[Path, Any]], ask: Ask, finish: Finish
) -> None:
    """Prompts and answers of mixed lengths, joining and leaving at different steps, give generate's own tokens."""
    folder, model = tiny_model(architecture)
    engine = load(folder)
    wanted = [(prompt, 5 + 6 * at) for at, prompt in enumerate(prompts(3, 17, 1, 40, 9, 9, 25))]
    for at, (prompt, max_tokens) in enumerate(wanted):
        engine.submit(ask(str(at), prompt, max_tokens))
    ended = finish(engine)
    expected = {str(at): reference(model, *pair) for at, pair in enumerate(wanted)}
    assert {request_id: end.choices[0].token_ids for request_id, end in ended.items()} == expected
    assert len({ids[:5] for ids in expected.values()}) == 7


def test_sliding_window_attention_equals_generate(
    tiny_model: Callable[..., tuple[Path, Any]], ask: Ask, finish: Finish
) -> None:
    """A model that looks back only so far sees only so much."""
    folder, model = tiny_model("mistral", sliding_window=8)
    engine = load(folder)
    wanted = [(prompt, 30) for prompt in prompts(3, 20, 11)]
    for at, (prompt, max_tokens) in enumerate(wanted):
        engine.submit(ask(str(at), prompt, max_tokens))
    ended = finish(engine)
    for at, pair in enumerate(wanted):
        assert ended[str(at)].choices[0].token_ids == reference(model, *pair)


def test_repetition_penalty_equals_generate(
    tiny_model: Callable[..., tuple[Path, Any]], llama: TransformersEngine, ask: Ask, finish: Finish
) -> None:
    """Greedy with a penalty is generate's own, beside a neighbour without one."""
    prompt = prompts(12)[0]
    llama.submit(ask("penalised", prompt, 40, repetition_penalty=1.3))
    llama.submit(ask("plain", prompt, 40))
    ended = finish(llama)
    model = tiny_model()[1]
    assert ended["penalised"].choices[0].token_ids == reference(model, prompt, 40, repetition_penalty=1.3)
    assert ended["plain"].choices[0].token_ids == reference(model, prompt, 40)


def test_the_answer_ends_at_eos(llama: TransformersEngine, ask: Ask, finish: Finish) -> None:
    """EOS is the last token and no text; told to ignore it, the row goes on to max_tokens."""
    bias = ((EOS, 100.0),)
    llama.submit(ask("ends", "hello", 20, logit_bias=bias))
    llama.submit(ask("goes on", "hello", 20, logit_bias=bias, ignore_eos=True))
    ended = finish(llama)
    choice = ended["ends"].choices[0]
    assert (choice.token_ids, choice.text, choice.finish_reason) == ((EOS,), "", "stop")
    choice = ended["goes on"].choices[0]
    assert (len(choice.token_ids), choice.finish_reason) == (20, "length")


def test_eos_is_found_in_all_three_places(
    tiny_model: Callable[..., tuple[Path, Any]], tmp_path: Path, ask: Ask, finish: Finish
) -> None:
    """The generation settings, the config and the tokenizer may each name another end."""
    folder = shutil.copytree(tiny_model()[0], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [10, 11]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 12}))
    engine = load(folder)
    for token in (10, 11, 12, EOS, 13):
        engine.submit(ask(str(token), "hi", 3, logit_bias=((token, 100.0),)))
    tokens = {request_id: len(end.choices[0].token_ids) for request_id, end in finish(engine).items()}
    assert tokens == {"10": 1, "11": 1, "12": 1, str(EOS): 1, "13": 3}


def test_a_seed_gives_the_same_answer_whatever_the_neighbours(
    llama: TransformersEngine, ask: Ask, finish: Finish
) -> None:
    """Alone, or in a batch with others, a seeded request says the same; another seed says something else."""
    seeded = {"temperature": 1.0, "seed": 5, "top_p": 0.9}
    llama.submit(ask("alone", "tell me", 40, **seeded))
    alone = finish(llama)["alone"].choices[0]
    llama.submit(ask("greedy", "something quite long to pad the others", 15))
    llama.submit(ask("again", "tell me", 40, **seeded))
    llama.submit(ask("other", "tell me", 40, **{**seeded, "seed": 6}))
    llama.submit(ask("wild", "x", 60, temperature=2.0))
    ended = finish(llama)
    assert ended["again"].choices[0].token_ids == alone.token_ids
    assert ended["other"].choices[0].token_ids != alone.token_ids


def test_choices_of_one_request_differ_and_repeat_with_the_seed(
    llama: TransformersEngine, ask: Ask, finish: Finish
) -> None:
    """n choices, more than there are slots, each with a stream of its own, the same when asked again."""
    answers = []
    for request_id in "ab":
        llama.submit(ask(request_id, "tell me", 12, n=6, temperature=1.0, seed=3))
        ended = finish(llama)[request_id]
        answers.append([choice.token_ids for choice in ended.choices])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 6
    assert ended.usage.prompt_tokens == 7


def test_a_stop_string_across_tokens_is_never_shown(
    llama: TransformersEngine, ask: Ask, finish: Finish, shown: Callable[..., str]
) -> None:
    """The text, streamed or whole, ends before a stop string that spans several tokens."""
    settings = {"temperature": 1.0, "seed": 1, "logit_bias": letters(llama)}
    llama.submit(ask("free", "go", 40, **settings))
    free = finish(llama)["free"].choices[0].text
    stop = free[10:14]
    events: list[Event] = []
    llama.submit(ask("told", "go", 40, **settings, stop=(stop,), stream=True))
    choice = finish(llama, events)["told"].choices[0]
    assert choice.text == shown(events, "told") == free[: free.index(stop)]
    assert choice.finish_reason == "stop"
    assert len(choice.token_ids) < 40


def letters(engine: TransformersEngine) -> tuple[tuple[int, float], ...]:
    """The letters a to z, made likely."""
    ids = load_prompt_format(engine._spec).encode_text("abcdefghijklmnopqrstuvwxyz")
    return tuple((token, 30.0) for token in ids)


def test_deltas_hold_whole_characters_and_join_to_the_text(
    llama: TransformersEngine, ask: Ask, finish: Finish, shown: Callable[..., str]
) -> None:
    """Whatever bytes a random model says, pieces join to the text, and the text is the decoded tokens."""
    events: list[Event] = []
    for seed in range(8):
        llama.submit(ask(str(seed), "é", 60, temperature=1.5, seed=seed, stream=True, ignore_eos=True))
    for request_id, end in finish(llama, events).items():
        text = end.choices[0].text
        assert shown(events, request_id) == text
        assert text == llama._decode(end.choices[0].token_ids).rstrip("\ufffd")


def test_cancelled_rows_leave_and_the_others_are_not_disturbed(
    tiny_model: Callable[..., tuple[Path, Any]], llama: TransformersEngine, ask: Ask, finish: Finish
) -> None:
    """What is left ends as if it had been alone."""
    wanted = prompts(3, 17, 8, 40)
    for at, prompt in enumerate(wanted):
        llama.submit(ask(str(at), prompt, 30))
    for _ in range(5):
        llama.step()
    for request_id in ("0", "1", "3"):
        llama.cancel(request_id)
    events: list[Event] = []
    ended = finish(llama, events)
    assert {request_id: end.outcome for request_id, end in ended.items()} == {
        "0": "cancelled",
        "1": "cancelled",
        "2": "succeeded",
        "3": "cancelled",
    }
    assert len(ended["0"].choices[0].token_ids) == 5
    assert ended["2"].choices[0].token_ids == reference(tiny_model()[1], wanted[2], 30)


def test_when_all_are_cancelled_the_next_one_is_not_disturbed(
    tiny_model: Callable[..., tuple[Path, Any]], llama: TransformersEngine, ask: Ask, finish: Finish
) -> None:
    """Nothing of the old row is used for the next one."""
    first, second = prompts(9, 14)
    llama.submit(ask("old", first, 30))
    llama.step()
    llama.cancel("old")
    llama.submit(ask("new", second, 30))
    assert finish(llama)["new"].choices[0].token_ids == reference(tiny_model()[1], second, 30)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("boom"), "engine_error"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out_of_memory"),
    ],
)
def test_a_fault_in_every_row_fails_all_and_the_engine_lives_on(  # noqa: PLR0917  fixtures
    error: Exception,
    code: str,
    llama: TransformersEngine,
    ask: Ask,
    finish: Finish,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They fail retryable, their blocks are free again, and what was waiting is served."""
    for at in range(5):
        llama.submit(ask(str(at), "hello", 6))
    llama.step()
    with monkeypatch.context() as patch:
        patch.setattr(llama._model, "forward", _raise(error))
        events = llama.step()
    failed = [event for event in events if isinstance(event, Ended)]
    assert [(end.id, end.error.code, end.error.retryable) for end in failed] == [(id_, code, True) for id_ in "0123"]
    assert {request_id: end.outcome for request_id, end in finish(llama).items()} == {"4": "succeeded"}


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_nan_logits_fail_their_row_alone(
    tiny_model: Callable[..., tuple[Path, Any]],
    llama: TransformersEngine,
    ask: Ask,
    finish: Finish,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row whose output is not a number fails, sampled or greedy; its neighbours' tokens are untouched."""
    forward = llama._model.forward

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output.logits.shape[1] == 3:
            output.logits[0, 1] = torch.nan
            output.logits[0, 2, 0] = torch.inf
        return output

    monkeypatch.setattr(llama._model, "forward", poisoned)
    llama.submit(ask("good", "hello", 10))
    llama.submit(ask("nan", "hello", 10))
    llama.submit(ask("inf", "hello", 10, temperature=1.0))
    ended = finish(llama)
    assert {request_id: end.error and end.error.code for request_id, end in ended.items()} == {
        "good": None,
        "nan": "nan_logits",
        "inf": "nan_logits",
    }
    assert ended["good"].choices[0].token_ids == reference(tiny_model()[1], list(b"hello"), 10)


def test_shares_of_the_time_add_up(llama: TransformersEngine, ask: Ask, finish: Finish) -> None:
    """Busy seconds of all requests sum to the engine's, and a longer prompt pays more of its prefill."""
    llama.submit(ask("short", "x", 1))
    llama.submit(ask("long", "x" * 99, 1))
    ended = finish(llama)
    for at in range(6):
        llama.submit(ask(str(at), "hello", 5 * at + 1))
    ended |= finish(llama)
    total = sum(end.timings.busy_seconds for end in ended.values())
    assert total == pytest.approx(llama.health().busy_seconds, rel=1e-6)
    assert ended["long"].timings.busy_seconds == pytest.approx(99 * ended["short"].timings.busy_seconds)


def test_intake_knows_the_models_limits(llama: TransformersEngine, ask: Ask) -> None:
    """Vocabulary and context are the model's."""
    for prompt, max_tokens, said in (([258], 1, "vocabulary of 258"), ([1] * 12, 501, "at most 500")):
        with pytest.raises(InvalidRequest, match=said):
            llama.submit(ask("a", prompt, max_tokens))
    assert not llama.has_work()


def test_bfloat16_checkpoints_run_in_their_own_type(
    tiny_model: Callable[..., tuple[Path, Any]], tmp_path: Path, ask: Ask, finish: Finish
) -> None:
    """dtype "auto" is the checkpoint's, and another can be asked for."""
    folder = shutil.copytree(tiny_model()[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    engine = load(folder)
    assert engine._model.dtype == torch.bfloat16
    engine.submit(ask("a", "hello", 5))
    assert finish(engine)["a"].outcome == "succeeded"
    assert load(folder, dtype="float32")._model.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # raised while bitsandbytes is imported
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("quantization", "largest_error"), [("int8", 0.05), ("nf4", 0.4)])
def test_quantized_models_answer_and_are_smaller(
    quantization: str,
    largest_error: float,
    tiny_model: Callable[..., tuple[Path, Any]],
    ask: Ask,
    finish: Finish,
) -> None:
    """int8 and nf4 load and run on the CPU too, take less memory, and stay near the model's own logits."""
    folder, model = tiny_model()
    engine = load(folder, quantization=quantization)
    for at, prompt in enumerate(prompts(5, 12, 30)):
        engine.submit(ask(str(at), prompt, 12))
    ended = finish(engine)
    assert [(end.outcome, len(end.choices[0].token_ids)) for end in ended.values()] == [("succeeded", 12)] * 3
    assert engine.health().quantization == quantization
    assert engine._model.get_memory_footprint() < model.get_memory_footprint() / 2
    ids = torch.tensor(prompts(30))
    engine._model.set_attn_implementation("eager")
    with torch.inference_mode():
        exact, rough = model(ids).logits, engine._model(ids).logits.float()
    assert ((rough - exact).norm() / exact.norm()).item() < largest_error


def test_only_complete_safetensors_are_loaded(tiny_model: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    """Pickled weights, missing weights and unknown architectures are refused with the model's name."""
    source, model = tiny_model()
    pickled = shutil.copytree(source, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    deeper = shutil.copytree(source, tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    strange = shutil.copytree(source, tmp_path / "strange")
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type"}))
    for folder, said in ((pickled, "safetensors"), (deeper, r"lacks \d+ weights"), (strange, "no-such-type")):
        with pytest.raises(ModelLoadError, match=f"(?s)tiny.*{said}"):
            load(folder)


def test_models_without_a_key_value_cache_are_refused(tiny_model: Callable[..., tuple[Path, Any]]) -> None:
    """A state-space model is refused by name."""
    folder, _ = tiny_model("mamba")
    with pytest.raises(ModelLoadError, match="tiny: MambaForCausalLM"):
        load(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    """A missing tokenizer or folder is an error of loading."""
    with pytest.raises(ModelLoadError, match=r"tiny: .*no tokenizer\.json"):
        load(tmp_path)


def test_an_idle_engine_holds_no_block_but_remembers(llama: TransformersEngine, ask: Ask, finish: Finish) -> None:
    """When the last row ends all blocks are free or cached, and the same prompt again is computed in part only."""
    prompt = prompts(40)[0]
    llama.submit(ask("a", prompt, 3))
    llama.step()
    assert llama._blocks.used == 3
    first = finish(llama)["a"]
    assert llama._blocks.used == 0
    llama.submit(ask("b", prompt, 3))
    again = finish(llama)["b"]
    llama._blocks.check()
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 39)
    assert again.choices == first.choices


def test_tiny_chat_answers() -> None:
    """The model that ships loads and ends its answer on its own."""
    spec = Catalog.from_mapping().get("tiny-chat")
    if spec.folder is None or not list(spec.folder.glob("*.safetensors")):
        pytest.skip("examples/tiny-chat is not in this checkout")
    engine = load_engine(spec, "cpu")
    prompt = load_prompt_format(spec).encode_messages([{"role": "user", "content": "What is 2 + 3?"}])
    engine.submit(GenerationRequest("a", tuple(prompt), SamplingParams(64, temperature=0.0)))
    events: list[Event] = []
    while engine.has_work():
        events += engine.step()
    choice = events[-1].choices[0]
    assert choice.finish_reason == "stop"
    assert "5" in choice.text


@pytest.mark.parametrize("asked", [2, 3])
def test_a_model_computes_with_as_many_threads_as_its_table_says(
    tiny_model: Callable[..., tuple[Path, Any]], asked: int
) -> None:
    """By default a core is left to the rest of the worker; `cpu_threads` says otherwise."""
    before = torch.get_num_threads()
    try:
        load(tiny_model()[0], cpu_threads=asked).close()
        assert torch.get_num_threads() == asked
    finally:
        torch.set_num_threads(before)
