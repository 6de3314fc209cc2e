"""Reading a model's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ridgewalk.api.served_model import ModelFolderError, load_served_model
from tests.api.tokenizers_for_tests import byte_level

TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"


def write(folder: Path, name: str, value: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "config.json", {"vocab_size": 512, "max_position_embeddings": 4096, "eos_token_id": 1})
    write(
        tmp_path,
        "tokenizer_config.json",
        {
            "chat_template": TEMPLATE,
            "bos_token": {"content": "<|im_start|>", "lstrip": False},
            "eos_token": "<|im_end|>",
            "unk_token": None,
        },
    )
    write(
        tmp_path,
        "generation_config.json",
        {"eos_token_id": [3, 4], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True},
    )
    return tmp_path


def test_everything_is_read(folder: Path) -> None:
    model = load_served_model("org/tiny", folder, created=5)
    end = model.tokenizer.token_id("<|im_end|>")
    assert (model.name, model.max_model_len, model.vocab_size, model.created) == ("org/tiny", 4096, 512, 5)
    assert model.eos_token_ids == (3, 4, end)
    assert model.default_sampling == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert model.chat_template is not None
    assert model.chat_template.render([{"content": "x"}]) == "<|im_start|>x"


def test_arguments_go_before_files(folder: Path) -> None:
    model = load_served_model(
        "m", folder, max_model_len=100, chat_template="mine", default_sampling={"temperature": 0.0}
    )
    assert model.max_model_len == 100
    assert model.chat_template is not None
    assert model.chat_template.render([]) == "mine"
    assert model.default_sampling["temperature"] == 0.0


def test_template_file_and_named_templates(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert load_served_model("m", folder).chat_template.source == "yes"
    (folder / "chat_template.jinja").write_text("file")
    assert load_served_model("m", folder).chat_template.source == "file"


def test_bare_folder(folder: Path) -> None:
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    write(folder, "config.json", {"text_config": {"max_position_embeddings": 64}, "eos_token_id": 1})
    model = load_served_model("m", folder)
    assert (model.chat_template, model.max_model_len, model.eos_token_ids) == (None, 64, (1,))
    assert model.vocab_size == model.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("config.json", None, "config.json"),
        ("config.json", "{}", "max_model_len"),
        ("generation_config.json", "[]", "generation_config.json"),
        ("generation_config.json", "{", "generation_config.json"),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}', "cannot be compiled"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}',
            "default",
        ),
    ],
)
def test_what_is_wrong_is_named(folder: Path, name: str, text: str | None, says: str) -> None:
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ModelFolderError, match=says):
        load_served_model("m", folder)


def test_api_imports_no_torch() -> None:
    code = (
        "import sys, ridgewalk.api.app, ridgewalk.api.served_model; "
        "print([m for m in ('torch', 'transformers', 'ray', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
