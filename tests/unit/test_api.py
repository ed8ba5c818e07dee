"""The public names of ross_mcore: cost of the import, errors for wrong arguments, accepted pictures."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ross_mcore
from ross_mcore import Question, TrainedModel
from ross_mcore.checkpoint.folder import TRAIN_STATE
from ross_mcore.data.chat_templates import TurnTemplate
from ross_mcore.data.spec import SampleSpec
from ross_mcore.trained import prompt_of, training_spec
from tests.recorded import GOLDEN, recorded_checkpoint

PICTURE = GOLDEN / "data" / "images" / "img0.png"
ASKED = "<image>\nWhat is it?"


def test_importing_loads_no_library() -> None:
    code = (
        "import sys; import ross_mcore; ross_mcore.Config(); ross_mcore.UserError; dir(ross_mcore)\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded - set(sys.stdlib_module_names) - {'__main__', 'ross_mcore', 'sitecustomize'}))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_every_public_name_exists_at_run_time_and_for_type_checkers() -> None:
    assert dir(ross_mcore) == sorted(ross_mcore.__all__)
    for name in ross_mcore.__all__:
        assert getattr(ross_mcore, name).__doc__ or name == "__version__"
    tree = ast.parse(Path(ross_mcore.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported | {"__version__"} == set(ross_mcore.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = ross_mcore.trian


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: ross_mcore.train("recipe.yaml"), TypeError, "takes a Config, got str"),
        (lambda: ross_mcore.train(ross_mcore.Config()), ross_mcore.ConfigError, "--load is missing"),
        (lambda: ross_mcore.read_recipe("nowhere.yaml"), ross_mcore.ConfigError, "train_ross/finetune_siglip_qwen2"),
        (lambda: ross_mcore.load_model("nowhere"), ross_mcore.CheckpointError, "nowhere does not exist"),
        (lambda: ross_mcore.load_model("x", dtype="float16"), ross_mcore.ConfigError, "'float16'.*float32, bfloat16"),
        (lambda: ross_mcore.load_model("x", dtype=torch.half), ross_mcore.ConfigError, "float16.*float32, bfloat16"),
        (lambda: ross_mcore.answer("run", []), TypeError, "the model is a str, expected what load_model returns"),
        (lambda: ross_mcore.reconstruct("run", []), TypeError, "the model is a str"),
        (lambda: ross_mcore.Config.from_flat(lr="3e-4"), ross_mcore.ConfigError, "--lr is '3e-4', expected float"),
        (lambda: ross_mcore.Config.from_flat(seed=True), ross_mcore.ConfigError, "--seed is True, expected int"),
        (lambda: ross_mcore.Config.from_flat(training_stage="x"), ross_mcore.ConfigError, "one of pretrain, finetune"),
    ],
)
def test_wrong_arguments_get_a_clear_error(call: Callable[[], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        call()


def test_a_recipe_and_options_make_a_config() -> None:
    recipe = ross_mcore.read_recipe("train_ross/finetune_siglip_qwen2")
    config = ross_mcore.Config.from_flat(**recipe, load=Path("base"), vision_lr=1)
    assert (config.training.training_stage, config.checkpoint.load, config.optimizer.vision_lr) == (
        "finetune",
        "base",
        1,
    )


@pytest.fixture(scope="module")
def model(process_group: None, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """The recorded model, as `load_model` reads it from a path that is a string."""
    folder = tmp_path_factory.mktemp("api") / "base"
    recorded_checkpoint("qwen2_siglip", folder)
    return ross_mcore.load_model(str(folder))


def test_pictures_are_files_pil_pictures_or_pixels(model: TrainedModel) -> None:
    pixels = ross_mcore.read_picture(PICTURE, model.preprocessing())
    with Image.open(PICTURE) as opened:
        forms = [PICTURE, str(PICTURE), opened, pixels]
        asked = [Question(ASKED, [picture]) for picture in forms]
        answers = ross_mcore.answer(model, asked, "qwen_2", max_new_tokens=3)
        originals, samples = ross_mcore.reconstruct(model, forms, steps=1)
    assert len(set(answers)) == 1
    assert all(torch.equal(original, originals[0]) for original in originals)
    assert samples.shape == originals.shape


def test_a_reconstruction_has_a_seed_a_beginning_and_steps(model: TrainedModel) -> None:
    """Timestep 0 hardly adds noise, so even an untrained denoiser leaves the picture as its VAE encodes it."""
    seen: list[int] = []

    def run(**options: Any) -> torch.Tensor:
        return ross_mcore.reconstruct(model, [PICTURE], steps=2, **options)[1]

    def on_step(timestep: int, estimate: Callable[[], torch.Tensor]) -> None:
        seen.append(timestep)
        last[:] = [estimate()]

    last: list[torch.Tensor] = []
    whole = run(on_step=on_step)
    assert seen == [999, 0] and torch.allclose(last[0], whole, atol=1e-5)
    assert torch.equal(run(seed=0), whole) and not torch.equal(run(seed=1), whole)
    near, far = run(start_timestep=0), run(start_timestep=999)
    assert torch.allclose(run(start_timestep=0, seed=1), near, atol=0.05)
    assert (far - near).abs().mean() > 0.02


def test_a_question_is_turns_or_a_text_whose_pictures_come_first(model: TrainedModel) -> None:
    turns = [{"from": "human", "value": ASKED}]
    asked = [Question(turns, [PICTURE]), Question(ASKED, [PICTURE]), Question("What is it?", [PICTURE])]
    assert len(set(ross_mcore.answer(model, asked, "qwen_2", max_new_tokens=3))) == 1
    assert turns == [{"from": "human", "value": ASKED}]
    assert ross_mcore.answer(model, asked[:1], max_new_tokens=3) == ross_mcore.answer(
        model, asked[:1], model.template, max_new_tokens=3
    )


@pytest.mark.parametrize(
    ("question", "kind", "says"),
    [
        (Question(ASKED), ross_mcore.ConversationError, r"questions\[1\]: 1 <image> in the text, 0 pictures"),
        (Question("<image><image>", [PICTURE]), ross_mcore.ConversationError, r"\[1\]: 2 <image> in the text, 1 pict"),
        (Question([]), ross_mcore.ConversationError, r"questions\[1\]: conversations is not a list"),
        (
            Question([{"from": "gpt", "value": "It is."}]),
            ross_mcore.ConversationError,
            r"questions\[1\]: nothing to answer",
        ),
        (Question(ASKED, [__file__]), ross_mcore.ImageError, r"questions\[1\]\.pictures\[0\]: .*test_api.py: undecod"),
        (
            Question(ASKED, [torch.zeros(3, 5, 5)]),
            ross_mcore.ImageError,
            r"shape \(3, 5, 5\), .*\(3, 56, 56\)",
        ),
        (Question(ASKED, [7]), TypeError, r"questions\[1\]\.pictures\[0\] is a int"),  # type: ignore[list-item]
        (Question(ASKED, "cat.jpg"), TypeError, r"questions\[1\]: pictures is one picture"),
        ("What is it?", TypeError, r"questions\[1\] is a str, expected a Question"),
    ],
)
def test_a_bad_question_is_named(model: TrainedModel, question: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        ross_mcore.answer(model, [Question("How much is one?"), question], "qwen_2", max_new_tokens=1)


def test_an_unknown_template_gets_the_list(model: TrainedModel) -> None:
    with pytest.raises(ross_mcore.UserError, match="--template alpaca is not one of plain, qwen_2, v1, llama3, chatml"):
        ross_mcore.answer(model, [Question("What?")], "alpaca")
    with pytest.raises(ross_mcore.ConfigError, match="batch_size is 0, expected at least 1"):
        ross_mcore.generate(model, [Question("What?")], batch_size=0)


def test_prompts_show_pictures_as_the_checkpoint_was_trained(tmp_path: Path, process_group: None) -> None:
    recorded_checkpoint("qwen2_siglip", tmp_path / "base")
    trained = ross_mcore.load_model(tmp_path / "base")
    without = ross_mcore.reconstruct(trained, [PICTURE], steps=1)[1]
    (trained.checkpoint.path / TRAIN_STATE).write_text('{"template": "qwen_2, plain", "mm_use_im_start_end": true}')
    trained = replace(trained, spec=training_spec(trained.checkpoint, trained.tokenizer))
    assert trained.spec == SampleSpec("qwen_2", mm_use_im_start_end=True)
    prompt = prompt_of(trained, Question(ASKED, [PICTURE]), trained.spec)
    before = trained.tokenizer.decode(prompt.tokens[: prompt.image_starts[0]])
    after = trained.tokenizer.decode(prompt.tokens[prompt.image_starts[0] + trained.config.vision.image_tokens :])
    assert before.endswith("USER: <im_start>") and after.startswith("<im_end>\nWhat is it?")
    assert not torch.equal(ross_mcore.reconstruct(trained, [PICTURE], steps=1)[1], without)


def test_answers_are_asked_for_as_the_checkpoint_was_trained(model: TrainedModel, tmp_path: Path) -> None:
    """With a template of one's own, whose file is not needed any more; `template` takes another file."""
    own = TurnTemplate("Q: {text} ", "A: ", "<|im_end|>", system="{text} ")
    file, spec = (
        model.checkpoint.path / TRAIN_STATE,
        SampleSpec("my.yaml#1", own_templates={"my.yaml#1": own.as_text()}),
    )
    asked = Question([{"from": "system", "value": "Be brief."}, {"from": "human", "value": ASKED}], [PICTURE])
    former = file.read_bytes()
    file.write_text(json.dumps(asdict(spec)))
    try:
        model = replace(model, spec=training_spec(model.checkpoint, model.tokenizer))
        assert model.template == "my.yaml#1"
        tokens = prompt_of(model, asked, model.spec).tokens.tolist()
        assert model.tokenizer.decode([t for t in tokens if t]) == "Be brief. Q: \nWhat is it? A:"
        (tmp_path / "other.yaml").write_text("user: '{text} '\nanswer_start: '='\nanswer_end: <|im_end|>")
        assert len(ross_mcore.answer(model, [asked], "chatml", max_new_tokens=2)) == 1
        with pytest.raises(ross_mcore.ConversationError, match="no place for a system turn"):
            ross_mcore.answer(model, [asked], str(tmp_path / "other.yaml"), max_new_tokens=2)
        file.write_text(json.dumps(asdict(spec) | {"own_templates": {"my.yaml#1": "{}"}}))
        with pytest.raises(ross_mcore.CheckpointError, match="the template has no key 'user'; copy the checkpoint"):
            training_spec(model.checkpoint, model.tokenizer)
    finally:
        file.write_bytes(former)


