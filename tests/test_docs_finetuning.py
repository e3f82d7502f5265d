"""The recipe for fine-tuning runs as it is shown."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ift_tune

PAGE = Path(__file__).parent.parent / "docs/finetuning.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_from_adapters_to_a_smaller_configuration(
    peft: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    run, decide, fold, *_ = blocks()
    exec(run, scope)
    assert scope["outcome"].stop_reason == "done"
    exec(decide, scope)
    assert len(scope["scale"].names) == 4
    kept = scope["pattern"]["target_modules"]
    names = [n for n, m in scope["smaller"].named_modules() if hasattr(m, "lora_A")]
    assert [name.removeprefix("base_model.model.") for name in names] == kept
    ids = scope["best"].splits.test.tensors[0]["input_ids"]
    with torch.no_grad():
        wanted = scope["best"].model.eval()(input_ids=ids).logits
    exec(fold, scope)
    # What peft has saved has the scales in it.
    base = scope["make_model"](scope["LORA"]).unload()
    base.load_state_dict(
        {
            name.removeprefix("base_model.model.").replace("base_layer.", ""): tensor
            for name, tensor in scope["best"].model.state_dict().items()
            if "lora_" not in name
        }
    )
    loaded = peft.PeftModel.from_pretrained(base, "runs/adapters").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)


def test_a_head_on_features_and_batches_that_tell_their_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    *_, features, collator = blocks()
    config = ift_tune.MetaConfig(inner_steps=3)
    scope: dict[str, Any] = {"torch": torch, "ift_tune": ift_tune, "config": config}
    scope |= {name: getattr(ift_tune, name) for name in ("Compose", "WeightDecay")}
    exec(features, scope)
    assert next(iter(scope["features"].test))[0].shape == (30, 32)
    exec(collator, scope)
    (printed,) = re.findall(r"tensor\(\[(.*)\]\)", capsys.readouterr().out)
    assert len({int(number) for number in printed.split(",")}) == 8
