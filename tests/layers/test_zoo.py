"""make zoo on eight classes: their losses run without logits, and all numbers are equal."""

import pytest
import zoo

FUSED = (
    "BloomForCausalLM CohereForCausalLM Gemma2ForCausalLM "
    "GPT2LMHeadModel GraniteForCausalLM LlamaForCausalLM MambaForCausalLM "
    "T5ForConditionalGeneration"
)


@pytest.mark.parametrize("name", FUSED.split())
def test_loss_and_gradients_of_a_lazy_head_are_the_standard_ones(name):
    outcome = zoo.judge(name, zoo.classes()[name])
    assert outcome.found == "fused", outcome


def test_a_wrong_number_is_found(monkeypatch):
    """A loss that is wrong by a thousandth, and one that only a lazy head raises."""
    right = zoo.logits_functions.head_loss
    monkeypatch.setattr(zoo.logits_functions, "head_loss", lambda *given: right(*given) * 1.001)
    kind = zoo.classes()["LlamaForCausalLM"]
    found, detail = zoo.judge("LlamaForCausalLM", kind)
    assert found == "WRONG"
    assert "differs by" in detail
    monkeypatch.setattr(zoo.logits_functions, "head_loss", lambda *given: 1 / 0)
    found, detail = zoo.judge("LlamaForCausalLM", kind)
    assert found == "WRONG"
    assert "only the lazy head raises ZeroDivisionError" in detail


def test_a_process_that_ends_is_reported(monkeypatch):
    def end(name, model_type, begin):
        begin()
        zoo.os._exit(3)

    monkeypatch.setattr(zoo, "judge", end)
    ((name, outcome),) = zoo.judge_all({"LlamaForCausalLM": "llama"}, jobs=1)
    assert name == "LlamaForCausalLM"
    assert outcome == ("WRONG", "its process ended with 3")