@pytest.mark.parametrize("state", ['{"template": "alpaca"}', '{"image_aspect_ratio": 3}', '{"mm_use_im_start_end": 1}'])
def test_a_damaged_train_state_is_named(model: TrainedModel, state: str) -> None:
    file = model.checkpoint.path / TRAIN_STATE
    former = file.read_bytes()
    file.write_text(state)
    try:
        with pytest.raises(ross_mcore.CheckpointError, match=f"{file}: .*; copy the checkpoint again"):
            training_spec(model.checkpoint, model.tokenizer)
    finally:
        file.write_bytes(former)


@pytest.mark.parametrize("pictures", [str(PICTURE), []])
def test_reconstruct_wants_a_list(model: TrainedModel, pictures: Any) -> None:
    with pytest.raises(TypeError, match="a list of at least one picture"):
        ross_mcore.reconstruct(model, pictures)


def test_two_models_work_in_one_session(model: TrainedModel) -> None:
    asked = [Question(ASKED, [PICTURE])]
    before = ross_mcore.answer(model, asked, "qwen_2", max_new_tokens=3)
    other = ross_mcore.load_model(model.checkpoint.path, dtype="bfloat16", seed=5)
    assert next(other.model.parameters()).dtype == torch.bfloat16
    assert len(ross_mcore.answer(other, asked, "qwen_2", max_new_tokens=1)) == 1
    assert ross_mcore.answer(model, asked, "qwen_2", max_new_tokens=3) == before
