"""The survey of transformers' families: it sees what is wrong, and what it found is what MODELS.md
and README.md say."""
import pytest

from nalora_hf import experts, families, read_json, steer, survey

TABLE = read_json(survey.PACKAGE / "MODELS.json")

def test_the_families_in_the_documents_are_those_of_the_survey():
    text = (survey.PACKAGE / "MODELS.md").read_text(encoding="utf-8")
    assert f"{survey.MARK}\n{survey.report(TABLE)}\n{survey.END}" in text
    outcomes = [row["outcome"] for row in TABLE.values()]
    assert outcomes.count("steered") >= 112 and outcomes.count("ungated") >= 51
    assert "wrong" not in outcomes
    assert all(row["said"] for row in TABLE.values() if row["outcome"] in ("refused", "not built"))
    text = (survey.PACKAGE / "README.md").read_text(encoding="utf-8")
    assert (f"Of the {len(TABLE)} causal language models" in text
            and f"{outcomes.count('steered')} gated ones" in text
            and f"{outcomes.count('ungated')} without a gate" in text)
    mixtures = sum("experts" in row["how"] for row in TABLE.values())
    assert f"({mixtures} are mixtures with their experts)" in text
    changelog = (survey.PACKAGE.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"and {mixtures - 4} more families" in changelog  # four by name

@pytest.mark.parametrize("name", [
    "LlamaForCausalLM",  # gate_proj
    "Glm4ForCausalLM",  # gate and up in one layer
    "DoryForCausalLM",  # the gate is changed before the activation
    "Lfm2ForCausalLM",  # another name, and no activation module
    "DeepseekV3ForCausalLM",  # dense and shared FFNs beside experts
    "MixtralForCausalLM",  # experts alone
    "GPT2LMHeadModel",  # no gate
    "MiniMaxM3VLForCausalLM",  # experts, beside a fused layer whose activation cannot be seen
    "Qwen2MoeForCausalLM",  # experts and shared FFNs
    "JetMoeForCausalLM",  # experts in a form of their own
])
def test_interop_families_are_what_the_table_says(name):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    if not hasattr(transformers, name):
        pytest.skip("this transformers has no such model")
    assert survey.try_family(name) == TABLE[name]

def test_interop_the_survey_sees_what_is_wrong(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.setattr(families, "calls", lambda ffn, phi: False)  # then z is the gate's output
    assert survey.try_family("DoryForCausalLM") == {
        "outcome": "wrong", "how": "", "said": "importance is not that of the activation's input"}
    monkeypatch.undo()
    row_factor = steer.NALoRA.row_factor
    monkeypatch.setattr(steer.NALoRA, "row_factor",
                        lambda self, group: row_factor(self, group).roll(1, -2))
    assert survey.try_family("LlamaForCausalLM") == {
        "outcome": "wrong", "how": "", "said": "a step is not blended as mask and scale say"}
    monkeypatch.undo()
    sample = experts.Experts.sample

    def of_the_next(self, *args):
        z, weight, expert = sample(self, *args)
        return z, weight, (expert + 1) % self.count

    monkeypatch.setattr(experts.Experts, "sample", of_the_next)
    assert survey.try_family("MixtralForCausalLM") == {
        "outcome": "wrong", "how": "", "said": "importance is not that of the activation's input"}
