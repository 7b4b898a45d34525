"""A base model that cannot continue a text: merges and bakes take it, the commands that need a text say so."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from tests.cli import ok, refused
from tests.tiny_bases import characters

pytestmark = pytest.mark.filterwarnings("ignore")

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_T5 = {"vocab_size": 104, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_hf: Any = transformers
# Class → configuration, and a module that an adapter can have.
MODELS = {
    "BertModel": (_hf.BertConfig(vocab_size=104, **_SMALL), "query"),
    "T5ForConditionalGeneration": (_hf.T5Config(**_T5, decoder_start_token_id=0), "q"),
    "ViTForImageClassification": (_hf.ViTConfig(image_size=16, patch_size=8, **_SMALL), "q_proj"),
    "LlamaModel": (_hf.LlamaConfig(vocab_size=104, **_SMALL), "q_proj"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_base_that_cannot_continue_a_text_is_named_in_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, module = MODELS[name]
    model = getattr(_hf, name)(config)
    model.save_pretrained("base")
    if name != "ViTForImageClassification":
        characters().save_pretrained("base")
    base = str(Path("base").resolve())
    monkeypatch.setenv("LORA_BASE", base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[module], init_lora_weights=False))
    wrapped.save_pretrained("mine")
    file = Path("mine/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    Path("task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')

    # The sentence comes before anything is hashed, loaded or recorded.
    with monkeypatch.context() as patched:
        patched.setattr("lora_cli.models.ref.version_of_folder", None)
        for words in (
            ("eval", "mine", "--data", "task.jsonl"),
            ("fit", "mine", "--data", "task.jsonl"),
            ("train", "--data", "task.jsonl"),
            ("merge", "mine", "-m", "regmean", "--data", "task.jsonl"),
        ):
            told = refused(5, *words)
            assert f"{base} is a {name}, and no causal language model: it cannot continue a text" in told
    assert json.loads(ok("runs", "list", "--json").out)["rows"] == []
    ok("merge", "mine", "-o", "merged")
    ok("bake", "merged", "-o", "baked")
